"""What the verdicts are computed from: a study's printed values, and the rows that test them.

Each model appears up to three times: on the study's stack, on a stack that the device bounds (a
captured or compiled step), and with the experts implementation of the study's software. Quantities
of one model or of a pair are the functions below; what cannot be had is missing with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lib import stats
from lib.analysis import metrics, physics
from lib.analysis.rows import Rows
from lib.analysis.series import BASE_KINDS, Series, configuration, pair_ratio
from lib.hardware.datasheets import datasheet
from lib.models.card import bound_tok_per_s
from lib.records.record import Record, machines_differ, require_comparable, select
from lib.stacks.registry import STACKS
from lib.stats import Estimate
from lib.studies import verdict
from lib.studies.study import Published, each, study

Map = dict[str, Series]  # the series of each model, by the study's title
Arm = tuple[int, int]  # context, new tokens

# Stacks whose steps the device paces, the fastest first.
DEVICE_BOUND = tuple(name for name, stack in reversed(STACKS.items()) if stack.captured)
ALL_EXPERTS = "all_experts"
SETUP = ("model", "weights", "dtype", "stack", "experts")
MORE_KINDS = ("memory", "trace", "busy")  # of the same setup as the rows beside the paper's


@dataclass(frozen=True)
class Evidence:
    """The study, and the rows of its models by what they were measured on.

    `base` is the study's stack; `stacks` are those that the device bounds, and `bound` the one of
    them, named `bound_stack`, that has the most models; `like_paper` is `base` with the study's own
    model computing every expert for every token; `ablation` is by ablation.
    """

    published: Published
    base: Map
    stacks: dict[str, Map]
    bound: Map
    bound_stack: str
    like_paper: Map
    ablation: Map
    envs: dict[str, dict[str, Any]]

    @property
    def arm(self) -> Arm:
        """Context and new tokens of the study's headline."""
        return self.published.data["context"], self.published.data["new_tokens"]

    @property
    def reference(self) -> str:
        """The model that the study is about."""
        return self.published.reference

    @property
    def others(self) -> list[str]:
        """The models that it is compared with."""
        return self.published.others


@dataclass(frozen=True)
class Measured:
    """What the rule of a claim computes, each estimate by what it is of ("" where it is of one).

    `protocol` is by the study's protocol and stack, `corrected` by the definition that
    `corrected_as` states, `bound` the corrected one on a stack that the device bounds, and
    `like_paper` the protocol's with every expert computed. `quantity` is a key of
    verdict.TOLERANCES; `neutral` the value of no effect, where the claim has a direction. `alone`:
    each estimate is of the model that it is named after, not of it and the study's own. `decodes`:
    decoding is part of what is timed. `kind` is that of the rows of the protocol.
    """

    quantity: str
    protocol: dict[str, Estimate]
    corrected: dict[str, Estimate]
    corrected_as: str
    bound: dict[str, Estimate]
    like_paper: dict[str, Estimate] = field(default_factory=dict)
    neutral: float | None = None
    alone: bool = False
    decodes: bool = True
    kind: str = "latency"


STANDS = {"": stats.missing("the paper's definition stands")}
# Metrics of energy, by the sample that they are computed from.
J_PER_1K = {"energy_j": "j_per_1k", "paper_energy_j": "j_per_1k_paper"}
NO_STACK = {"": stats.missing("does not depend on the stack")}


