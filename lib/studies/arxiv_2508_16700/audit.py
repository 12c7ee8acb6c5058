"""One rule a kind of inconsistency: latency, energy, ablations, sizes, governance, arithmetic.

A rule takes a study and returns a finding, or None where the study holds. Its docstring is
the rule as the reader sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lib import stats
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
    cells = [(c, m) for c in p.contexts for m in p.models]
    median = {at: p.fact("ttft_median_ms", at[1], at[0]) for at in cells}
    single = single_readings(p)
    if not single:
        return None
    ref = p.reference
    turned = [
        c
        for c in p.contexts
        if p.value(3, c, ref) > max(p.value(3, c, m) for m in p.others)
        and median[c, ref] < min(median[c, m] for m in p.others)
    ]
    source = p.source("one-ttft")
    follows = f"{len(single)} of {len(cells)} cells are the one reading of the energy runs"
    follows += f" ({source['text']}, as of {source['dated']})"
    follows += "".join(
        f"; at {c} the medians are "
        + each({m: median[c, m] for m in p.models}, ".1f", "ms")
        + f", so {ref} answers first, not last"
        for c in turned
    )
    last = p.contexts[-1]
    if median[last, ref] > max(median[last, m] for m in p.others):
        follows += f"; at {last} {ref} is last by the medians too"
    trials = f"median of {p.claimed('ttft-trials')} trials"
    printed = f"{trials}: " + ", ".join(
        f"at {c} " + " / ".join(p.printed(3, c, m) for m in p.models) + " ms" for c in turned
    )
    return Finding(
        "error", "table 3; section 3.3", printed, follows, ("ttft-trials",), (source["url"],)
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


def change_mixes_runs(p: Published) -> Finding | None:
    """Find for both ends of a change the campaign whose released value the cell holds. A change
    between two campaigns is none of context alone."""
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
        claims.append(p.about("drop")[m])
    if not printed:
        return None
    where = "tables 2 and 4"
    return Finding("error", where, "; ".join(printed), "; ".join(follows), tuple(claims))


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
    printed = f"p95 of the call time; {p.claim('decode-runs')['text']}"
    return Finding("caution", "table 1", printed, follows, ("decode-runs",))


def gpu_is_not_named(p: Published) -> Finding | None:
    """The hardware as the text names it against the device name in the released files."""
    text, gpu = p.claim("hardware")["text"], p.fact("gpu")
    if gpu in text:
        return None
    follows = f"{gpu} with {p.fact('gpu_total_mib'):,.0f} MiB; the cards of that name differ in "
    return Finding(
        "note", "section 3.1", text, f"{follows}bandwidth and power limit", ("hardware",)
    )


def parameter_counts(p: Published) -> Finding | None:
    """The stated parameters against those counted on the model card, in 10^9: total and active of
    the model under study, total of the others."""
    counted = {
        "total-params": p.counted(p.reference, "total_params"),
        "active-params": p.counted(p.reference, "active_params"),
    }
    for name, claim in p.data.get("claims", {}).items():
        if name.endswith("-params") and claim.get("model") in p.others:
            counted[name] = p.counted(claim["model"], "total_params")
    off = {name: n / 1e9 for name, n in counted.items() if not agrees(p.claimed(name), n / 1e9)}
    if not off:
        return None
    follows = each(off, ".3f", "x 10^9")
    return Finding("error", "section 3.1", _texts(p, off), follows, tuple(off))


def _texts(p: Published, claims: Iterable[str]) -> str:
    return "; ".join(p.claim(name)["text"] for name in claims)


def percentages(p: Published) -> Finding | None:
    """Each headline percentage recomputed from the table cells that it compares."""
    ref, off = p.reference, []
    for stem, table, column, invert in (
        ("throughput-vs", 1, RATE, False),
        ("energy-vs", 6, JOULES, True),
        ("peak-saving", 5, PEAK, True),
        ("peak-vs", 5, PEAK, True),
    ):
        for m, claim in p.about(stem).items():
            change = percent(p.value(table, ref, column), p.value(table, m, column))
            off += _wrong(p, claim, -change if invert else change)
    ends = (f"TPOT@{p.contexts[-1]}", f"TPOT@{p.contexts[0]}")
    for m, claim in p.about("drop").items():
        off += _wrong(p, claim, -percent(*(p.value(4, m, column) for column in ends)))
    share = 100 * float(p.claimed("active-params")) / float(p.claimed("total-params"))
    off += _wrong(p, "active-share", share)
    if not off:
        return None
    claims, follows = tuple(c for c, _ in off), "; ".join(f"{x:.2f} %" for _, x in off)
    return Finding("error", "abstract; section 4", _texts(p, claims), follows, claims)


def _wrong(p: Published, claim: str, exact: float) -> Sequence[tuple[str, float]]:
    return [] if agrees(p.claimed(claim), exact) else [(claim, exact)]


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


def ranges(p: Published) -> Finding | None:
    """The takeaways of section 4.3 against table 8: the quotients, and the ratios to the other
    models, to within one unit of the last digit printed."""
    off = {}
    for stem, column in (("ape-throughput", "APE-TPOT"), ("ape-energy", "APE-Energy")):
        own, others = p.value(8, p.reference, column), [p.value(8, m, column) for m in p.others]
        exact = {
            stem: [own],
            f"{stem}-dense": sorted(others),
            f"{stem}-ratio": sorted(own / x for x in others),
        }
        for name, values in exact.items():
            value = p.claim(name)["value"]
            texts = value if isinstance(value, list) else [value]
            ends = [values[0], values[-1]][: len(texts)]
            if not all(agrees(text, x) for text, x in zip(texts, ends, strict=True)):
                off[name] = " to ".join(f"{x:.4g}" for x in ends)
    if not off:
        return None
    return Finding("error", "section 4.3, takeaways", _texts(p, off), each(off), tuple(off))


def headline_order(p: Published) -> Finding | None:
    """At the headline arm, against both other models: higher throughput and TTFT (table 1), lower
    J/1K (table 6), lower peak (table 5)."""
    off = {}
    for name, table, column in (
        ("throughput-higher", 1, RATE),
        ("ttft-higher", 1, TTFT),
        ("energy-lower", 6, JOULES),
        ("tokens-per-joule-higher", 6, "Tokens/W"),
        ("peak-lower", 5, PEAK),
    ):
        own, others = p.value(table, p.reference, column), {}
        higher = p.claim(name)["direction"] == "higher"
        for m in p.others:
            if (p.value(table, m, column) >= own) == higher:
                others[m] = p.printed(table, m, column)
        if others:
            off[name] = f"{own:g} against {each(others)}"
    if not off:
        return None
    follows = "; ".join(off.values())
    return Finding("error", "abstract; conclusion", _texts(p, off), follows, tuple(off))


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


def tokens_per_joule_unit(p: Published) -> Finding | None:
    """1000 / (J per 1,000 tokens) is tokens per joule; tokens per watt would also need a time."""
    column = "Tokens/W"
    if p.data["tables"][6]["columns"][column]["unit"] != "tokens/W":
        return None
    exact = {m: 1e3 / p.value(6, m, JOULES) for m in p.models}
    printed = ", ".join(f"{p.printed(6, m, column)} tokens/W ({m})" for m in p.models)
    follows = f"1000 / J/1K = {each(exact, '.4f')}: tokens per joule"
    return Finding("error", "tables 6 and 8", printed, follows, ("ape-energy", "ape-energy-dense"))


def tokens_per_joule_gain(p: Published) -> Finding | None:
    """The gain in tokens per joule is the inverse ratio of J/1K, which is printed with five
    digits; table 6 prints tokens per joule with three."""
    claims, own = p.about("tokens-per-joule-vs"), p.value(6, p.reference, JOULES)
    gain = {m: percent(p.value(6, m, JOULES), own) for m in claims}
    off = {m: c for m, c in claims.items() if not agrees(p.claimed(c), gain[m])}
    if not off:
        return None
    printed = ", ".join(f"+{p.claimed(c)} % against {m}" for m, c in off.items())
    follows = ", ".join(
        f"{p.printed(6, m, JOULES)} / {p.printed(6, p.reference, JOULES)} = {gain[m]:+.1f} % ({m})"
        for m in off
    )
    return Finding(
        "error",
        "section 4.2, findings at 2K",
        printed,
        f"{follows}; printed is the ratio of rounded values",
        tuple(off.values()),
    )


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
    follows += "have at most three decimals, as ten readings of two decimals have"
    return Finding("caution", "table 7", printed, follows, (), (p.source("edge-power")["url"],))


def greedy_baselines_differ(p: Published) -> Finding | None:
    """The greedy baseline of each ablation is one arm (bf16, 64 tokens); its spread is
    (largest - smallest) / median. An effect below it is not resolved."""
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
    follows = f"the greedy run gives {each(rates, '.2f', 'tok/s')}, a spread of {spread:.1f} %; "
    follows += f"the effects are {min(effects):.1f} to {max(effects):.1f} %"
    if contexts == {"None"}:
        follows += "; no context is stated for these tables"
    return Finding(
        "caution",
        "tables 9, 11 and 12",
        p.claim("sampling-cost")["text"],
        follows,
        ("sampling-cost", "decoding-spread"),
    )


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
    """A peak holds at least the weights: parameters x 2 bytes in bfloat16. A printed peak below
    that is not in the unit that is printed."""
    low = [m for m in p.models if p.value(5, m, PEAK) * BYTES["MB"] < p.counted(m, "weight_bytes")]
    if not low:
        return None
    follows = "; ".join(
        f"{m} would peak at {p.value(5, m, PEAK) / 1e3:.2f} GB, below its weights "
        f"({p.counted(m, 'total_params') / 1e9:.2f} x 10^9 parameters, "
        f"{p.counted(m, 'weight_bytes') / 1e9:.2f} GB); read as MiB it is "
        f"{p.value(5, m, PEAK) * MIB / 1e9:.2f} GB"
        for m in low
    )
    printed = "peaks in MB, decimal by section 3.1: " + ", ".join(
        f"{p.value(5, m, PEAK):,.0f} ({m})" for m in p.models
    )
    return Finding("error", "table 5; section 3.1", printed, follows, ("decimal-units",))


def baseline_units(p: Published) -> Finding | None:
    """Compare each stated baseline with the released allocation before the prompt, once in GB
    (MiB x 2^20 / 10^9), once as MiB / 1000. Sizes set side by side must be in one unit."""
    claims = p.about("baseline")
    exact = {m: p.fact("baseline_mib", m, p.data["context"]) for m in claims}
    wrong = [m for m, c in claims.items() if not agrees(p.claimed(c), exact[m] * MIB / 1e9)]
    wrong = [m for m in wrong if agrees(p.claimed(claims[m]), exact[m] / 1e3)]
    if not wrong:
        return None
    printed = ", ".join(f"{p.claimed(c)} GB ({m})" for m, c in claims.items())
    follows = ", ".join(f"{exact[m] * MIB / 1e9:.2f} GB ({m})" for m in claims)
    follows += "; printed as MiB / 1000: " + ", ".join(f"{exact[m] / 1e3:.2f} ({m})" for m in wrong)
    return Finding("error", "section 4.2, findings", printed, follows, tuple(claims.values()))


def gaps_in_gb(p: Published) -> Finding | None:
    """A gap of table 5 times its unit (2^20 bytes), over 10^9, is the gap in decimal GB."""
    claims = p.about("peak-gap")
    exact = {m: p.value(5, m, GAP) * BYTES[p.unit(5, GAP)] / 1e9 for m in claims}
    if all(agrees(p.claimed(c), exact[m]) for m, c in claims.items()):
        return None
    printed = ", ".join(f"{p.claimed(c)} GB less than {m}" for m, c in claims.items())
    follows = ", ".join(
        f"{p.value(5, m, GAP):,.0f} {p.unit(5, GAP)} = {exact[m]:.1f} GB ({m})" for m in claims
    )
    return Finding("error", "section 4.2, findings", printed, follows, tuple(claims.values()))


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
        f"{exact[m] - p.value(5, m, PEAK):+,.2f}"
        for m in off
    )
    follows += f"; the savings become {each(less, '.2f', '%')}, printed "
    follows += each({m: p.printed(5, m, LESS) for m in p.others}, unit="%")
    return Finding("error", "table 5", printed, follows)


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


def throughput_per_gb(p: Published) -> Finding | None:
    """TPOT / peak in decimal GB, as section 3.6 defines it; the peak of table 5 x 2^20 / 10^9."""
    scale = BYTES[p.unit(5, PEAK)] / 1e9
    exact = {m: p.value(1, m, RATE) / (p.value(5, m, PEAK) * scale) for m in p.models}
    if all(agrees(p.printed(8, m, "TPOT/GB"), exact[m]) for m in p.models):
        return None
    printed = ", ".join(f"{p.printed(8, m, 'TPOT/GB')} ({m})" for m in p.models)
    follows = ", ".join(f"{exact[m]:.3f} ({m})" for m in p.models)
    return Finding("error", "table 8", printed, f"{follows}; printed is tok/s per 1,000 MiB")


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
    change_mixes_runs,
    prefill_in_throughput,
    decode_gain,
    p95_is_the_maximum,
    gpu_is_not_named,
)
ARITHMETIC = (
    parameter_counts,
    percentages,
    quotients,
    ranges,
    headline_order,
    throughput_falls,
    within_bandwidth,
    last_digits,
)
ENERGY = (
    tokens_per_joule_unit,
    tokens_per_joule_gain,
    energy_is_time,
    energy_trend,
    prefill_share,
    first_row_is_partly_idle,
)
ABLATIONS = (greedy_baselines_differ, same_arm_twice)
MEMORY = (
    mib_as_mb,
    baseline_units,
    gaps_in_gb,
    peak_row,
    kv_contribution,
    held_logits,
    saving_is_size,
)
EFFICIENCY = (throughput_per_gb, realised_parameters)
GOVERNANCE = (licences, governance_source)
