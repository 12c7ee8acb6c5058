"""One rule a kind of inconsistency: latency, energy, ablations, sizes, governance, arithmetic.

A rule takes a study and returns a finding, or None where the study holds. Its docstring is
the rule as the reader sees it.
"""

from __future__ import annotations

import math

from lib import stats
from lib.studies.audit import claims_follow
from lib.studies.study import (
    BYTES,
    Finding,
    Published,
    agrees,
    each,
    percent,
    plain,
    rounded,
)

RATE, P50, TTFT, JOULES = "TPOT (tok/s)", "p50 (ms)", "TTFT (ms)", "J/1K (J)"  # columns
POINTS = 5.0  # percentage points by which a change must differ before it is called another one
PEAK, GAP, LESS = "Peak VRAM (MB)", "Δ vs GPT-OSS (MB)", "% less vs Qwen/Yi"
MIB = BYTES["MiB"]
FLOAT = 1e-12  # relative: a few roundings of the last digit, and far below any two runs' difference


def decode_tok_per_s(p: Published, model: str, context: int) -> float:
    """Decode throughput of the latency runs: tokens over the growth of the median call time.

    Theil-Sen over the lengths; of three lengths that is the slope from the first to the last.
    """
    return 1e3 / stats.slope(*zip(*_calls(p, model, context), strict=True)).value


def _calls(p: Published, model: str, context: int) -> list[tuple[int, float]]:
    """Generated tokens and median call time (ms) of the latency runs."""
    stem = f"p50_ms/{model}/{context}/"
    lengths = [int(n.removeprefix(stem)) for n in p.data["released"] if n.startswith(stem)]
    return [(g, p.fact("p50_ms", model, context, g)) for g in sorted(lengths)]


def _rate(p: Published, model: str, context: int) -> float:
    """Output throughput of the latency runs (tok/s), prefill included."""
    tokens = p.data["new_tokens"]
    return 1e3 * tokens / p.fact("p50_ms", model, context, tokens)


def rate_is_not_tokens_over_p50(p: Published) -> Finding | None:
    """Output throughput is generated tokens / wall time, so within one campaign the median
    throughput is tokens / p50."""
    exact = {m: 1e3 * p.data["new_tokens"] / p.value(1, m, P50) for m in p.models}
    if all(agrees(p.printed(1, m, RATE), exact[m]) for m in p.models):
        return None
    printed = ", ".join(
        f"{p.printed(1, m, RATE)} tok/s beside p50 {p.printed(1, m, P50)} ms ({m})"
        for m in p.models
    )
    follows = f"{p.data['new_tokens']} / p50 = {each(exact, '.2f')}: two campaigns in one row"
    return Finding("error", "table 1", printed, follows)


def ttft_is_one_sample(p: Published) -> Finding | None:
    """Each cell of table 3 against the two released values: the median of the latency runs and
    the single reading of the energy runs."""
    single = single_readings(p)
    if not single:
        return None
    cells, printed, follows = len(p.contexts) * len(p.models), [], []
    for c in p.contexts:
        text = {m: p.value(3, c, m) for m in p.models}
        median = {m: p.fact("ttft_median_ms", m, c) for m in p.models}
        last, slowest = max(text, key=text.get), max(median, key=median.get)
        if last == slowest:
            continue
        printed.append(f"at {c} " + " / ".join(p.printed(3, c, m) for m in p.models) + " ms")
        where = "first" if last == min(median, key=median.get) else "before it"
        follows.append(
            f"at {c} the medians are {each(median, '.1f', 'ms')}, so {slowest} answers last and "
            f"{last} {where}"
        )
    source = p.source("one-ttft")
    head = f"{len(single)} of {cells} cells are the one reading of the energy runs "
    head += f"({source['text']}, as of {source['dated']})"
    trials = f"median of {p.claimed('ttft-trials')} trials"
    return Finding(
        "error",
        "table 3; section 3.3",
        "; ".join([trials, *printed]),
        "; ".join([head, *follows]),
        ("ttft-trials",),
        (source["url"],),
    )


def single_readings(p: Published) -> set[tuple[int, str]]:
    """Cells of table 3 (context, model) that hold the energy runs' one reading, not the median."""
    return {
        (c, m)
        for c in p.contexts
        for m in p.models
        if agrees(p.printed(3, c, m), p.fact("ttft_once_ms", m, c))
        and not agrees(p.printed(3, c, m), p.fact("ttft_median_ms", m, c))
    }