def gather(records: Sequence[Record], published: Published) -> Evidence:
    """Sort the rows of the study's models into the three setups."""
    data = published.data
    groups = study(records, data)
    envs = groups.environments
    of_title = Rows.of(records).by_title(data["models"])

    def on_stack(title: str, stack: str, experts: str | None = None) -> Series:
        rows = [r for r in of_title[title] if experts in (None, r.key.get("experts"))]
        if experts:  # an ablation's arm is the same call, so that it may stand in for a latency row
            rows = [replace(r, kind="latency") if r.kind == "ablation-experts" else r for r in rows]
        kinds = (*BASE_KINDS, "trace") if experts else BASE_KINDS
        return _with_more(configuration(rows, envs, data | {"stack": stack}, kinds), records, envs)

    base = {t: _with_more(s, records, envs) for t, s in groups.base.items()}
    stacks = {stack: {t: on_stack(t, stack) for t in published.models} for stack in DEVICE_BOUND}
    stacks = {
        stack: {
            t: s if s.rows else Series((), f"not measured: no row on stack {stack}")
            for t, s in m.items()
        }
        for stack, m in stacks.items()
    }
    stack = max(stacks, key=lambda name: sum(map(_timed, stacks[name].values())))
    bound = stacks[stack]
    if not any(s.rows for s in bound.values()):
        reason = f"not measured: no row on a stack that the device bounds ({' or '.join(stacks)})"
        bound, stack = dict.fromkeys(bound, Series((), reason)), ""
    own = on_stack(published.reference, data["stack"], ALL_EXPERTS)
    if not own.rows:
        own = Series((), f"not measured: no row with experts {ALL_EXPERTS}")
    like_paper = base | {published.reference: own}
    return Evidence(published, base, stacks, bound, stack, like_paper, groups.ablation, envs)


def _with_more(series: Series, records: Sequence[Record], envs: dict) -> Series:
    """The series and the rows of other kinds that share its GPU and setup."""
    own = next((r for r in series.rows if r.kind != "card"), None)
    if own is None:
        return series
    one_sequence = [r for r in records if r.kind in MORE_KINDS and r.key.get("batch") in (1, None)]
    more = [
        r
        for r in one_sequence
        if r not in series.rows
        and _gpu(r, envs) == _gpu(own, envs)
        and all(r.key.get(f) == own.key.get(f) for f in SETUP)
    ]
    return replace(series, rows=(*series.rows, *more))


def _timed(series: Series) -> bool:
    return any(r.kind != "card" and not r.error for r in series.rows)


def _gpu(row: Record, envs: dict) -> Any:
    return envs.get(row.env_id or "", {}).get("gpu")


# --- one model


def output_rate(e: Evidence, m: Map, model: str) -> Estimate:
    """Output throughput of the headline arm (tok/s), prefill included."""
    return metrics.at("output", m[model], *e.arm)


def decode_rate(e: Evidence, m: Map, model: str, context: int | None = None) -> Estimate:
    """Decode throughput (tok/s): the inverse slope of call time over new tokens."""
    return series_rate(m[model], e.arm[0] if context is None else context)


def series_rate(series: Series, context: int) -> Estimate:
    """Decode throughput of a series at one context (tok/s)."""
    if not series.rows:
        return stats.missing(series.reason)
    rows = select(series.rows, "latency", context=context)
    return metrics.decode_tok_per_s([r for r in rows if not r.error])


def decode_step_ms(series: Series, context: int, envs: Mapping[str, Any]) -> Estimate:
    """Time of a decode step (ms): the inverse of decode throughput."""
    return stats.inverse(series_rate(series, context), 1e3)


def memory_floor_share(series: Series, context: int, envs: Mapping[str, Any]) -> Estimate:
    """(all weight bytes + cache bytes) / datasheet bandwidth, over the time of a decode step."""
    card = series.one("card")
    if card is None or card.value("kv_bytes_per_token") is None:
        return stats.missing(series.reason or "not measured: no model card among the rows")
    size = card.value("weight_bytes") + context * card.value("kv_bytes_per_token")
    return _of_bandwidth(series, context, envs, size)


def useful_mbu(series: Series, context: int, envs: Mapping[str, Any]) -> Estimate:
    """Bytes that a step must read (of the input embedding one row) in place of all of them."""
    row = next((r for r in select(series.rows, "latency", context=context)), None)
    if row is None or row.value("decode_bytes") is None:
        return stats.missing(series.reason or f"not measured: no latency row at {context} tokens")
    return _of_bandwidth(series, context, envs, row.value("decode_bytes"))


