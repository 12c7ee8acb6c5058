"""Ten published numbers, redone from the raw samples of the released set without the library.

Each number is a test with its formula written out. What is computed needs only the standard
library's json, statistics, gzip and itertools; csv and pathlib read what is printed.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import statistics
from pathlib import Path

import pytest

SET = Path(__file__).parents[1] / "outputs" / "released" / "h100-sxm"
GPU = "NVIDIA H100 80GB HBM3"  # visits of other cards lie beside it
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


def visit_of(environment: dict) -> tuple:
    """A stretch of time on one machine: as it says itself, else board, host and day."""
    names = ("gpu_uuid", "cpu", "cpu_count", "date")
    own = environment.get("visit")
    return (own,) if own else tuple(environment.get(name) for name in names)


def by_visit(job: str, sample: str, **key) -> dict[tuple, list[float]]:
    """The sample of one arm in each visit: that of the set, and those recorded beside it.

    There the way out and the way back are one sample, and what the end cut off is none.
    """
    base, samples = row(job, "latency", **key), {}
    for path in [SET / job / "records.jsonl", *sorted((SET.parent / "visits").glob("**/*.jsonl"))]:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        visits = {
            r["env_id"]: visit_of(r["values"])
            for r in lines
            if r["kind"] == "environment" and r["values"].get("gpu") == GPU
        }
        own: dict[tuple, list[float]] = {}
        for r in lines:
            cut_off = any(w["code"] == "cut_off" for w in r.get("warnings", ()))
            same = r["kind"] == "latency" and all(
                r["key"].get(name) == base["key"].get(name) for name in base["key"]
            )
            here = r["env_id"] in visits and not r["error"] and not cut_off
            if same and here and r["samples"].get(sample):
                own.setdefault(visits[r["env_id"]], []).extend(r["samples"][sample])
        samples = own | samples  # what the set holds of a visit counts
    return samples


def medians(job: str, sample: str, **key) -> list[float]:
    """The median of each visit, ascending."""
    return sorted(map(statistics.median, by_visit(job, sample, **key).values()))


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


def pair_slopes(calls: list[dict], name: str = "e2e_s") -> list[float]:
    """Seconds for a token between each two calls of different lengths."""
    points = [(c["key"]["new_tokens"], t) for c in calls for t in c["samples"][name]]
    return [
        (t2 - t1) / (g2 - g1)
        for (g1, t1), (g2, t2) in itertools.combinations(points, 2)
        if g1 != g2
    ]


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
    """TTFT = median over visits of the median time of calls with one new token (ms); the range of
    the visits beside it. The paper's software computed every expert."""
    at = {"context": 2048, "new_tokens": 1, "experts": "all_experts"}
    ttft_s = medians("gpt-oss-20b/random-hf-eager/latency", "ttft_s", **at)
    cell = printed("tables/table-01.csv", row="GPT-OSS-20B", column="TTFT (ms)")
    assert len(ttft_s) == 4
    assert 1e3 * statistics.median(ttft_s) == pytest.approx(float(cell["measured"]), rel=1e-7)
    assert 1e3 * ttft_s[0] == pytest.approx(float(cell["measured_low"]), rel=1e-7)
    assert 1e3 * ttft_s[-1] == pytest.approx(float(cell["measured_high"]), rel=1e-7)


def test_2_output_throughput_of_qwen():
    """Output throughput = 64 new tokens / median over visits of the whole call's time (tok/s)."""
    at = {"context": 2048, "new_tokens": 64}
    e2e_s = medians("Qwen3-32B/random-hf-eager/latency", "e2e_s", **at)
    cell = printed("tables/table-01.csv", row="Qwen3-32B", column="TPOT (tok/s)")
    assert len(e2e_s) == 7
    assert 64 / statistics.median(e2e_s) == pytest.approx(float(cell["measured"]), rel=1e-7)
    assert 64 / e2e_s[-1] == pytest.approx(float(cell["measured_low"]), rel=1e-7)
    assert 64 / e2e_s[0] == pytest.approx(float(cell["measured_high"]), rel=1e-7)