def mixed_runs(p: Published) -> Finding | None:
    """Find for each cell of table 2 the campaign whose released value it holds. A change between
    two campaigns is none of context alone, and table 7 holds the energy runs only."""
    ends, printed, follows, claims = (p.contexts[0], p.contexts[-1]), [], [], []
    for m in p.models:
        runs = [campaigns(p, m, c) for c in ends]
        if not all(runs) or set.intersection(*runs):
            continue
        change, rates = p.printed(4, m, "ΔTPOT (%)"), [p.printed(2, c, m) for c in ends]
        printed.append(f"{change} % ({m}: {' to '.join(rates)})")
        energy = [p.fact("energy_tok_per_s", m, c) for c in ends]
        follows.append(
            f"{m}: {' and '.join(sorted(runs[0]))} runs at {ends[0]}, "
            f"{' and '.join(sorted(runs[1]))} runs at {ends[1]}; within the latency runs "
            f"{percent(_rate(p, m, ends[1]), _rate(p, m, ends[0])):.1f} %, within the energy runs "
            f"{percent(energy[1], energy[0]):.1f} %"
        )
        claims += [claim for model, claim in p.about("drop").items() if model == m]
    apart = [(m, c) for m in p.models for c in p.contexts if campaigns(p, m, c) == {"latency"}]
    if not printed and not apart:
        return None
    if apart:
        own = {f"{m} at {c}": p.fact("energy_tok_per_s", m, c) for m, c in apart}
        printed.append(", ".join(f"{p.printed(2, c, m)} tok/s ({m} at {c})" for m, c in apart))
        follows.append(f"the runs behind table 7 gave {each(own, '.2f', 'tok/s')}")
    where = "tables 2, 4 and 7"
    severity = "error" if claims else "caution"
    return Finding(severity, where, "; ".join(printed), "; ".join(follows), tuple(claims))


def campaigns(p: Published, model: str, context: int) -> set[str]:
    """Which campaigns a cell of table 2 agrees with: latency, energy, both or none."""
    text = p.printed(2, context, model)
    released = {
        "latency": _rate(p, model, context),
        "energy": p.fact("energy_tok_per_s", model, context),
    }
    return {name for name, exact in released.items() if agrees(text, exact)}


def prefill_in_throughput(p: Published) -> Finding | None:
    """Decode alone: (longest - shortest generated length) / (difference of their p50), from the
    latency runs at the first and the last context, against the printed change."""
    ends = (p.contexts[-1], p.contexts[0])
    change = {m: p.value(4, m, "ΔTPOT (%)") for m in p.models}
    decode = {m: percent(*(decode_tok_per_s(p, m, c) for c in ends)) for m in p.models}
    if all(abs(decode[m] - change[m]) < POINTS for m in p.models):
        return None
    follows = f"decode alone changes by {each(decode, '+.1f', '%')}: what grows with context is "
    follows += "the prefill inside the call"
    text = p.claim("decode-degrades")["text"]
    printed = f"{each(change, '+.1f', '%')} from {ends[1]} to {ends[0]} tokens; {text}"
    claims = ("decode-degrades", *p.about("drop").values())
    return Finding("caution", "tables 4 and 10", printed, follows, claims)


def decode_gain(p: Published) -> Finding | None:
    """The ratio of decode throughputs (as above, at the headline context) against the ratio of
    output throughputs that the text calls decode throughput."""
    claims, context = p.about("throughput-vs"), p.data["context"]
    rates = {m: decode_tok_per_s(p, m, context) for m in p.models}
    gain = {m: percent(rates[p.reference], rates[m]) for m in claims}
    if all(abs(gain[m] - float(p.claimed(c))) < POINTS for m, c in claims.items()):
        return None
    printed = ", ".join(f"+{p.claimed(c)} % against {m}" for m, c in claims.items())
    follows = f"decode alone {each(rates, '.2f', 'tok/s')}: {each(gain, '+.1f', '%')}; the printed "
    return Finding(
        "caution",
        "abstract; section 4.2",
        f"decode throughput {printed}",
        follows + "ratio includes prefill",
        tuple(claims.values()),
    )