def _of_bandwidth(
    series: Series, context: int, envs: Mapping[str, Any], size_bytes: float
) -> Estimate:
    """A step's bytes x steps a second / the datasheet's bandwidth."""
    row = next((r for r in series.rows if r.kind != "card"), None)
    gpu = envs.get((row.env_id if row else None) or "", {}).get("gpu")
    sheet = datasheet(gpu)
    if not sheet.memory_bytes_per_s:
        return stats.missing(sheet.missing["memory_bytes_per_s"])
    return stats.scaled(series_rate(series, context), size_bytes / sheet.memory_bytes_per_s)


def device_busy_share(series: Series, context: int, envs: Mapping[str, Any]) -> Estimate:
    """Time for which a profiled decode step kept the device busy, over the step's time."""
    row, rate = series.one("busy", context=context), series_rate(series, context)
    if row is None or row.value("decode_busy_s") is None:
        why = row.error or row.missing.get("decode_busy_s") if row else ""
        return stats.missing(f"not measured: {why or f'no busy row at {context} tokens'}")
    return stats.scaled(rate, row.value("decode_busy_s"))


def sessions(e: Evidence, models: Sequence[str]) -> int:
    """Fresh sessions behind the rows of models: days on which one device was used."""
    series = [m[x] for m in (e.base, *e.stacks.values()) for x in models]
    envs = [e.envs.get(r.env_id or "", {}) for s in series for r in s.rows]
    return len({(env.get("gpu_uuid"), env.get("date")) for env in envs if env})


def ttft_s(e: Evidence, m: Map, model: str) -> Estimate:
    """Median time of one new token at the headline context (s)."""
    return stats.scaled(metrics.at("ttft", m[model], *e.arm), 1e-3)


def joules_per_1k(e: Evidence, m: Map, model: str, name: str = "energy_j") -> Estimate:
    """J per 1,000 generated tokens: by the counter, or by the study's estimator of readings."""
    return metrics.at(J_PER_1K[name], m[model], *e.arm)


def reading(e: Evidence, m: Map, model: str, name: str, kind: str = "memory-paper") -> Estimate:
    """One reading of the allocator at the headline arm (bytes); "above" is peak less baseline."""
    if not m[model].rows:
        return stats.missing(m[model].reason)
    row = m[model].one(kind, context=e.arm[0], new_tokens=e.arm[1])
    if row is None or row.error:
        return stats.missing(f"failed: {row.error}" if row else f"not measured: no {kind} row")
    names = ("peak_bytes", "baseline_bytes") if name == "above" else (name,)
    values = [row.value(n) for n in names]
    if None in values:
        return stats.missing(f"not measured: {row.missing.get(names[0], f'no {name}')}")
    return stats.exact(values[0] - sum(values[1:]), verdict.READING)


def active(e: Evidence, model: str, *, realised: bool = False) -> Estimate:
    """Active parameters: by architecture, or as traced in a decode step of the study's stack.

    A dense model reads all of them, so that nothing needs to be traced.
    """
    series = e.base[model]
    card = series.one("card")
    if card is None or card.value("active_params") is None:
        return stats.missing("not measured: no model card among the rows")
    if not realised or not card.value("experts"):
        return stats.exact(card.value("active_params"), verdict.COUNTED)
    row = traced(e, series)
    if row is None or row.value("active_params_realised") is None:
        return untold(row, "active_params_realised", "no trace of a decode step")
    return stats.exact(row.value("active_params_realised"), verdict.COUNTED)


def total(e: Evidence, model: str) -> Estimate:
    """Total parameters on the model card (10^9)."""
    card = e.base[model].one("card")
    if card is None:
        return stats.missing("not measured: no model card among the rows")
    return stats.exact(card.values["total_params"] / 1e9, verdict.COUNTED)


def untold(row: Record | None, name: str, otherwise: str) -> Estimate:
    """Why a row has no such value, by its own words where it says so."""
    why = (row.error or row.missing.get(name)) if row else None
    return stats.missing(f"not measured: {why or otherwise}")


