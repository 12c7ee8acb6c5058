"""Rules of the claims about latency and throughput.

A rule takes the evidence and a claim's name, and returns what was measured for it. Its docstring
says what is compared; the verdict is given by lib.judge.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from lib import auditlatency, judge, papertables, stats
from lib.analysis import metrics as rules
from lib.analysis import series as analysis_series
from lib.evidence import (
    STANDS,
    Evidence,
    Map,
    Measured,
    decode_rate,
    decode_ratio,
    lower_pct,
    output_rate,
    output_ratio,
    sample_ratio,
    ttft_s,
)
from lib.stats import Estimate

DECODE = "decode throughput: the inverse slope of call time over new tokens, prefill left out"
MEDIAN = "median of 6 repetitions or more with its interval; the paper prints single readings"
OWN_RUNS = {"": stats.missing("about the paper's own runs")}
HOST_WORK = {"": stats.missing("not measured: no such arm on a stack that the device bounds")}


def throughput_higher(e: Evidence, name: str) -> Measured:
    """Output throughput over that of each other model."""

    def output(m: Map) -> dict[str, Estimate]:
        return {o: output_ratio(e, m, o) for o in e.others}

    def decode(m: Map) -> dict[str, Estimate]:
        return {o: decode_ratio(e, m, o) for o in e.others}

    return Measured(
        "time", output(e.base), decode(e.base), DECODE, decode(e.bound), output(e.like_paper)
    )


def throughput_gain(e: Evidence, name: str) -> Measured:
    """Gain in output throughput over the claim's model (%)."""
    other = e.published.claim(name)["model"]

    def output(m: Map) -> dict[str, Estimate]:
        return {other: rules.percent_change(output_ratio(e, m, other))}

    def decode(m: Map) -> dict[str, Estimate]:
        return {other: rules.percent_change(decode_ratio(e, m, other))}

    return Measured(
        "time",
        output(e.base),
        decode(e.base),
        DECODE,
        decode(e.bound),
        output(e.like_paper),
        neutral=0,
    )


def ttft_higher(e: Evidence, name: str) -> Measured:
    """TTFT at the headline context over that of each other model."""

    def ttft(m: Map) -> dict[str, Estimate]:
        arm = (e.arm[0], 1)
        return {o: sample_ratio(e, m, o, "latency", "ttft_s", arm) for o in e.others}

    return Measured(
        "time", ttft(e.base), ttft(e.base), MEDIAN, ttft(e.bound), ttft(e.like_paper), decodes=False
    )


def slows_with_context(e: Evidence, name: str) -> Measured:
    """Throughput at the longest context over that at the shortest, for each model."""
    return _over_contexts(e, list(e.published.models), lambda ratio: ratio)


def drop(e: Evidence, name: str) -> Measured:
    """Drop of throughput from the shortest to the longest context (%), of the claim's model."""
    measured = _over_contexts(e, [e.published.claim(name)["model"]], lower_pct)
    return replace(measured, neutral=0)


def _over_contexts(e: Evidence, models: list[str], shown) -> Measured:
    first, last = e.published.contexts[0], e.published.contexts[-1]

    def output(m: Map) -> dict[str, Estimate]:
        return {x: shown(_output_over(m, x, (first, last), e.arm[1])) for x in models}

    def decode(m: Map) -> dict[str, Estimate]:
        rates = {x: [decode_rate(e, m, x, c) for c in (last, first)] for x in models}
        return {x: shown(stats.quotient(*pair)) for x, pair in rates.items()}

    own = output(e.like_paper) if e.reference in models else {}
    return Measured(
        "time", output(e.base), decode(e.base), DECODE, decode(e.bound), own, alone=True
    )


def _output_over(m: Map, model: str, contexts: tuple[int, int], tokens: int) -> Estimate:
    """Output throughput at the second context over that at the first: inverse ratio of times."""
    pair = [analysis_series.samples(m[model], "latency", "e2e_s", c, tokens) for c in contexts]
    if reason := next((why for values, why in pair if not values), ""):
        return stats.missing(reason)
    return stats.ratio(pair[0][0], pair[1][0])


def prefill_dominates(e: Evidence, name: str) -> Measured:
    """Prefill over decode in one call: TTFT / (call - TTFT), for each model."""

    def shares(m: Map) -> dict[str, Estimate]:
        found = {}
        for model in e.published.models:
            whole_s = stats.inverse(output_rate(e, m, model), e.arm[1])
            share = stats.quotient(ttft_s(e, m, model), whole_s)
            found[model] = _odds(share)
        return found

    def against_slope(m: Map) -> dict[str, Estimate]:
        found = {}
        for model in e.published.models:
            decode_s = stats.inverse(decode_rate(e, m, model), e.arm[1])
            found[model] = stats.quotient(ttft_s(e, m, model), decode_s)
        return found

    as_said = "TTFT over new tokens / decode throughput"
    return Measured(
        "time",
        shares(e.base),
        against_slope(e.base),
        as_said,
        against_slope(e.bound),
        shares(e.like_paper),
        alone=True,
    )