def p95_is_the_maximum(p: Published) -> Finding | None:
    """From n runs a 95th percentile is bounded only for n >= 59 (0.95^n < 0.05). Equal p95 and
    p99 in every row mean that both are the largest run."""
    fact = p.data.get("released", {}).get("p95_equals_p99")
    if not fact or fact["value"] < fact["of"]:
        return None
    follows = f"p95 = p99 in {fact['value']} of {fact['of']} released rows: the largest of the runs"
    return Finding("caution", "table 1", "p95 of the call time", follows)


def even_number_of_runs(p: Published) -> Finding | None:
    """Of an odd number of runs one run is the median of the times and of the rates, so that rate x
    p50 is the number of tokens to the last digit; of an even number both are means of two runs, and
    the product is larger."""
    even, rows = even_rows(p)
    if not even:
        return None
    source = p.source("latency-runs")
    follows = (
        f"rate x p50 exceeds the tokens in {even} of {rows} rows of the latency files, so the "
    )
    follows += f"number of their runs is even; {source['text']}"
    text = p.claim("decode-runs")["text"]
    return Finding("error", "reproducibility", text, follows, ("decode-runs",), (source["url"],))


def even_rows(p: Published) -> tuple[int, int]:
    """Rows of the latency files whose number of runs was even, and all of them."""
    rows = [n.removeprefix("tpot/") for n in p.data["released"] if n.startswith("tpot/")]
    if not rows:
        p.fact("tpot")  # which is absent
    products = (p.fact("tpot", n) * p.fact("p50_ms", n) / 1e3 / int(n.split("/")[-1]) for n in rows)
    return sum(x - 1 > FLOAT for x in products), len(rows)


def gpu_is_not_named(p: Published) -> Finding | None:
    """The hardware as the text names it against the device name in the released files."""
    text, gpu = p.claim("hardware")["text"], p.fact("gpu")
    if gpu in text:
        return None
    follows = f"{gpu} with {p.fact('gpu_total_mib'):,.0f} MiB; the cards of that name differ in "
    return Finding(
        "note", "section 3.1", text, f"{follows}bandwidth and power limit", ("hardware",)
    )


def quotients(p: Published) -> Finding | None:
    """Table 8 recomputed from tables 1 and 6: throughput, 1 / TTFT and tokens per joule over the
    printed active parameters. Rounded inputs may move a quotient by half a percent."""
    off = {}
    for m in p.models:
        active = p.value(8, m, "Active (B)")
        exact = {
            "APE-TPOT": p.value(1, m, RATE),
            "APE-1/TTFT": 1e3 / p.value(1, m, TTFT),
            "APE-Energy": 1e3 / p.value(6, m, JOULES),
        }
        for column, value in exact.items():
            text, value = p.printed(8, m, column), value / active
            if not agrees(text, value) and abs(float(text) / value - 1) > 0.005:
                off[f"{column} of {m}"] = (text, value)
    if not off:
        return None
    return Finding(
        "error",
        "table 8",
        each({at: t for at, (t, _) in off.items()}),
        each({at: x for at, (_, x) in off.items()}, ".4g"),
    )


def efficiency_file(p: Published) -> Finding | None:
    """Table 8 against the released file of the same quotients."""
    off = {}
    for column in ("APE-TPOT", "APE-1/TTFT", "APE-Energy", "TPOT/GB"):
        for m in p.models:
            text, exact = p.printed(8, m, column), p.fact("ape", m, column)
            if not agrees(text, exact):
                off[f"{column} of {m}"] = (text, exact)
    if not off:
        return None
    printed, exact = (
        each({at: pair[i] for at, pair in off.items()}, form) for i, form in ((0, ""), (1, ".4g"))
    )
    follows = f"the file has {exact}: the latency runs, and GB of 2^30 bytes"
    return Finding("note", "table 8", printed, follows)


def throughput_falls(p: Published) -> Finding | None:
    """Table 2 column by column: the text says that every model slows as context grows."""
    printed = p.claim("slows-with-context")["text"]
    rising = {}
    for m in p.models:
        row = [p.value(2, c, m) for c in p.contexts]
        if any(b >= a for a, b in zip(row, row[1:], strict=False)):
            rising[m] = ", ".join(p.printed(2, c, m) for c in p.contexts)
    if not rising:
        return None
    return Finding("error", "section 4.1, table 2", printed, each(rising), ("slows-with-context",))