def test_3_decode_throughput_compiled_by_slope_and_by_the_device_clock():
    """Decode throughput = 1 / median slope of call time over new tokens (tok/s).

    With so few calls of two lengths the interval is the range of all slopes. By the device's clock
    it is (new tokens - 1) / marked time: of each visit the median over calls, of those the median.
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

    job, step_s = "gpt-oss-20b/random-hf-eager/stacks", {}
    for tokens in (64, 128):
        for visit, seconds in by_visit(job, "decode_s", **at, new_tokens=tokens).items():
            step_s.setdefault(visit, []).extend(t / (tokens - 1) for t in seconds)
    assert len(step_s) == 2
    cell = printed(
        "tables/latency.csv", model="gpt-oss-20b", stack="graph-compiled", context="2048"
    )
    assert 1 / statistics.median(map(statistics.median, step_s.values())) == pytest.approx(
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


def test_7_active_parameter_efficiency():
    """APE-TPOT = output throughput, every expert computed / (active parameters / 10^9)."""
    job = "gpt-oss-20b/random-hf-eager/latency"
    e2e_s = medians(job, "e2e_s", context=2048, new_tokens=64, experts="all_experts")
    active = rows(job, "card")[-1]["values"]["active_params"]
    cell = printed("tables/table-08.csv", row="GPT-OSS-20B", column="APE-TPOT")
    efficiency = 64 / statistics.median(e2e_s) / (active / 1e9)
    assert efficiency == pytest.approx(float(cell["measured"]), rel=1e-7)


def test_8_thirty_two_users():
    """Throughput of all = 32 users / median slope; J/1K = 1,000 / 32 x slope of joules.

    The line E = a + b x over x = new tokens - 1 through all blocks has the least sum of squared
    relative errors; b, the joules of a step, is the solution of its two normal equations.
    """
    at = {"stack": "graph-compiled", "context": 512, "batch": 32}
    job = "Qwen3-32B/random-hf-eager/batch"
    step_s = statistics.median(pair_slopes(rows(job, "batch", **at)))
    cell = printed(
        "tables/batch.csv", model="Qwen3-32B", stack="graph-compiled", context="512", batch="32"
    )
    assert 32 / step_s == pytest.approx(float(cell["throughput of all (tok/s)"]), rel=1e-7)

    points = [
        (r["key"]["new_tokens"] - 1, joules)
        for r in rows(job, "batch-energy", **at)
        for joules in r["samples"]["energy_j"]
    ]
    w, wx, wxx = (sum(x**k / e**2 for x, e in points) for k in (0, 1, 2))
    y, xy = (sum(x**k / e for x, e in points) for k in (0, 1))
    # minimise sum (1 - (a + b x) / e)^2:  a w + b wx = y,  a wx + b wxx = xy
    step_j = (w * xy - wx * y) / (w * wxx - wx**2)
    assert 1e3 * step_j / 32 == pytest.approx(float(cell["J/1K tokens, decode (J)"]), rel=1e-6)


def paired(experts: str) -> list[float]:
    """Median whole call of Qwen3-32B over that of gpt-oss-20b in each visit that has both."""
    at = {"context": 2048, "new_tokens": 64}
    qwen_s = by_visit("Qwen3-32B/random-hf-eager/latency", "e2e_s", **at)
    gpt_s = by_visit("gpt-oss-20b/random-hf-eager/latency", "e2e_s", experts=experts, **at)
    return sorted(
        statistics.median(qwen_s[visit]) / statistics.median(gpt_s[visit])
        for visit in qwen_s.keys() & gpt_s.keys()
    )


def test_9_the_rung_with_every_expert_computed():
    """Ratio of output throughputs: the median over visits of the ratio within each, and their
    range."""
    ratios = paired("all_experts")
    cell = printed("tables/ladder.csv", rung="whole call, hf-eager, every expert computed")
    assert len(ratios) == 4
    assert statistics.median(ratios) == pytest.approx(float(cell["throughput ratio"]), rel=1e-7)
    assert ends(cell, "throughput ratio") == pytest.approx([ratios[0], ratios[-1]], rel=1e-7)


def test_10_a_verdict_and_a_bandwidth():
    """The claim of 31.8 % more throughput: the gain is that of test 9. Its rows spread over more
    than 10 % of their median, so that they decide nothing.

    MBU = bytes of a decode step / median slope / best measured read stream.
    """
    claim = printed("claims.csv", claim="throughput-vs-qwen")
    gain = 100 * (statistics.median(paired("all_experts")) - 1)
    assert gain == pytest.approx(float(claim["protocol"]), rel=1e-6)
    at = {"context": 2048, "new_tokens": 64, "experts": "all_experts"}
    e2e_s = row("gpt-oss-20b/random-hf-eager/latency", "latency", **at)["samples"]["e2e_s"]
    assert (max(e2e_s) - min(e2e_s)) / statistics.median(e2e_s) > 0.10
    assert claim["verdict"] == "not testable"

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
