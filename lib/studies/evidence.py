"""What the verdicts are computed from: a study's printed values, and the rows that test them.

Each model appears up to three times: on the study's stack, with the experts implementation of the
study's software, and on stacks that the device bounds (a captured or compiled step). Quantities of
one model or of a pair are the functions below; what cannot be had is missing with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lib import stats
from lib.analysis import estimators, metrics, physics
from lib.analysis.rows import Rows
from lib.analysis.series import BASE_KINDS, Series, configuration
from lib.hardware.datasheets import datasheet
from lib.models.card import bound_tok_per_s
from lib.records.record import Record, machines_differ, require_comparable
from lib.stacks.registry import STACKS
from lib.stats import Estimate
from lib.studies import verdict
from lib.studies.study import Published, each

Map = dict[str, Series]  # the series of each model, by the study's title
Arm = tuple[int, int]  # context, new tokens
Column = dict[str, Estimate]  # by what each is of, "" where it is of one

# Stacks whose steps the device paces, the fastest first.
DEVICE_BOUND = tuple(name for name, stack in reversed(STACKS.items()) if stack.captured)
ALL_EXPERTS = "all_experts"
OTHER_EXPERTS = "not measured with every expert computed, as the study's software did"
SETUP = ("model", "weights", "dtype", "stack", "experts")
MORE_KINDS = ("memory", "trace", "busy")  # of the same setup as the rows beside the paper's
# Ablations that have a table, and the field that tells the arms of each apart.
ARMS = {"decoding": "decoding", "context": "context", "precision": "dtype", "stack": "stack"}
FREE = ("dtype", "stack")  # of ARMS, those that name a setup


@dataclass(frozen=True)
class Evidence:
    """The study, and the rows of its models by what they were measured on.

    `base` is the study's stack as the library of today runs it. `like_paper` is `base` with the
    study's own model computing every expert for every token, as the study's software did; it is
    `base` where that is no difference. `ablation` and `ablation_like_paper` are such series of the
    study's model by ablation. `stacks` are those that the device bounds, and `bound` the one of
    them, named `bound_stack`, that has the most models. `doubts` are the warnings by row.
    """

    published: Published
    base: Map
    like_paper: Map
    ablation: Map
    ablation_like_paper: Map
    stacks: dict[str, Map]
    bound: Map
    bound_stack: str
    envs: dict[str, dict[str, Any]]
    doubts: dict[str, str]

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

    `protocol` is by the study's protocol, stack and implementation; `today` the same with the
    experts that the library of today computes, empty where that is no difference; `corrected` by
    the definition that `corrected_as` states, and `bound` that on a stack that the device bounds,
    both with the library of today. `quantity` is a key of verdict.TOLERANCES; `neutral` the value
    of no effect, where the claim has a direction. `alone`: each estimate is of the model that it is
    named after, not of it and the study's own. `decodes`: decoding is part of what is timed. `kind`
    is that of the rows of the protocol.
    """

    quantity: str
    protocol: Column
    corrected: Column
    corrected_as: str
    bound: Column
    today: Column = field(default_factory=dict)
    neutral: float | None = None
    alone: bool = False
    decodes: bool = True
    kind: str = "latency"


STANDS = {"": stats.missing("the paper's definition stands")}
NO_STACK = {"": stats.missing("does not depend on the stack")}