def within_bandwidth(p: Published) -> Finding | None:
    """A decode step reads at least the active weights, 2 bytes each, so decode throughput times
    these bytes cannot exceed the memory bandwidth of the card."""
    source, context = p.source("bandwidth"), p.data["context"]
    used = {
        m: decode_tok_per_s(p, m, context) * 2 * p.counted(m, "active_params") for m in p.models
    }
    beyond = {m: x / 1e12 for m, x in used.items() if x > source["bytes_per_s"]}
    if not beyond:
        return None
    printed = each({m: p.printed(2, context, m) for m in beyond}, unit="tok/s")
    follows = f"{each(beyond, '.2f', 'TB/s')}, above {source['bytes_per_s'] / 1e12:.2f} TB/s"
    return Finding("error", "table 2", printed, follows, (), (source["url"],))


def last_digits(p: Published) -> Finding | None:
    """Cells whose last digit is not the rounded value: table 3 against the released reading it
    holds, table 4 within one campaign, table 7 against 1000 W / (tok/s)."""
    exact = {}
    for c in p.contexts:
        for m in p.models:
            text = p.printed(3, c, m)
            readings = (p.fact("ttft_once_ms", m, c), p.fact("ttft_median_ms", m, c))
            value = min(readings, key=lambda x, t=text: abs(x - float(t)))
            exact[f"table 3, {m} at {c}"] = (text, value)
            joules = 1e3 * p.fact("power_w", m, c) / p.fact("energy_tok_per_s", m, c)
            exact[f"table 7, {m} at {c}"] = (p.printed(7, m, str(c)), joules)
    first, last = p.contexts[0], p.contexts[-1]
    for m in p.models:
        if "energy" in campaigns(p, m, first) & campaigns(p, m, last):
            change = percent(*(p.fact("energy_tok_per_s", m, c) for c in (last, first)))
            exact[f"table 4, {m}"] = (p.printed(4, m, "ΔTPOT (%)"), change)
    off = {at: (t, rounded(x, t)) for at, (t, x) in exact.items() if rounded(x, t) != t}
    if not off:
        return None
    printed = ", ".join(f"{t} ({at})" for at, (t, _) in off.items())
    follows = f"{', '.join(x for _, x in off.values())} by the released values"
    return Finding("note", "tables 3, 4 and 7", printed, f"{follows}; {len(exact)} cells checked")


def tokens_per_joule(p: Published) -> Finding | None:
    """1000 / (J per 1,000 tokens) is tokens per joule; tokens per watt would also need a time."""
    if p.data["tables"][6]["columns"]["Tokens/W"]["unit"] != "tokens/W":
        return None
    exact = {m: 1e3 / p.value(6, m, JOULES) for m in p.models}
    printed = ", ".join(f"{p.printed(6, m, 'Tokens/W')} tokens/W ({m})" for m in p.models)
    follows = f"1000 / J/1K = {each(exact, '.4f')}: tokens per joule"
    return Finding("note", "tables 6 and 8", printed, follows)


def energy_is_time(p: Published) -> Finding | None:
    """J/1K = 1000 W / (tok/s). Split the ratio of J/1K into the ratio of throughputs and that of
    powers; the share of each is its logarithm over that of the whole."""
    ref, context = p.reference, p.data["context"]
    watts = {m: p.fact("power_w", m, context) for m in p.models}
    rows = [(m, c) for m in p.models for c in p.contexts]
    equal = sum(
        abs(
            1e3 * p.fact("power_w", m, c) / p.fact("energy_tok_per_s", m, c) / p.value(7, m, str(c))
            - 1
        )
        < 1e-3
        for m, c in rows
    )
    share = {
        m: math.log(p.value(6, ref, RATE) / p.value(6, m, RATE))
        / math.log(p.value(6, m, JOULES) / p.value(6, ref, JOULES))
        for m in p.others
    }
    mostly = [m for m in p.others if share[m] > 0.75]
    if not mostly:
        return None
    printed = ", ".join(
        f"{p.claimed(c)} % less energy than {m}"
        for m, c in p.about("energy-vs").items()
        if m in mostly
    )
    follows = f"J/1K = W / throughput in {equal} of {len(rows)} rows; " + "; ".join(
        f"power is {watts[ref]:.1f} against {watts[m]:.1f} W "
        f"({percent(watts[ref], watts[m]):+.1f} %), so {100 * share[m]:.0f} % of the gain over {m} "
        "is the throughput ratio again"
        for m in mostly
    )
    claims = tuple(c for m, c in p.about("energy-vs").items() if m in mostly)
    return Finding("caution", "section 4.2, table 6", printed, follows, claims)