def _odds(share: Estimate) -> Estimate:
    """s / (1 - s): a part over the rest. Missing where an end is the whole or more."""
    ends = {name: getattr(share, name) for name in ("value", "low", "high")}
    if any(x is not None and x >= 1 for x in ends.values()):
        return stats.missing("not resolved: the interval of the first token reaches the whole call")
    return replace(share, **{k: None if x is None else x / (1 - x) for k, x in ends.items()})


def ttft_trials(e: Evidence, name: str) -> Measured:
    """Readings behind most cells of table 3, by the study's released files."""
    single = auditlatency.single_readings(e.published)
    cells = len(e.published.contexts) * len(e.published.models)
    trials = 1 if 2 * len(single) > cells else float(e.published.claimed(name))
    found = {"": stats.exact(trials, judge.FILES)}
    return Measured("whole", found, STANDS, "", OWN_RUNS, alone=True)


def decode_runs(e: Evidence, name: str) -> Measured:
    """Runs of each model, by the study's released files."""
    first = e.published.contexts[0]
    found = {
        model: stats.exact(e.published.fact("runs", model, first), judge.FILES)
        for model in e.published.models
    }
    return Measured("whole", found, STANDS, "", OWN_RUNS, alone=True)


def sampling_cost(e: Evidence, name: str) -> Measured:
    """Loss of output throughput by each sampling method against greedy decoding (%)."""
    found = _sampling(e)
    return Measured("effect", found, STANDS, "", HOST_WORK, neutral=0)


def decoding_spread(e: Evidence, name: str) -> Measured:
    """The largest change that a sampling method makes to output throughput (%)."""
    found = _sampling(e)
    if reason := next((x.reason for x in found.values() if x.value is None), ""):
        return Measured("effect", {"": stats.missing(reason)}, STANDS, "", HOST_WORK)
    largest = max(found, key=lambda label: abs(found[label].value))
    most = found[largest]
    if most.value < 0:  # a gain is as much a variation as a loss
        ends = (most.high, most.low)
        most = replace(
            most,
            value=-most.value,
            low=None if ends[0] is None else -ends[0],
            high=None if ends[1] is None else -ends[1],
        )
    return Measured("effect", {largest: most}, STANDS, "", HOST_WORK)


def _sampling(e: Evidence) -> dict[str, Estimate]:
    """Table 9: the loss of each row against the first, greedy one."""
    series, labels = e.ablation["decoding"], list(e.published.data["tables"][9]["rows"])
    return {label: lower_pct(_table_ratio(series, 9, labels[0], label)) for label in labels[1:]}


def _table_ratio(series: analysis_series.Series, table: int, before: str, after: str) -> Estimate:
    """Output throughput of one row of an ablation over that of another, as a ratio."""
    arms = [papertables.arm_row(series, table, label) for label in (before, after)]
    for label, arm in zip((before, after), arms, strict=True):
        if arm is None:
            return stats.missing(series.reason or f"not measured: no row for {label}")
        if arm.error or not arm.samples.get("e2e_s"):
            return stats.missing(f"failed: {arm.error}" if arm.error else "not measured: no e2e_s")
    return stats.ratio(arms[0].samples["e2e_s"], arms[1].samples["e2e_s"])


def decode_degrades(e: Evidence, name: str) -> Measured:
    """Output throughput of each context of table 10 over that of the one before."""
    series, labels = e.ablation["context"], list(e.published.data["tables"][10]["rows"])
    found = {f"{b} after {a}": _table_ratio(series, 10, a, b) for a, b in pairwise(labels)}
    ends = (e.published.contexts[-1], e.published.contexts[0])
    label = f"{ends[0]} after {ends[1]}"

    def decode(m: Map) -> dict[str, Estimate]:
        return {label: stats.quotient(*(decode_rate(e, m, e.reference, c) for c in ends))}

    return Measured("time", found, decode(e.base), DECODE, decode(e.bound))


def drop_at_4k(e: Evidence, name: str) -> Measured:
    """Drop of output throughput from the first to the last context of table 10 (%)."""
    labels = list(e.published.data["tables"][10]["rows"])
    first, last = labels[0], labels[-1]
    found = lower_pct(_table_ratio(e.ablation["context"], 10, first, last))

    def decode(m: Map) -> dict[str, Estimate]:
        rates = [decode_rate(e, m, e.reference, int(c)) for c in (last, first)]
        return {"": lower_pct(stats.quotient(*rates))}

    return Measured("time", {"": found}, decode(e.base), DECODE, decode(e.bound), neutral=0)


SPEED = {
    "throughput-higher": throughput_higher,
    "ahead-at-2k": throughput_higher,
    "throughput-vs-qwen": throughput_gain,
    "throughput-vs-yi": throughput_gain,
    "ttft-higher": ttft_higher,
    "slows-with-context": slows_with_context,
    "drop-gpt-oss": drop,
    "drop-qwen": drop,
    "drop-yi": drop,
    "prefill-dominates": prefill_dominates,
    "ttft-trials": ttft_trials,
    "decode-runs": decode_runs,
    "sampling-cost": sampling_cost,
    "decoding-spread": decoding_spread,
    "decode-degrades": decode_degrades,
    "drop-at-4k": drop_at_4k,
}
