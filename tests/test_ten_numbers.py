"""Ten published numbers, redone from the raw samples of the released set without the library.

Each number is a test with its formula written out. What is computed needs only the standard
library's json, statistics, gzip, itertools and math; csv and pathlib read what is printed.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

SET = Path(__file__).parents[1] / "outputs" / "released" / "h100-sxm"
MIB = 2**20


def rows(job: str, kind: str, **key) -> list[dict]:
    """The records of one job's file with this kind and these key fields, in their order."""
    text = (SET / job / "records.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [
        r for r in found if r["kind"] == kind and all(r["key"].get(k) == v for k, v in key.items())
    ]


def row(job: str, kind: str, **key) -> dict:
    """The one record with this kind and key."""
    (found,) = rows(job, kind, **key)
    return found


def printed(file: str, **where) -> dict[str, str]:
    """The one line of a published CSV in which these columns have these texts."""
    with (SET / file).open(encoding="utf-8", newline="") as stream:
        (found,) = [
            line for line in csv.DictReader(stream) if all(line[k] == v for k, v in where.items())
        ]
    return found


def ends(line: dict[str, str], column: str) -> list[float]:
    """The two ends of a printed interval."""
    return [float(line[f"{column}_{end}"]) for end in ("low", "high")]


def order_statistics(samples: list[float]) -> tuple[float, float]:
    """Ends of the median's interval: each tail of a binomial(n, 1/2) holds at most 2.5 %."""
    n, below, rank = len(samples), 0.0, -1
    while below + math.comb(n, rank + 1) / 2**n <= 0.025:
        rank += 1
        below += math.comb(n, rank) / 2**n
    ordered = sorted(samples)
    return ordered[rank], ordered[n - 1 - rank]


def pair_slopes(calls: list[dict], name: str = "e2e_s") -> list[float]:
    """Seconds for a token between each two calls of different lengths."""
    points = [(c["key"]["new_tokens"], t) for c in calls for t in c["samples"][name]]
    return [
        (t2 - t1) / (g2 - g1)
        for (g1, t1), (g2, t2) in itertools.combinations(points, 2)
        if g1 != g2
    ]


def resampled_medians(samples: list[float]) -> dict[float, float]:
    """The exact distribution of the median of an even number of draws with replacement.

    Of n = 2 m draws the median is the mean of the m-th and the next. They are x[i] and x[j], i < j,
    if m draws are at most x[i] with x[i] among them, and m at least x[j] with x[j] among them.
    """
    x, n = sorted(samples), len(samples)
    m = n // 2
    assert n == 2 * m
    chance: dict[float, float] = {}
    for i in range(n):
        low = (i + 1) ** m - i**m
        at_most = [
            sum(math.comb(n, k) * c**k * (n - c) ** (n - k) for k in range(m, n + 1)) / n**n
            for c in (i, i + 1)
        ]
        same = at_most[1] - at_most[0]  # that the m-th draw is x[i]; less the pairs with j > i
        for j in range(i + 1, n):
            pair = math.comb(n, m) * low * ((n - j) ** m - (n - j - 1) ** m) / n**n
            same -= pair
            chance[(x[i] + x[j]) / 2] = chance.get((x[i] + x[j]) / 2, 0.0) + pair
        chance[x[i]] = chance.get(x[i], 0.0) + same
    assert abs(sum(chance.values()) - 1) < 1e-9
    return chance