def energy_trend(p: Published) -> Finding | None:
    """Table 7 row by row: the steps from one context to the next, which the text says all rise,
    the last one most."""
    p.claim("energy-rises")
    joules, follows = [], []
    for m in p.models:
        row = [p.value(7, m, str(c)) for c in p.contexts]
        steps = [b - a for a, b in zip(row, row[1:], strict=False)]
        if min(steps) < 0 or max(steps) > steps[-1]:
            joules.append(f"{m}: " + ", ".join(p.printed(7, m, str(c)) for c in p.contexts))
            follows.append(
                f"{m}: steps " + ", ".join(f"{s:+,.1f}" for s in steps) + " J; the "
                f"largest ends at {p.contexts[steps.index(max(steps)) + 1]}"
                + (", and one falls" if min(steps) < 0 else "")
            )
    if not joules:
        return None
    printed = f"{p.claim('energy-rises')['text']}; {'; '.join(joules)}"
    return Finding("error", "section 4.2, table 7", printed, "; ".join(follows), ("energy-rises",))


def prefill_share(p: Published) -> Finding | None:
    """Prefill takes at most TTFT, so it is at most TTFT / p50 of the call (same row of table 1)."""
    claim = p.claim("prefill-dominates")
    share = {m: 100 * p.value(1, m, TTFT) / p.value(1, m, P50) for m in p.models}
    if max(share.values()) > 50:
        return None
    return Finding(
        "error",
        "section 4.2, context trends",
        claim["text"],
        f"at most {each(share, '.0f', '%')} of the call",
        ("prefill-dominates",),
    )


def first_row_is_partly_idle(p: Published) -> Finding | None:
    """A row's power is the mean of two readings a run. If one of the first row's readings was idle
    power, the mean W of n readings becomes (n W - idle) / (n - 1); then it should be near the next
    row's. This shows that one idle reading would explain the row, not that it happened."""
    first, second = p.contexts[:2]
    n = {m: 2 * p.fact("runs", m, first) for m in p.models}
    mean = {m: p.fact("power_w", m, first) for m in p.models}
    idle = {m: p.fact("idle_w", m, first) for m in p.models}
    rest = {m: (n[m] * mean[m] - idle[m]) / (n[m] - 1) for m in p.models}
    following = {m: p.fact("power_w", m, second) for m in p.models}
    explained = all(
        abs(rest[m] / following[m] - 1) < 0.03 < 1 - mean[m] / following[m] for m in p.models
    )
    if not explained:
        return None
    token = {
        m: p.fact("ttft_j", m, first) / p.fact("ttft_once_ms", m, first) * 1e3 for m in p.models
    }
    rows = [1e3 * p.fact("power_w", m, c) for m in p.models for c in p.contexts]
    tens = sum(abs(w - round(w)) < 1e-6 for w in rows)
    low = {m: -percent(mean[m], rest[m]) for m in p.models}
    printed = f"J/1K at {first}: " + each({m: p.printed(7, m, str(first)) for m in p.models})
    follows = f"{each(mean, '.1f', 'W')}; without one idle reading {each(rest, '.1f', 'W')}, near "
    follows += f"the next row's {each(following, '.1f', 'W')}; J/1K would then be too low by "
    follows += f"{each(low, '.1f', '%')}. Idle power was {each(idle, '.0f', 'W')}, and the row "
    follows += f"books its first token at {each(token, '.0f', 'W')}. {tens} of {len(rows)} means "
    follows += "have at most three decimals, as ten readings of two decimals have; "
    follows += p.source("edge-power")["text"]
    return Finding("caution", "table 7", printed, follows, (), (p.source("edge-power")["url"],))


