"""Rules of the audit about latency and throughput.

A rule takes a study and returns what it found, or None where the study holds. Its docstring is
the rule as the reader sees it.
"""

from __future__ import annotations

from lib import stats
from lib.published import P50, RATE, Published, Verdict, agrees, each, percent

POINTS = 5.0  # percentage points by which a change must differ before it is called another one


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


def rate_is_not_tokens_over_p50(p: Published) -> Verdict | None:
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
    return Verdict("error", "table 1", printed, follows)


def ttft_is_one_sample(p: Published) -> Verdict | None:
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
    return Verdict(
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


def change_mixes_runs(p: Published) -> Verdict | None:
    """Find for both ends of a change the campaign whose released value the cell holds. A change
    between two campaigns is none of context alone."""
    ends, said, follows, claims = (p.contexts[0], p.contexts[-1]), [], [], []
    for m in p.models:
        runs = [campaigns(p, m, c) for c in ends]
        if not all(runs) or set.intersection(*runs):
            continue
        change = p.printed(4, m, "ΔTPOT (%)")
        said.append(f"{change} % ({m}: {p.printed(2, ends[0], m)} to {p.printed(2, ends[1], m)})")
        energy = [p.fact("energy_tok_per_s", m, c) for c in ends]
        follows.append(
            f"{m}: {' and '.join(sorted(runs[0]))} runs at {ends[0]}, "
            f"{' and '.join(sorted(runs[1]))} runs at {ends[1]}; within the latency runs "
            f"{percent(_rate(p, m, ends[1]), _rate(p, m, ends[0])):.1f} %, within the energy runs "
            f"{percent(energy[1], energy[0]):.1f} %"
        )
        claims.append(p.about("drop")[m])
    if not said:
        return None
    return Verdict("error", "tables 2 and 4", "; ".join(said), "; ".join(follows), tuple(claims))


def campaigns(p: Published, model: str, context: int) -> set[str]:
    """Which campaigns a cell of table 2 agrees with: latency, energy, both or none."""
    text = p.printed(2, context, model)
    released = {
        "latency": _rate(p, model, context),
        "energy": p.fact("energy_tok_per_s", model, context),
    }
    return {name for name, exact in released.items() if agrees(text, exact)}


def prefill_in_throughput(p: Published) -> Verdict | None:
    """Decode alone: (longest - shortest generated length) / (difference of their p50), from the
    latency runs at the first and the last context, against the printed change."""
    ends = (p.contexts[-1], p.contexts[0])
    printed = {m: p.value(4, m, "ΔTPOT (%)") for m in p.models}
    decode = {m: percent(*(decode_tok_per_s(p, m, c) for c in ends)) for m in p.models}
    if all(abs(decode[m] - printed[m]) < POINTS for m in p.models):
        return None
    follows = f"decode alone changes by {each(decode, '+.1f', '%')}: what grows with context is "
    follows += "the prefill inside the call"
    text = p.claim("decode-degrades")["text"]
    said = f"{each(printed, '+.1f', '%')} from {ends[1]} to {ends[0]} tokens; {text}"
    claims = ("decode-degrades", *p.about("drop").values())
    return Verdict("caution", "tables 4 and 10", said, follows, claims)


def decode_gain(p: Published) -> Verdict | None:
    """The ratio of decode throughputs (as above, at the headline context) against the ratio of
    output throughputs that the text calls decode throughput."""
    claims, context = p.about("throughput-vs"), p.data["context"]
    rates = {m: decode_tok_per_s(p, m, context) for m in p.models}
    gain = {m: percent(rates[p.reference], rates[m]) for m in claims}
    if all(abs(gain[m] - float(p.claimed(c))) < POINTS for m, c in claims.items()):
        return None
    printed = ", ".join(f"+{p.claimed(c)} % against {m}" for m, c in claims.items())
    follows = f"decode alone {each(rates, '.2f', 'tok/s')}: {each(gain, '+.1f', '%')}; the printed "
    return Verdict(
        "caution",
        "abstract; section 4.2",
        f"decode throughput {printed}",
        follows + "ratio includes prefill",
        tuple(claims.values()),
    )


def p95_is_the_maximum(p: Published) -> Verdict | None:
    """From n runs a 95th percentile is bounded only for n >= 59 (0.95^n < 0.05). Equal p95 and
    p99 in every row mean that both are the largest run."""
    fact = p.data.get("released", {}).get("p95_equals_p99")
    if not fact or fact["value"] < fact["of"]:
        return None
    follows = f"p95 = p99 in {fact['value']} of {fact['of']} released rows: the largest of the runs"
    printed = f"p95 of the call time; {p.claim('decode-runs')['text']}"
    return Verdict("caution", "table 1", printed, follows, ("decode-runs",))


def gpu_is_not_named(p: Published) -> Verdict | None:
    """The hardware as the text names it against the device name in the released files."""
    text, gpu = p.claim("hardware")["text"], p.fact("gpu")
    if gpu in text:
        return None
    follows = f"{gpu} with {p.fact('gpu_total_mib'):,.0f} MiB; the cards of that name differ in "
    return Verdict(
        "note", "section 3.1", text, f"{follows}bandwidth and power limit", ("hardware",)
    )


LATENCY = (
    rate_is_not_tokens_over_p50,
    ttft_is_one_sample,
    change_mixes_runs,
    prefill_in_throughput,
    decode_gain,
    p95_is_the_maximum,
    gpu_is_not_named,
)