def ratio_interval(a: list[float], b: list[float]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of median(a) / median(b), both resampled."""
    ratios = sorted(
        (p / q, chance_p * chance_q)
        for p, chance_p in resampled_medians(a).items()
        for q, chance_q in resampled_medians(b).items()
    )
    found, sum_ = [], 0.0
    for ratio, chance in ratios:
        sum_ += chance
        if len(found) == 0 and sum_ >= 0.025:
            found.append(ratio)
        if len(found) == 1 and sum_ >= 0.975:
            found.append(ratio)
    return found[0], found[1]


def counter_j(trace: list[dict], start_s: float, stop_s: float) -> float:
    """Joules between two times: the board's counter on the line between its changes.

    A change lies halfway between the reading before it and the reading with it.
    """
    ticks = [
        ((a["t_s"] + b["t_s"]) / 2, b["energy_j"])
        for a, b in itertools.pairwise(trace)
        if a["energy_j"] != b["energy_j"]
    ]

    def at(t_s: float) -> float:
        (t1, e1), (t2, e2) = next(p for p in itertools.pairwise(ticks) if p[0][0] <= t_s <= p[1][0])
        return e1 + (e2 - e1) * (t_s - t1) / (t2 - t1)

    return at(stop_s) - at(start_s)


def block_joules(job: str, measured: dict) -> list[float]:
    """Joules of a call in each block of an energy row, from the power traces alone."""
    samples, values, joules = measured["samples"], measured["values"], []
    for name, start_s, stop_s, calls in zip(
        values["traces"], samples["start_s"], samples["stop_s"], values["calls"], strict=True
    ):
        lines = gzip.decompress((SET / job / name).read_bytes()).splitlines()
        joules.append(counter_j([json.loads(line) for line in lines], start_s, stop_s) / calls)
    return joules


def test_1_ttft_of_gpt_oss():
    """TTFT = median of the times of calls with one new token, 2,048 tokens of context (ms)."""
    ttft_s = row(
        "gpt-oss-20b/random-hf-eager/latency",
        "latency",
        context=2048,
        new_tokens=1,
        experts="grouped_mm",
    )["samples"]["ttft_s"]
    low, high = order_statistics(ttft_s)
    cell = printed("tables/table-01.csv", row="GPT-OSS-20B", column="TTFT (ms)")
    assert 1e3 * statistics.median(ttft_s) == pytest.approx(float(cell["measured"]), rel=1e-7)
    assert 1e3 * low == pytest.approx(float(cell["measured_low"]), rel=1e-7)
    assert 1e3 * high == pytest.approx(float(cell["measured_high"]), rel=1e-7)


def test_2_output_throughput_of_qwen():
    """Output throughput = 64 new tokens / median time of the whole call (tok/s)."""
    e2e_s = row("Qwen3-32B/random-hf-eager/latency", "latency", context=2048, new_tokens=64)[
        "samples"
    ]["e2e_s"]
    low_s, high_s = order_statistics(e2e_s)
    cell = printed("tables/table-01.csv", row="Qwen3-32B", column="TPOT (tok/s)")
    assert 64 / statistics.median(e2e_s) == pytest.approx(float(cell["measured"]), rel=1e-7)
    assert 64 / high_s == pytest.approx(float(cell["measured_low"]), rel=1e-7)
    assert 64 / low_s == pytest.approx(float(cell["measured_high"]), rel=1e-7)


def test_3_decode_throughput_compiled_by_slope_and_by_the_device_clock():
    """Decode throughput = 1 / median slope of call time over new tokens (tok/s).

    With so few calls of two lengths the interval is the range of all slopes. By the device's clock
    it is (new tokens - 1) / marked time, the median over calls.
    """
    at = {"stack": "graph-compiled", "context": 2048}
    slopes = pair_slopes(rows("Qwen3-32B/random-hf-eager/stacks", "latency", **at))
    cell = printed("tables/latency.csv", model="Qwen3-32B", stack="graph-compiled", context="2048")
    assert len(slopes) == 12
    assert 1 / statistics.median(slopes) == pytest.approx(
        float(cell["decode throughput (tok/s)"]), rel=1e-7
    )
    low, high = ends(cell, "decode throughput (tok/s)")
    assert 1 / max(slopes) == pytest.approx(low, abs=0.005)
    assert 1 / min(slopes) == pytest.approx(high, abs=0.005)

    calls = rows("gpt-oss-20b/random-hf-eager/stacks", "latency", **at)
    step_s = [t / (c["key"]["new_tokens"] - 1) for c in calls for t in c["samples"]["decode_s"]]
    cell = printed(
        "tables/latency.csv", model="gpt-oss-20b", stack="graph-compiled", context="2048"
    )
    assert 1 / statistics.median(step_s) == pytest.approx(
        float(cell["decode by device clock (tok/s)"]), rel=1e-7
    )


def test_4_peak_above_baseline_with_every_expert():
    """Peak above baseline = allocator's peak - what it held before the forward (MiB)."""
    values = row(
        "gpt-oss-20b/random-hf-eager/memory",
        "memory-paper",
        context=2048,
        experts="all_experts",
    )["values"]
    above_mib = (values["peak_bytes"] - values["baseline_bytes"]) / MIB
    cell = printed(
        "tables/kv-contribution.csv", model="gpt-oss-20b", experts="all_experts", context="2048"
    )
    assert above_mib == pytest.approx(float(cell["peak above baseline (MiB)"]), rel=1e-7)
    assert above_mib / float(cell["published (MiB)"]) == pytest.approx(1, abs=1e-4)


def test_5_cache_of_qwen_by_its_tensors_and_by_hand():
    """KV cache = 2 (key, value) x 64 layers x 8 heads x 128 x 2 bytes x (2,048 + 64) tokens."""
    held = row("Qwen3-32B/random-hf-eager/memory", "memory-paper", context=2048)["values"]
    by_hand = 2 * 64 * 8 * 128 * 2 * (2048 + 64)
    cell = printed("tables/kv-contribution.csv", model="Qwen3-32B", context="2048")
    assert by_hand / MIB == 528.0 == float(cell["KV cache (MiB)"])
    assert held["kv_tensor_bytes"] == by_hand


@pytest.mark.parametrize("stack", ["hf-eager", "graph-compiled"])
def test_6_joules_per_1000_tokens_from_the_power_traces(stack):
    """J/1K = median over blocks of (counter at the end - at the start) / calls / 64 x 1,000.

    The published joules place each change of the counter on an even grid in time; here it lies in
    the middle of its bracket, which moves a block of several seconds by a few joules.
    """
    job = f"gpt-oss-20b/random-{stack}/energy"
    measured = row(job, "energy", context=2048, new_tokens=64)
    joules = block_joules(job, measured)
    assert len(joules) == 6
    cell = printed("tables/energy.csv", model="gpt-oss-20b", stack=stack, context="2048")
    published = float(cell["J/1K tokens (J)"])
    assert 1e3 / 64 * statistics.median(joules) == pytest.approx(published, rel=0.003)
    assert 1e3 / 64 * statistics.median(measured["samples"]["energy_j"]) == pytest.approx(
        published, rel=1e-7
    )


def test_7_active_parameter_efficiency_realised():
    """APE-TPOT = output throughput / (active parameters traced in a decode step / 10^9)."""
    job = "gpt-oss-20b/random-hf-eager/latency"
    e2e_s = row(job, "latency", context=2048, new_tokens=64, experts="grouped_mm")["samples"]
    realised = row(job, "trace", context=2048, batch=1)["values"]["active_params_realised"]
    cell = printed("tables/table-08.csv", row="GPT-OSS-20B", column="APE-TPOT")
    efficiency = 64 / statistics.median(e2e_s["e2e_s"]) / (realised / 1e9)
    assert efficiency == pytest.approx(float(cell["measured"]), rel=1e-7)


def test_8_sixty_four_users():
    """Throughput of all = 64 users / median slope; J/1K = 1,000 / 64 x slope of joules.

    The line E = a + b x over x = new tokens - 1 through all blocks has the least sum of squared
    relative errors; b, the joules of a step, is the solution of its two normal equations.
    """
    at = {"stack": "graph-compiled", "context": 512, "batch": 64}
    job = "gpt-oss-20b/random-hf-eager/batch"
    step_s = statistics.median(pair_slopes(rows(job, "batch", **at)))
    cell = printed(
        "tables/batch.csv", model="gpt-oss-20b", stack="graph-compiled", context="512", batch="64"
    )
    assert 64 / step_s == pytest.approx(float(cell["throughput of all (tok/s)"]), rel=1e-7)

    points = [
        (r["key"]["new_tokens"] - 1, joules)
        for r in rows(job, "batch-energy", **at)
        for joules in r["samples"]["energy_j"]
    ]
    w, wx, wxx = (sum(x**k / e**2 for x, e in points) for k in (0, 1, 2))
    y, xy = (sum(x**k / e for x, e in points) for k in (0, 1))
    # minimise sum (1 - (a + b x) / e)^2:  a w + b wx = y,  a wx + b wxx = xy
    step_j = (w * xy - wx * y) / (w * wxx - wx**2)
    assert 1e3 * step_j / 64 == pytest.approx(float(cell["J/1K tokens, decode (J)"]), rel=1e-6)


def test_9_the_rung_with_every_expert_computed():
    """Ratio of output throughputs = median call of Qwen3-32B / of gpt-oss-20b, 64 tokens each.

    The printed interval draws 5,000 resamples; here all of them are counted.
    """
    at = {"context": 2048, "new_tokens": 64}
    qwen_s = row("Qwen3-32B/random-hf-eager/latency", "latency", **at)["samples"]["e2e_s"]
    gpt_s = row("gpt-oss-20b/random-hf-eager/latency", "latency", experts="all_experts", **at)[
        "samples"
    ]["e2e_s"]
    cell = printed("tables/ladder.csv", rung="whole call, hf-eager, every expert computed")
    ratio = statistics.median(qwen_s) / statistics.median(gpt_s)
    assert ratio == pytest.approx(float(cell["throughput ratio"]), rel=1e-7)
    low, high = ends(cell, "throughput ratio")
    exact = ratio_interval(qwen_s, gpt_s)
    assert exact[0] == pytest.approx(low, rel=0.005)
    assert exact[1] == pytest.approx(high, rel=0.005)


def test_10_a_verdict_and_a_bandwidth():
    """The claim of 31.8 % more throughput: the gain lies outside 31.8 +- 5 points, above zero.

    MBU = bytes of a decode step / median slope / best measured read stream.
    """
    at = {"context": 2048, "new_tokens": 64}
    qwen_s = row("Qwen3-32B/random-hf-eager/latency", "latency", **at)["samples"]["e2e_s"]
    gpt_s = row("gpt-oss-20b/random-hf-eager/latency", "latency", experts="grouped_mm", **at)[
        "samples"
    ]["e2e_s"]
    claim = printed("claims.csv", claim="throughput-vs-qwen")
    gain = 100 * (statistics.median(qwen_s) / statistics.median(gpt_s) - 1)
    assert gain == pytest.approx(float(claim["protocol"]), rel=1e-6)
    low, high = (100 * (end - 1) for end in ratio_interval(qwen_s, gpt_s))
    assert low == pytest.approx(float(claim["protocol_low"]), abs=0.5)
    assert high == pytest.approx(float(claim["protocol_high"]), abs=0.5)
    band = (float(claim["paper"]) - 5, float(claim["paper"]) + 5)
    inside = band[0] <= low and high <= band[1]
    assert (claim["verdict"] == "reproduced") == inside
    assert (claim["verdict"] == "direction only") == (not inside and low > 0)

    calls = rows(
        "Qwen3-32B/random-hf-eager/stacks", "latency", stack="graph-compiled", context=2048
    )
    step_bytes = max(calls, key=lambda c: c["key"]["new_tokens"])["values"]["decode_bytes"]
    (stream,) = rows("_all/machine", "ceilings")
    best = max(
        max(values)
        for name, values in stream["samples"].items()
        if name.startswith("read_bytes_per_s")
    )
    mbu = step_bytes / statistics.median(pair_slopes(calls)) / best
    cell = printed("tables/bound.csv", model="Qwen3-32B", stack="graph-compiled", context="2048")
    assert mbu == pytest.approx(float(cell["useful MBU, measured"]), rel=1e-6)