def greedy_baselines_differ(p: Published) -> Finding | None:
    """Tables 9, 11 and 12 each have a greedy arm (bf16, 64 tokens), of a prompt of its own. Their
    spread, (largest - smallest) / median, is that of prompts and of time; an effect below it holds
    within its table only."""
    cells = {9: "Greedy", 11: "BF16", 12: "Transformers"}
    contexts = {str(p.data["tables"][t].get("context")) for t in cells}
    if len(contexts) > 1:  # other arms, which may differ
        return None
    rates = {f"table {t}": p.value(t, row, "p50 tok/s") for t, row in cells.items()}
    column = "Δ vs Greedy (%)"
    effects = [
        abs(p.value(9, row, column)) for row in p.data["tables"][9]["rows"] if row != "Greedy"
    ]
    spread = 100 * stats.spread(list(rates.values()))
    if spread <= max(effects):
        return None
    source = p.source("three-prompts")
    follows = f"the greedy arms give {each(rates, '.2f', 'tok/s')}, a spread of {spread:.1f} %; "
    follows += f"the effects are {min(effects):.1f} to {max(effects):.1f} %; {source['text']}"
    if contexts == {"None"}:
        follows += ", and the paper states no context for them"
    text, claims = p.claim("sampling-cost")["text"], ("sampling-cost", "decoding-spread")
    return Finding("note", "tables 9, 11 and 12", text, follows, claims, (source["url"],))


def same_arm_twice(p: Published) -> Finding | None:
    """Table 10 repeats arms of table 2 (same model, context and tokens, greedy). Their difference
    is what a campaign adds; the sampling effect should exceed it."""
    rows = [int(c) for c in p.data["tables"][10]["rows"] if int(c) in p.contexts]
    pairs = {c: (p.value(10, c, "p50 tok/s"), p.value(2, c, p.reference)) for c in rows}
    off = {f"at {c}": percent(*pair) for c, pair in pairs.items()}
    low, high = (float(x) for x in p.claim("sampling-cost")["value"])
    if max(map(abs, off.values()), default=0) <= high:
        return None
    printed = ", ".join(f"{a:.2f} and {b:.2f} tok/s at {c}" for c, (a, b) in pairs.items())
    follows = f"{each(off, '+.1f', '%')}: more than the {low:g} to {high:g} % of sampling"
    return Finding("caution", "tables 2 and 10", printed, follows, ("sampling-cost",))


def mib_as_mb(p: Published) -> Finding | None:
    """A peak holds at least the weights (parameters x 2 bytes), so that a printed one below them is
    not in the unit that is printed. What is made of such numbers is compared in GB of 10^9 bytes:
    sizes that the text states, and throughput per GB."""
    scale, weights = (
        BYTES[p.unit(5, PEAK)] / 1e9,
        {m: p.counted(m, "weight_bytes") for m in p.models},
    )
    printed, follows = [], []
    if low := [m for m in p.models if p.value(5, m, PEAK) * BYTES["MB"] < weights[m]]:
        peaks = ", ".join(f"{p.value(5, m, PEAK):,.0f} ({m})" for m in p.models)
        printed.append(f"peaks in MB, decimal by section 3.1: {peaks}")
    follows += [
        f"{m} would peak at {p.value(5, m, PEAK) / 1e3:.2f} GB, below its weights "
        f"({weights[m] / 1e9:.2f} GB); read as MiB it is {p.value(5, m, PEAK) * MIB / 1e9:.2f} GB"
        for m in low
    ]
    sizes = {
        c: p.fact("baseline_mib", m, p.data["context"]) * MIB / 1e9
        for m, c in p.about("baseline").items()
    }
    sizes |= {c: p.value(5, m, GAP) * scale for m, c in p.about("peak-gap").items()}
    off = {c: gb for c, gb in sizes.items() if not agrees(p.claimed(c), gb)}
    if off:
        printed.append(", ".join(f"{p.claimed(c)} GB ({c})" for c in off))
        rest = "".join(f", {c} beside them is GB" for c in sizes if c not in off)
        follows.append(f"{each(off, '.1f', 'GB')}; printed is MiB / 1000{rest}")
    rates = {m: p.value(1, m, RATE) / p.value(5, m, PEAK) / scale for m in p.models}
    if wrong := {m: x for m, x in rates.items() if not agrees(p.printed(8, m, "TPOT/GB"), x)}:
        printed.append(", ".join(f"{p.printed(8, m, 'TPOT/GB')} tok/s/GB ({m})" for m in wrong))
        follows.append(f"{each(wrong, '.3f', 'tok/s/GB')}; printed is for 1,000 MiB")
    if not printed:
        return None
    where, claims = "section 3.1; tables 5 and 8; section 4.2", ("decimal-units", *off)
    return Finding("error", where, "; ".join(printed), "; ".join(follows), claims)