def gather(records: Sequence[Record], published: Published) -> Evidence:
    """Sort the rows of the study's models by what they were measured on."""
    data, rows = published.data, Rows.of(records)
    envs, of_title = rows.environments, rows.by_title(data["models"])
    reference = published.reference

    def series(
        title: str,
        kinds: Sequence[str],
        stack: str = data["stack"],
        experts: str = "",
        free: str = "",
    ) -> Series:
        mine = list(of_title[title])
        if experts:  # an ablation's arm is the same call, so that it may stand in for a latency row
            mine = [r for r in mine if r.kind == "card" or r.key.get("experts") == experts]
            mine = [replace(r, kind="latency") if r.kind == "ablation-experts" else r for r in mine]
        setup = data | {"stack": stack}
        return configuration(mine, envs, setup, kinds, (free,) if free in FREE else ())

    def ablations(experts: str = "") -> Map:
        return {
            name: series(reference, (f"ablation-{name}",), experts=experts, free=changed)
            for name, changed in ARMS.items()
        }

    base = {t: _with_more(series(t, BASE_KINDS), rows, envs) for t in published.models}
    like_paper, ablation = base, ablations()
    ablation_like_paper = ablation
    if _experts_differ(base[reference], published):
        own = _with_more(series(reference, (*BASE_KINDS, "trace"), experts=ALL_EXPERTS), rows, envs)
        like_paper = base | {reference: _cards_last(own)}
        ablation_like_paper = {n: _cards_last(s) for n, s in ablations(ALL_EXPERTS).items()}
    if more := _of_engines(ablation["stack"], of_title[reference]):
        for m in (ablation, ablation_like_paper)[: 1 + (ablation_like_paper is not ablation)]:
            m["stack"] = replace(m["stack"], rows=(*m["stack"].rows, *more))
    stacks = {}
    for stack in DEVICE_BOUND:
        none = Series((), f"not measured: no row on stack {stack}")
        of_stack = {t: series(t, BASE_KINDS, stack) for t in published.models}
        stacks[stack] = {
            t: _with_more(s, rows, envs) if s.rows else none for t, s in of_stack.items()
        }
    stack = max(stacks, key=lambda name: sum(map(_timed, stacks[name].values())))
    bound = stacks[stack]
    if not any(s.rows for s in bound.values()):
        reason = f"not measured: no row on a stack that the device bounds ({' or '.join(stacks)})"
        bound, stack = dict.fromkeys(bound, Series((), reason)), ""
    maps = (base, like_paper, ablation, ablation_like_paper, *stacks.values())
    doubts = verdict.doubts(r for m in maps for s in m.values() for r in s.rows)
    return Evidence(
        published,
        base,
        like_paper,
        ablation,
        ablation_like_paper,
        stacks,
        bound,
        stack,
        envs,
        doubts,
    )


def _of_engines(series: Series, rows: Iterable[Record]) -> list[Record]:
    """Rows of an engine at the arm of the stacks, which no notebook of arms can open."""
    arm = next((r for r in series.rows if r.kind != "card"), None)
    same = ("weights", "dtype", "context", "new_tokens", "decoding", "batch")
    return [
        r
        for r in rows
        if arm is not None
        and r.kind == "latency"
        and r.key.get("engine")
        and all(r.key.get(name) == arm.key.get(name) for name in same)
    ]


def _experts_differ(own: Series, published: Published) -> bool:
    """Whether the study's software computed experts that these rows leave out."""
    used = {r.key.get("experts") for r in own.rows} - {None, "none", ALL_EXPERTS}
    return bool(used) and "all-experts" in published.data.get("sources", {})


def _cards_last(own: Series) -> Series:
    """A series whose first row says what ran: a card is of no experts implementation."""
    return Series(tuple(sorted(own.rows, key=lambda r: r.kind == "card")), OTHER_EXPERTS)


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


def _gpu(row: Record | None, envs: Mapping[str, Any]) -> Any:
    return envs.get((row.env_id if row else None) or "", {}).get("gpu")


# --- one model


def memory_floor_share(e: Evidence, m: Map, model: str, context: int) -> Estimate:
    """(all weight bytes + cache bytes) / datasheet bandwidth, over the time of a decode step."""
    card = m[model].one("card")
    if card is None or card.value("kv_bytes_per_token") is None:
        return stats.missing(m[model].reason or "not measured: no model card among the rows")
    size = card.value("weight_bytes") + context * card.value("kv_bytes_per_token")
    return _of_bandwidth(e, m[model], context, size)


def useful_mbu(e: Evidence, m: Map, model: str, context: int) -> Estimate:
    """Bytes that a step must read (of the input embedding one row) in place of all of them."""
    row = m[model].one("latency", context=context)
    if row is None or row.value("decode_bytes") is None:
        return stats.missing(m[model].reason or f"not measured: no latency row at {context} tokens")
    return _of_bandwidth(e, m[model], context, row.value("decode_bytes"))


def _of_bandwidth(e: Evidence, series: Series, context: int, size_bytes: float) -> Estimate:
    """A step's bytes x steps a second / the datasheet's bandwidth."""
    sheet = datasheet(_gpu(next((r for r in series.rows if r.kind != "card"), None), e.envs))
    if not sheet.memory_bytes_per_s:
        return stats.missing(sheet.missing["memory_bytes_per_s"])
    rate = metrics.at("decode", series, context)
    return stats.scaled(rate, size_bytes / sheet.memory_bytes_per_s)


