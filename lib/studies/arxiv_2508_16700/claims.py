"""The claims of the paper that no form fits, one rule each.

A rule takes the evidence and a claim's name. Its docstring says what is compared; the verdict is
given by `studies.verdict`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from lib import stats
from lib.stats import Estimate
from lib.studies import paper_tables, verdict
from lib.studies.arxiv_2508_16700 import audit
from lib.studies.evidence import NO_STACK, STANDS, Column, Evidence, Map, Measured, lower_pct
from lib.studies.forms import DECODE, METRICS
from lib.studies.study import BYTES

OWN_RUNS = {"": stats.missing("about the paper's own runs")}
HOST_WORK = {"": stats.missing("not measured: no such arm on a stack that the device bounds")}
TYPES = ("scalar type", "dtype")  # what an error says that is about the number format


def _of_ablations(e: Evidence, of: Callable[[Evidence, Map], Column]) -> dict[str, Column]:
    """What ablations show, with the experts of the study's software and with those of today."""
    protocol = of(e, e.ablation_like_paper)
    differs = e.ablation_like_paper is not e.ablation
    return {"protocol": protocol, "today": of(e, e.ablation) if differs else {}}


def ttft_trials(e: Evidence, name: str) -> Measured:
    """Readings behind most cells of table 3, by the study's released files."""
    single = audit.single_readings(e.published)
    cells = len(e.published.contexts) * len(e.published.models)
    trials = 1 if 2 * len(single) > cells else float(e.published.claimed(name))
    runs = {"": stats.exact(trials, verdict.FILES)}
    return Measured("whole", runs, STANDS, "", OWN_RUNS, alone=True)


def decode_runs(e: Evidence, name: str) -> Measured:
    """Runs behind a p50 of the latency files, by the authors' command, if every row has an even
    number of them as that command has; the released rows alone tell no more."""
    even, rows = audit.even_rows(e.published)
    source = e.published.source("latency-runs")
    runs = stats.missing(f"{even} of {rows} released rows show an even number of runs")
    if even == rows and source["runs"] % 2 == 0:
        runs = stats.exact(float(source["runs"]), verdict.FILES)
    return Measured("whole", {"": runs}, STANDS, "", OWN_RUNS, alone=True)


def sampling_cost(e: Evidence, name: str) -> Measured:
    """Loss of output throughput by each sampling method against greedy decoding (%)."""
    columns = _of_ablations(e, _losses)
    return Measured(
        "effect", corrected=STANDS, corrected_as="", bound=HOST_WORK, neutral=0, **columns
    )


def decoding_spread(e: Evidence, name: str) -> Measured:
    """The largest change that a sampling method makes to output throughput (%)."""
    columns = _of_ablations(e, lambda e, m: _largest(_losses(e, m)))
    return Measured("effect", corrected=STANDS, corrected_as="", bound=HOST_WORK, **columns)


def _losses(e: Evidence, m: Map) -> Column:
    """Table 9: the loss of each row against the first, greedy one."""
    greedy, *others = e.published.data["tables"][9]["rows"]
    return {label: lower_pct(_table_ratio(e, m, 9, greedy, label)) for label in others}


def _largest(losses: Column) -> Column:
    if reason := next((x.reason for x in losses.values() if x.value is None), ""):
        return {"": stats.missing(reason)}
    largest = max(losses, key=lambda label: abs(losses[label].value))
    most = losses[largest]
    if most.value < 0:  # a gain is as much a variation as a loss
        low, high = (None if end is None else -end for end in (most.high, most.low))
        most = replace(most, value=-most.value, low=low, high=high)
    return {largest: most}


def _table_ratio(e: Evidence, m: Map, table: int, before: str, after: str) -> Estimate:
    """Output throughput of one row of an ablation over that of the one before."""
    spec = e.published.data["tables"][table]
    return paper_tables.arm_ratio(m[spec["ablation"]], spec, after, before)


def decode_degrades(e: Evidence, name: str) -> Measured:
    """Output throughput of each context of table 10 over that of the one before."""
    contexts = e.published.data["tables"][10]["rows"]

    def steps(e: Evidence, m: Map) -> Column:
        return {f"{b} after {a}": _table_ratio(e, m, 10, a, b) for a, b in pairwise(contexts)}

    last, first = e.published.contexts[-1], e.published.contexts[0]

    def decode(m: Map) -> Column:
        ratio = DECODE.over(e, (m, e.reference, last), (m, e.reference, first))
        return {f"{last} after {first}": ratio}

    columns = _of_ablations(e, steps)
    own = {"corrected": decode(e.base), "corrected_as": DECODE.text, "bound": decode(e.bound)}
    return Measured("time", **columns, **own)


def drop_at_4k(e: Evidence, name: str) -> Measured:
    """Drop of output throughput from the first to the last context of table 10 (%)."""
    labels = list(e.published.data["tables"][10]["rows"])
    first, last = labels[0], labels[-1]

    def decode(m: Map) -> Column:
        places = ((m, e.reference, int(context)) for context in (last, first))
        return {"": lower_pct(DECODE.over(e, *places))}

    columns = _of_ablations(e, lambda e, m: {"": lower_pct(_table_ratio(e, m, 10, first, last))})
    own = {"corrected": decode(e.base), "corrected_as": DECODE.text, "bound": decode(e.bound)}
    return Measured("time", **columns, **own, neutral=0)


def decimal_units(e: Evidence, name: str) -> Measured:
    """Bytes of the measured peak per unit of the printed one, for the dense models."""
    units = {}
    for other in e.others:
        peak = METRICS["peak_gb"].at(e, e.base, other)
        units[other] = stats.scaled(peak, 1e9 / e.published.value(5, other, audit.PEAK))
    corrected_as = f"MiB of {BYTES['MiB']:,} bytes"
    return Measured("memory", units, STANDS, corrected_as, NO_STACK, alone=True)


def hardware(e: Evidence, name: str) -> Measured:
    """GPUs of the stated family in the study's files: the device's name begins with it."""
    family = e.published.claim(name)["text"].removeprefix("a single ").removesuffix(" GPU")
    gpus = stats.exact(float(str(e.published.fact("gpu")).startswith(family)), verdict.FILES)
    return Measured("whole", {"": gpus}, STANDS, "", OWN_RUNS)


def bf16_only(e: Evidence, name: str) -> Measured:
    """Number formats of table 11, beside the default, whose arm failed for its type; one that
    failed for another reason, such as memory, may or may not be among them."""
    columns = _of_ablations(e, _failures)
    return Measured("whole", corrected=STANDS, corrected_as="", bound=NO_STACK, **columns)


def _failures(e: Evidence, m: Map) -> Column:
    spec, series = e.published.data["tables"][11], m["precision"]
    labels = list(spec["rows"])
    arms = [paper_tables.arm_row(series, spec, label) for label in labels[1:]]
    if None in arms:
        absent = labels[1 + arms.index(None)]
        return {"": stats.missing(series.reason or f"not measured: no {absent} arm")}
    failed = [arm.error for arm in arms if arm.error]
    typed = sum(any(word in error for word in TYPES) for error in failed)
    if typed == len(failed):
        return {"": stats.exact(float(typed), verdict.COUNTED)}
    other = next(error for error in failed if not any(word in error for word in TYPES))
    reason = f"an arm failed, and not for its type: {other}"
    return {"": Estimate(typed, typed, len(failed), len(arms), "bounds of a count", reason)}


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