def peak_row(p: Published) -> Finding | None:
    """A printed peak is the released one, to within one unit of its last digit."""
    unit, context = p.unit(5, PEAK), p.data["context"]
    exact = {m: p.fact("peak_mib", m, context) * MIB / BYTES[unit] for m in p.models}
    off = [m for m in p.models if not agrees(p.printed(5, m, PEAK), exact[m])]
    if not off:
        return None
    less = {m: 100 * (1 - exact[p.reference] / exact[m]) for m in p.others}
    printed = ", ".join(f"{p.value(5, m, PEAK):,.0f} ({m})" for m in off)
    follows = ", ".join(
        f"{exact[m]:,.2f} {unit} in the released file of {m}, "
        f"{percent(exact[m], p.value(5, m, PEAK)):+.2f} %"
        for m in off
    )
    follows += f"; the savings become {each(less, '.2f', '%')}, printed "
    follows += each({m: p.printed(5, m, LESS) for m in p.others}, unit="%")
    return Finding("note", "table 5", printed, follows)


def saving_is_size(p: Published) -> Finding | None:
    """Compare the saving in weights with the saving in total and in active parameters (each
    1 - ours / theirs), and with the saving at the peak."""
    p.claim("saving-from-moe")
    ref = p.reference

    def less(model: str, what: str) -> float:
        return 100 * (1 - p.counted(ref, what) / p.counted(model, what))

    models = [m for m in p.others if abs(less(m, "weight_bytes") - less(m, "total_params")) < 0.5]
    if not models:
        return None
    above = {m: p.fact("peak_mib", m, p.data["context"]) for m in p.models}
    above = {m: v - p.fact("baseline_mib", m, p.data["context"]) for m, v in above.items()}
    follows = "; ".join(
        f"against {m} the weights save {less(m, 'weight_bytes'):.1f} %, as total parameters do "
        f"({less(m, 'total_params'):.1f} %; active ones would save "
        f"{less(m, 'active_params'):.1f} %), and the peak {p.value(5, m, LESS):.1f} %"
        for m in models
    )
    follows += "; all experts are resident, and above the baseline the peak needs " + ", ".join(
        f"{v:,.0f} MiB ({m})" for m, v in above.items()
    )
    claims = ("saving-from-moe", *p.about("peak-saving").values())
    return Finding(
        "caution", "section 4.2, findings", p.claim("saving-from-moe")["text"], follows, claims
    )


def kv_contribution(p: Published) -> Finding | None:
    """The cache is tokens x bytes per token (layers x 2 x key-value heads x head width x 2 B); the
    released files also hold what stayed allocated after the call. The study's contribution is the
    peak less what was allocated before, so it counts workspace and logits as cache."""
    p.claim("kv-larger")
    context, tokens = p.data["context"], p.data["context"] + p.data["new_tokens"]
    reported = {m: p.fact("kv_reported_mib", m, context) for m in p.models}
    held = {m: p.fact("held_mib", m, context) for m in p.models}
    cache = {m: tokens * p.counted(m, "kv_bytes_per_token") / MIB for m in p.models}
    if reported[p.reference] <= 1.5 * cache[p.reference]:
        return None
    printed = (
        p.claim("kv-larger")["text"]
        + "; the released files: "
        + ", ".join(f"{v:,.0f} MiB ({m})" for m, v in reported.items())
    )
    follows = f"{tokens:,} tokens: " + ", ".join(
        f"{p.counted(m, 'kv_bytes_per_token'):,} B a token = {cache[m]:,.1f} MiB, held "
        f"{held[m]:,.1f}, reported {reported[m] / held[m]:.1f} times that ({m})"
        for m in p.models
    )
    if cache[p.reference] < min(cache[m] for m in p.others):
        follows += f"; the cache of {p.reference} is the smallest"
    return Finding("error", "sections 3.4 and 4.2", printed, follows, ("kv-larger",))