def sessions(e: Evidence, models: Sequence[str]) -> int:
    """Fresh sessions behind the rows of models: days on which one device was used."""
    series = [m[x] for m in (e.base, *e.stacks.values()) for x in models]
    envs = [e.envs.get(r.env_id or "", {}) for s in series for r in s.rows]
    return len({(env.get("gpu_uuid"), env.get("date")) for env in envs if env})


def active(e: Evidence, model: str, *, realised: bool = False) -> Estimate:
    """Active parameters (10^9): by architecture, or as traced in a decode step of today's library.

    A dense model reads all of them, so that nothing needs to be traced.
    """
    card = e.base[model].one("card")
    if not realised or card is None or not card.value("experts"):
        return metrics.at("active", e.base[model], e.arm[0])
    row = traced(e, e.base[model])
    if row is None or row.value("active_params_realised") is None:
        return untold(row, "active_params_realised", "no trace of a decode step")
    return stats.exact(row.value("active_params_realised") / 1e9, verdict.COUNTED)


def total(e: Evidence, model: str) -> Estimate:
    """Total parameters on the model card (10^9)."""
    return estimators.Card("total_params")(e.base[model].rows)


def untold(row: Record | None, name: str, otherwise: str) -> Estimate:
    """Why a row has no such value, by its own words where it says so."""
    why = (row.error or row.missing.get(name)) if row else None
    return stats.missing(f"not measured: {why or otherwise}")


def traced(e: Evidence, series: Series) -> Record | None:
    """The trace at the headline context, else that at another: which experts a step uses does not
    depend on it."""
    return series.one("trace", context=e.arm[0]) or series.one("trace")


def calls_s(e: Evidence, m: Map, model: str) -> tuple[float, float] | None:
    """Median times (s) of one new token and of the headline call."""
    medians = [metrics.at(name, m[model], *e.arm).value for name in ("ttft", "p50")]
    return None if None in medians else (medians[0] / 1e3, medians[1] / 1e3)


def decode_share(e: Evidence, m: Map, model: str) -> float | None:
    """Decode throughput over what a step's bytes allow at this device's copy bandwidth.

    From calls of one length: (new tokens - 1) / (median call - median TTFT).
    """
    row, medians = (
        m[model].one("latency", context=e.arm[0], new_tokens=e.arm[1]),
        calls_s(e, m, model),
    )
    size = row.value("decode_bytes") if row else None
    speed = e.envs.get((row.env_id if row else None) or "", {}).get("copy_bytes_per_s")
    if None in (size, speed, medians) or size < physics.CACHE_BYTES:
        return None
    return (e.arm[1] - 1) / (medians[1] - medians[0]) / bound_tok_per_s(size, speed)


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


# --- two values


def refused(
    e: Evidence, rows: Sequence[Record | None], differ: Sequence[str] = ()
) -> Estimate | None:
    """A missing estimate that says why rows must not be compared; None where they may be."""
    try:
        require_comparable([r for r in rows if r is not None], e.envs, differ=differ)
    except ValueError as error:
        return stats.missing(f"not compared: {error}")
    return None


def quotient(a: Estimate, b: Estimate) -> Estimate:
    """a / b, of the rows of both; exact where both are."""
    ratio = stats.quotient(a, b)
    if ratio.value is not None and {a.method, b.method} <= verdict.EXACT:
        ratio = stats.exact(ratio.value, verdict.QUOTIENT)
    return replace(ratio, records=(*a.records, *b.records))


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of two readings."""
    for side in (a, b):
        if side.value is None:
            return stats.missing(side.reason)
    return replace(
        stats.exact(a.value - b.value, verdict.DIFFERENCE), records=a.records + b.records
    )


def lower_pct(ratio: Estimate) -> Estimate:
    """How much lower a ratio is than 1, in percent: 100 (1 - r)."""
    change = metrics.percent_change(ratio)
    ends = {
        name: None if value is None else -value
        for name, value in (("value", change.value), ("low", change.high), ("high", change.low))
    }
    return replace(change, **ends)
