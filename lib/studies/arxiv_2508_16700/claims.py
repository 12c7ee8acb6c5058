"""The claims of the paper that no form fits, one rule each.

A rule takes the evidence and a claim's name. Its docstring says what is compared; the verdict is
given by `studies.verdict`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from lib import stats
from lib.stats import Estimate
from lib.studies import paper_tables, verdict
from lib.studies.arxiv_2508_16700 import audit
from lib.studies.evidence import (
    NO_STACK,
    STANDS,
    Evidence,
    Map,
    Measured,
    decode_rate,
    lower_pct,
    reading,
)
from lib.studies.forms import METRICS
from lib.studies.study import BYTES

DECODE = METRICS["decode_tok_per_s"]
OWN_RUNS = {"": stats.missing("about the paper's own runs")}
HOST_WORK = {"": stats.missing("not measured: no such arm on a stack that the device bounds")}


def ttft_trials(e: Evidence, name: str) -> Measured:
    """Readings behind most cells of table 3, by the study's released files."""
    single = audit.single_readings(e.published)
    cells = len(e.published.contexts) * len(e.published.models)
    trials = 1 if 2 * len(single) > cells else float(e.published.claimed(name))
    runs = {"": stats.exact(trials, verdict.FILES)}
    return Measured("whole", runs, STANDS, "", OWN_RUNS, alone=True)


def decode_runs(e: Evidence, name: str) -> Measured:
    """Runs of each model, by the study's released files."""
    first = e.published.contexts[0]
    runs = {
        model: stats.exact(e.published.fact("runs", model, first), verdict.FILES)
        for model in e.published.models
    }
    return Measured("whole", runs, STANDS, "", OWN_RUNS, alone=True)


def sampling_cost(e: Evidence, name: str) -> Measured:
    """Loss of output throughput by each sampling method against greedy decoding (%)."""
    return Measured("effect", _sampling(e), STANDS, "", HOST_WORK, neutral=0)


def decoding_spread(e: Evidence, name: str) -> Measured:
    """The largest change that a sampling method makes to output throughput (%)."""
    losses = _sampling(e)
    if reason := next((x.reason for x in losses.values() if x.value is None), ""):
        return Measured("effect", {"": stats.missing(reason)}, STANDS, "", HOST_WORK)
    largest = max(losses, key=lambda label: abs(losses[label].value))
    most = losses[largest]
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
    greedy, *others = e.published.data["tables"][9]["rows"]
    return {label: lower_pct(_table_ratio(e, 9, greedy, label)) for label in others}


def _table_ratio(e: Evidence, table: int, before: str, after: str) -> Estimate:
    """Output throughput of one row of an ablation over that of another, as a ratio."""
    spec = e.published.data["tables"][table]
    series = e.ablation[spec["ablation"]]
    arms = [paper_tables.arm_row(series, spec, label) for label in (before, after)]
    for label, arm in zip((before, after), arms, strict=True):
        if arm is None:
            return stats.missing(series.reason or f"not measured: no row for {label}")
        if arm.error or not arm.samples.get("e2e_s"):
            return stats.missing(f"failed: {arm.error}" if arm.error else "not measured: no e2e_s")
    return stats.ratio(arms[0].samples["e2e_s"], arms[1].samples["e2e_s"])


def decode_degrades(e: Evidence, name: str) -> Measured:
    """Output throughput of each context of table 10 over that of the one before."""
    contexts = e.published.data["tables"][10]["rows"]
    steps = {f"{b} after {a}": _table_ratio(e, 10, a, b) for a, b in pairwise(contexts)}
    ends = (e.published.contexts[-1], e.published.contexts[0])
    label = f"{ends[0]} after {ends[1]}"

    def decode(m: Map) -> dict[str, Estimate]:
        return {label: stats.quotient(*(decode_rate(e, m, e.reference, c) for c in ends))}

    return Measured("time", steps, decode(e.base), DECODE.text, decode(e.bound))


def drop_at_4k(e: Evidence, name: str) -> Measured:
    """Drop of output throughput from the first to the last context of table 10 (%)."""
    labels = list(e.published.data["tables"][10]["rows"])
    first, last = labels[0], labels[-1]
    output = lower_pct(_table_ratio(e, 10, first, last))

    def decode(m: Map) -> dict[str, Estimate]:
        rates = [decode_rate(e, m, e.reference, int(c)) for c in (last, first)]
        return {"": lower_pct(stats.quotient(*rates))}

    return Measured("time", {"": output}, decode(e.base), DECODE.text, decode(e.bound), neutral=0)


def decimal_units(e: Evidence, name: str) -> Measured:
    """Bytes of the measured peak per unit of the printed one, for the dense models."""
    units = {}
    for other in e.others:
        peak = reading(e, e.base, other, "peak_bytes")
        units[other] = stats.scaled(peak, 1 / e.published.value(5, other, audit.PEAK))
    corrected_as = f"MiB of {BYTES['MiB']:,} bytes"
    return Measured("memory", units, STANDS, corrected_as, NO_STACK, alone=True)


def hardware(e: Evidence, name: str) -> Measured:
    """GPUs of the stated family in the study's files: the device's name begins with it."""
    family = e.published.claim(name)["text"].removeprefix("a single ").removesuffix(" GPU")
    gpus = stats.exact(float(str(e.published.fact("gpu")).startswith(family)), verdict.FILES)
    return Measured("whole", {"": gpus}, STANDS, "", OWN_RUNS)


def bf16_only(e: Evidence, name: str) -> Measured:
    """Number formats of table 11, beside the default, whose arm failed."""
    spec, series = e.published.data["tables"][11], e.ablation["precision"]
    labels = list(spec["rows"])
    arms = [paper_tables.arm_row(series, spec, label) for label in labels[1:]]
    if None in arms:
        absent = labels[1 + arms.index(None)]
        failures = stats.missing(series.reason or f"not measured: no {absent} arm")
    else:
        failures = stats.exact(float(sum(bool(arm.error) for arm in arms)), verdict.COUNTED)
    return Measured("whole", {"": failures}, STANDS, "", NO_STACK)


RULES = {
    "ttft-trials": ttft_trials,
    "decode-runs": decode_runs,
    "sampling-cost": sampling_cost,
    "decoding-spread": decoding_spread,
    "decode-degrades": decode_degrades,
    "drop-at-4k": drop_at_4k,
    "decimal-units": decimal_units,
    "hardware": hardware,
    "bf16-only": bf16_only,
}