def held_logits(p: Published) -> Finding | None:
    """From the second longest to the longest context, the growth of (peak - baseline) per prompt
    token, less the cache of a token, against one row of logits (vocabulary x 2 B). Equal within
    2 % fits a peak that holds the logits of every prompt position."""
    first, last = p.contexts[-2:]

    def above(model: str, context: int) -> float:
        both = p.fact("peak_mib", model, context), p.fact("baseline_mib", model, context)
        return (both[0] - both[1]) * MIB

    rest = {
        m: (above(m, last) - above(m, first)) / (last - first) - p.counted(m, "kv_bytes_per_token")
        for m in p.models
    }
    row = {m: 2 * p.counted(m, "vocab_size") for m in p.models}
    models = [m for m in p.models if abs(rest[m] / row[m] - 1) < 0.02]
    if not models:
        return None
    follows = "; ".join(
        f"{m}: beside the cache the peak grows by {rest[m]:,.0f} B a prompt token, a row of logits "
        f"is {row[m]:,} B" + ("" if m in models else " (something else is larger there)")
        for m in sorted(p.models, key=lambda m: m not in models)
    )
    printed = "peak less pre-decode allocation is an estimate of the KV contribution"
    return Finding("caution", "section 3.4", printed, follows, ("kv-larger",))


def realised_parameters(p: Published) -> Finding | None:
    """Throughput over the parameters that the implementation used for a token: where it computes
    every expert, all parameters but the input embedding."""
    source, ref = p.source("all-experts"), p.reference
    claim = [float(x) for x in p.claim("ape-throughput-ratio")["value"]]
    used = (p.counted(ref, "total_params") - p.counted(ref, "lookup_params")) / 1e9
    rate = p.value(8, ref, "APE-TPOT") * p.value(8, ref, "Active (B)")
    ratio = {m: rate / used / p.value(8, m, "APE-TPOT") for m in p.others}
    if claim[0] <= 1.2 * max(ratio.values()):
        return None
    printed = f"{claim[0]:g} to {claim[1]:g} times, on {p.printed(8, ref, 'Active (B)')} x 10^9"
    follows = f"on {used:.2f} x 10^9: {rate / used:.2f} tok/s per 10^9, " + ", ".join(
        f"{r:.1f} times {m}" for m, r in ratio.items()
    )
    follows += f"; {source['text']} ({source['dated']})"
    claims = ("ape-higher", "ape-throughput", "ape-throughput-ratio", "ape-energy-ratio")
    return Finding("caution", "section 4.3, table 8", printed, follows, claims, (source["url"],))


def licences(p: Published) -> Finding | None:
    """The licence of table 13 against the one that the publisher's model card states."""
    stated = {m: p.entry(m)[1].get("governance") or {} for m in p.models}
    rows = p.data["governance"]["rows"]
    off = [m for m in p.models if stated[m] and plain(stated[m]["licence"]) != plain(rows[m][0])]
    if not off:
        return None
    printed = ", ".join(f"{rows[m][0]}, {rows[m][1]} ({m})" for m in off)
    follows = "; ".join(
        f"{stated[m]['licence']}, {stated[m]['class']} ({m}, looked up {stated[m]['date']})"
        for m in off
    )
    sources = tuple(x for m in off for x in stated[m]["source"])
    return Finding("error", "table 13", printed, follows, (), sources)


def governance_source(p: Published) -> Finding | None:
    """Table 13 against the overview among the released files, which it should summarise."""
    rows = p.data["governance"]["rows"]
    off = [
        m
        for m in p.models
        if (p.fact("licence", m), p.fact("licence_class", m)) != tuple(rows[m][:2])
    ]
    if not off:
        return None
    printed = ", ".join(f"{m}: {rows[m][0]}, {rows[m][1]}" for m in off)
    follows = "the released overview says " + ", ".join(
        f"{p.fact('licence', m)}, {p.fact('licence_class', m)} ({m})" for m in off
    )
    return Finding("caution", "table 13", printed, follows)


LATENCY = (
    rate_is_not_tokens_over_p50,
    ttft_is_one_sample,
    mixed_runs,
    prefill_in_throughput,
    decode_gain,
    even_number_of_runs,
    p95_is_the_maximum,
    gpu_is_not_named,
)
ARITHMETIC = (
    claims_follow,
    quotients,
    throughput_falls,
    within_bandwidth,
    last_digits,
)
ENERGY = (
    tokens_per_joule,
    energy_is_time,
    energy_trend,
    prefill_share,
    first_row_is_partly_idle,
)
ABLATIONS = (greedy_baselines_differ, same_arm_twice)
MEMORY = (
    mib_as_mb,
    peak_row,
    kv_contribution,
    held_logits,
    saving_is_size,
)
EFFICIENCY = (efficiency_file, realised_parameters)
GOVERNANCE = (licences, governance_source)