def traced(e: Evidence, series: Series) -> Record | None:
    """The trace at the headline context, else that at another: which experts a step uses does not
    depend on it."""
    return series.one("trace", context=e.arm[0]) or series.one("trace")


def decode_share(e: Evidence, m: Map, model: str) -> float | None:
    """Decode throughput over what a step's bytes allow at this device's copy bandwidth.

    From calls of one length: (new tokens - 1) / (median call - median TTFT).
    """
    row = m[model].one("latency", context=e.arm[0], new_tokens=e.arm[1])
    first, whole = ttft_s(e, m, model), stats.inverse(output_rate(e, m, model), e.arm[1])
    size = row.value("decode_bytes") if row else None
    speed = e.envs.get((row.env_id if row else None) or "", {}).get("copy_bytes_per_s")
    if None in (size, speed, first.value, whole.value) or size < physics.CACHE_BYTES:
        return None
    rate = (e.arm[1] - 1) / (whole.value - first.value)
    return rate / bound_tok_per_s(size, speed)


def machines(
    e: Evidence, subjects: Sequence[tuple[Map, str]], arm: Arm | None = None, kind: str = "latency"
) -> str:
    """Where models were measured on different machines: how fast the hosts of their arms are."""
    context, tokens = arm or e.arm
    rows = {model: m[model].one(kind, context=context, new_tokens=tokens) for m, model in subjects}
    rows = {model: row for model, row in rows.items() if row}
    if not machines_differ(rows.values(), e.envs):
        return ""
    speeds = {m: e.envs[r.env_id].get("host_score_per_s") for m, r in rows.items()}
    texts = {m: f"{speed:.1f}" for m, speed in speeds.items() if speed}
    hosts = f", whose hosts do {each(texts)} million loops a second" if texts else ""
    return f"the models were measured on different machines{hosts}"


# --- the study's model against another


def sample_ratio(
    e: Evidence, m: Map, other: str, kind: str, name: str, arm: Arm | None = None
) -> Estimate:
    """Median of the study's model over that of another, with a bootstrap interval."""
    pair = (m[e.reference], m[other])
    return pair_ratio(pair, e.envs, kind, name, arm or e.arm)


def output_ratio(e: Evidence, m: Map, other: str, arm: Arm | None = None) -> Estimate:
    """Ratio of output throughputs: the inverse ratio of call times."""
    pair = (m[other], m[e.reference])
    return pair_ratio(pair, e.envs, "latency", "e2e_s", arm or e.arm)


def decode_ratio(e: Evidence, m: Map, other: str) -> Estimate:
    """Ratio of decode throughputs; the interval spans the ends of both slopes'."""
    return compared(e, m, other, partial(decode_rate, e, m))


def compared(e: Evidence, m: Map, other: str, of: Any) -> Estimate:
    """of(the study's model) / of(other), refused where the rows are not comparable."""
    pair = [of(e.reference), of(other)]
    if reason := next((x.reason for x in pair if x.value is None), ""):
        return stats.missing(reason)
    try:
        rows = [next(r for r in m[t].rows if r.kind != "card") for t in (e.reference, other)]
        require_comparable(rows, e.envs)
    except ValueError as error:
        return stats.missing(f"not compared: {error}")
    ratio = stats.quotient(*pair)
    if all(x.method in verdict.EXACT for x in pair):
        return replace(ratio, method=verdict.QUOTIENT)
    return ratio


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of two readings."""
    for side in (a, b):
        if side.value is None:
            return stats.missing(side.reason)
    return stats.exact(a.value - b.value, verdict.DIFFERENCE)


def lower_pct(ratio: Estimate) -> Estimate:
    """How much lower a ratio is than 1, in percent: 100 (1 - r)."""
    change = metrics.percent_change(ratio)
    ends = {
        name: None if value is None else -value
        for name, value in (("value", change.value), ("low", change.high), ("high", change.low))
    }
    return replace(change, **ends)
