"""The metrics that claims and printed tables may name, and the forms in which a claim is tested.

A metric is a thin reference to `analysis.metrics`, or what only a study asks for. A claim's entry
names its `metric`, the `corrected` one, and that of the column on a stack which the device bounds
(`bound`, else `corrected`). The form says what is compared: one model's value, the study's model
against others (or contexts, or stacks, by `over`), or steps from context to context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from lib import stats
from lib.analysis import estimators, metrics
from lib.analysis.estimators import MIB
from lib.analysis.series import samples
from lib.files import unknown
from lib.records.record import Record
from lib.stats import Estimate
from lib.studies import evidence, verdict
from lib.studies.evidence import (
    NO_STACK,
    STANDS,
    Column,
    Evidence,
    Map,
    Measured,
    active,
    difference,
    lower_pct,
    quotient,
    total,
)
from lib.studies.schema import Claim, Test

Of = Callable[[Evidence, Map, str, int], Estimate]  # of one model at a context
Place = tuple[Map, str, int]  # series, model, context
Over = Callable[[Evidence, Place, Place, Sequence[str]], Estimate]
TRACED = "per parameter that a decode step was traced to use"
ACTIVE_TRACED = "parameters that a decode step was traced to use"
DECIMAL = "GB of 10^9 bytes"
COUNTER = "energy by the board's counter over the call"
COMPARES = {"": stats.missing("the claim itself compares stacks")}


@dataclass(frozen=True)
class Metric:
    """A quantity of one model at a context.

    `of` is a name of the catalogue, times `factor`, from rows of a `kind` where it reads several,
    of calls of `every` length where it needs them; or a function for what the catalogue lacks.
    `text` says what is counted where it corrects the paper's. `stack`, `experts`: whether it
    depends on the stack, on the experts implementation; `decodes`: whether decoding is part of what
    is timed.
    """

    of: str | Of
    text: str = ""
    factor: float = 1.0
    kind: str = ""
    every: bool = False
    ratio: Over | None = None
    stack: bool = True
    experts: bool = True
    decodes: bool = True

    @property
    def rows(self) -> str:
        """The kind of its rows."""
        known = metrics.METRICS[self.of].kinds if isinstance(self.of, str) else ()
        return self.kind or next((kind for kind in known if kind != "card"), "latency")

    def at(self, e: Evidence, m: Map, model: str, context: int | None = None) -> Estimate:
        """Of one model, at the headline context unless another is given."""
        context = e.arm[0] if context is None else context
        if not isinstance(self.of, str):
            return self.of(e, m, model, context)
        length = None if self.every else e.arm[1]
        value = metrics.at(self.of, m[model], context, length, self.kind)
        return stats.scaled(value, self.factor)

    def over(self, e: Evidence, a: Place, b: Place, differ: Sequence[str] = ()) -> Estimate:
        """One place over another: by bootstrap where both have repetitions, refused where rows must
        not be compared; `differ` is what may differ."""
        if self.ratio:
            return self.ratio(e, a, b, differ)
        known = metrics.METRICS[self.of] if isinstance(self.of, str) else None
        if known and isinstance(known.of, estimators.Sample) and known.of.q == 50:
            return _of_samples(e, known, self.rows, (a, b), differ)
        pair = [self.at(e, *place) for place in (a, b)]
        if reason := next((x.reason for x in pair if x.value is None), ""):
            return stats.missing(reason)
        rows = [next((r for r in m[x].rows if r.kind != "card"), None) for m, x, _ in (a, b)]
        if reason := evidence.refused(e, rows, differ):
            return reason
        if known and known.of in estimators.SLOPES:
            return known.ratio(*(self._rows(e, *place) for place in (a, b)))
        return quotient(*pair)

    def _rows(self, e: Evidence, m: Map, model: str, context: int) -> list[Record]:
        """The rows that `at` reads of one model."""
        length = None if self.every else e.arm[1]
        return metrics.rows_at(str(self.of), m[model], context, length, self.kind)

    def against(self, e: Evidence, m: Map, other: str, context: int | None = None) -> Estimate:
        """The study's model over another."""
        context = e.arm[0] if context is None else context
        return self.over(e, (m, e.reference, context), (m, other, context))


def _of_samples(
    e: Evidence, metric: metrics.Metric, kind: str, places: Sequence[Place], differ: Sequence[str]
) -> Estimate:
    tokens = 1 if metric.of.one_token else e.arm[1]
    pair = [samples(m[x], kind, metric.of.name, c, tokens) for m, x, c in places]
    if reason := next((reason for values, reason in pair if not values), ""):
        return stats.missing(reason)
    rows = [m[x].one(kind, context=c, new_tokens=tokens) for m, x, c in places]
    return evidence.refused(e, rows, differ) or metric.ratio(*([row] for row in rows))


def _prefill_seconds(e: Evidence, m: Map, model: str, context: int, rate: str) -> Estimate:
    """TTFT over the headline's number of tokens at a rate of tokens."""
    seconds = stats.inverse(METRICS[rate].at(e, m, model, context), e.arm[1] * 1e3)
    return quotient(METRICS["ttft_ms"].at(e, m, model, context), seconds)


def _prefill_over_rest(e: Evidence, m: Map, model: str, context: int) -> Estimate:
    """TTFT / (call - TTFT): s / (1 - s) of its share; missing where an end is the whole or more."""
    share = _prefill_seconds(e, m, model, context, "output_tok_per_s")
    ends = {name: getattr(share, name) for name in ("value", "low", "high")}
    if any(x is not None and x >= 1 for x in ends.values()):
        return stats.missing("not resolved: the interval of the first token reaches the whole call")
    return replace(share, **{k: None if x is None else x / (1 - x) for k, x in ends.items()})


def _counted(of: Callable[[Evidence, str], Estimate], text: str = "") -> Metric:
    return Metric(lambda e, m, model, context: of(e, model), text, stack=False, experts=False)


def _share(e: Evidence, model: str, *, realised: bool) -> Estimate:
    used = stats.scaled(active(e, model, realised=realised), 100)
    return stats.as_exact(stats.quotient(used, total(e, model)), verdict.COUNTED)


def _reading(
    of: str, text: str = "", factor: float = 1e9 / MIB, kind: str = "memory-paper", **more: bool
) -> Metric:
    """One reading of the allocator, which the catalogue has in GB."""
    return Metric(of, text, factor, kind, stack=False, **more)


def _baseline_per_parameter(e: Evidence, a: Place, b: Place, differ: Sequence[str]) -> Estimate:
    ratio = METRICS["baseline_gb"].over(e, a, b, differ)
    sizes = stats.quotient(*(total(e, model) for _, model, _ in (a, b)))
    return stats.as_exact(stats.quotient(ratio, sizes), verdict.QUOTIENT)


def _per_active(plain: Metric, text: str = "", *, realised: bool = False) -> Metric:
    """A rate per 10^9 active parameters."""

    def of(e: Evidence, m: Map, model: str, context: int) -> Estimate:
        rate, count = plain.at(e, m, model, context), active(e, model, realised=realised)
        return count if count.value is None else stats.scaled(rate, 1 / count.value)

    def ratio(e: Evidence, a: Place, b: Place, differ: Sequence[str]) -> Estimate:
        counts = [active(e, model, realised=realised) for _, model, _ in (b, a)]
        rates, fewer = plain.over(e, a, b, differ), stats.quotient(*counts)
        if None in (rates.value, fewer.value):
            return fewer if rates.value is not None else rates
        return stats.scaled(rates, fewer.value)

    return Metric(of, text, kind=plain.rows, ratio=ratio)


OUTPUT = Metric("output", kind="latency")
DECODE = Metric(
    "decode",
    "decode throughput: the inverse slope of call time over new tokens, prefill left out",
    kind="latency",
    every=True,
)
TOKENS_PER_J, PAPER_JOULES = Metric("tok_per_j", COUNTER), Metric("j_per_1k_paper")
METRICS: dict[str, Metric] = {
    "output_tok_per_s": OUTPUT,
    "energy_output_tok_per_s": Metric("output", kind="energy"),
    "decode_tok_per_s": DECODE,
    "decode_step_ms": Metric("tpot", every=True),
    "ttft_ms": Metric("ttft", kind="latency", decodes=False),
    "p50_ms": Metric("p50", kind="latency"),
    "p95_ms": Metric("p95", kind="latency"),
    "memory_floor_share": Metric(evidence.memory_floor_share),
    "memory_floor_pct": Metric(lambda *at: stats.scaled(evidence.memory_floor_share(*at), 100)),
    "useful_mbu_pct": Metric(
        lambda *at: stats.scaled(evidence.useful_mbu(*at), 100),
        "bytes that a step must read: one row of the input embedding",
    ),
    "device_busy_share": Metric("decode_share", every=True),
    "prefill_over_rest": Metric(_prefill_over_rest),
    "prefill_over_decode": Metric(
        partial(_prefill_seconds, rate="decode_tok_per_s"),
        "TTFT over new tokens / decode throughput",
    ),
    "paper_joules_per_1k": PAPER_JOULES,
    "joules_per_1k": Metric("j_per_1k", COUNTER),
    "paper_tokens_per_j": Metric(
        lambda *at: stats.inverse(PAPER_JOULES.at(*at), 1e3),
        kind="energy",
        ratio=lambda e, a, b, differ: PAPER_JOULES.over(e, b, a, differ),
    ),
    "tokens_per_j": TOKENS_PER_J,
    "total_billion": _counted(total),
    "active_billion": _counted(active, "active parameters"),
    "active_billion_traced": _counted(partial(active, realised=True), ACTIVE_TRACED),
    "active_pct": _counted(partial(_share, realised=False)),
    "active_pct_traced": _counted(partial(_share, realised=True), ACTIVE_TRACED),
    "peak_mib": _reading("peak"),
    "peak_gb": _reading("peak", DECIMAL, 1.0),
    "peak_mib_over_1000": _reading("peak", factor=1e6 / MIB),
    "generate_peak_mib": _reading(
        "peak", "peak of generate(), which holds no logits of the prompt", kind="memory"
    ),
    "baseline_gb": _reading("baseline", DECIMAL, 1.0, experts=False),
    "baseline_mib_over_1000": _reading("baseline", factor=1e6 / MIB, experts=False),
    "baseline_per_parameter": replace(
        _reading("baseline", "baseline per parameter, all experts resident"),
        ratio=_baseline_per_parameter,
    ),
    "above_baseline_mib": _reading("above"),
    "kv_mib": _reading("kv", "bytes of the key and value tensors"),
    "tok_per_s_per_1000_mib": Metric("tok_per_s_per_1000_mib"),
    "ape_ttft": Metric("ape_ttft"),
    "ape_tpot": _per_active(OUTPUT),
    "ape_tpot_traced": _per_active(OUTPUT, TRACED, realised=True),
    "ape_decode_traced": _per_active(DECODE, TRACED, realised=True),
    "ape_energy": _per_active(TOKENS_PER_J),
    "ape_energy_traced": _per_active(TOKENS_PER_J, TRACED, realised=True),
}
METRICS["paper_ape_energy"] = _per_active(METRICS["paper_tokens_per_j"])
METRICS["paper_ape_energy_traced"] = _per_active(
    METRICS["paper_tokens_per_j"], TRACED, realised=True
)


def same(ratio: Estimate) -> Estimate:
    """A ratio as it is."""
    return ratio


# What a comparison becomes, by its form; the value of no effect, where the claim has a direction.
RATIOS = {"ratio": (same, 1), "gain": (metrics.percent_change, 0), "saving": (lower_pct, 0)}


def metric_of(name: str) -> Metric:
    """The metric of a name; an unknown one is an error with the nearest."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def measure(e: Evidence, claim: Claim) -> Measured:
    """What the test of a claim's entry says is compared, column by column."""
    test = claim["test"]
    metric, corrected, over = metric_of(test["metric"]), test.get("corrected"), test.get("over", {})
    bound = test.get("bound", corrected)
    alone = test["form"] in ("value", "steps") or bool(over)
    models = claim.get("models") or [claim[k] for k in ("model",) if k in claim]
    models = models or (e.published.models if alone else e.others)

    def column(name: str, m: Map) -> Column:
        return _column(e, test, metric_of(name), m, models)

    stacks = "stack" in over
    differs = metric.experts and not stacks and (not alone or e.reference in models)
    differs = differs and e.like_paper is not e.base
    return Measured(
        test["tolerance"],
        column(test["metric"], e.like_paper if differs else e.base),
        column(corrected, e.base) if corrected else STANDS,
        metric_of(corrected).text if corrected else "",
        column(bound, e.bound) if bound and metric.stack else COMPARES if stacks else NO_STACK,
        column(test["metric"], e.base) if differs else {},
        RATIOS.get(test["form"], (same, None))[1],
        alone,
        metric.decodes,
        metric.rows,
    )


def _column(e: Evidence, test: Test, metric: Metric, m: Map, models: Sequence[str]) -> Column:
    form, over, head = test["form"], test.get("over", {}), e.arm[0]
    if form == "value":
        return {x: metric.at(e, m, x) for x in models}
    if form == "difference":
        return {x: difference(*(metric.at(e, m, y) for y in (x, e.reference))) for x in models}
    if form == "steps":
        return {
            f"{x}, {after} after {before}": metric.over(e, (m, x, after), (m, x, before))
            for x in models
            for before, after in pairwise(over["context"])
        }
    places = {x: ((m, e.reference, head), (m, x, head)) for x in models}
    if "context" in over:
        places = {x: tuple((m, x, context) for context in over["context"]) for x in models}
    if "stack" in over:
        maps = [e.base if s == e.published.data["stack"] else e.stacks[s] for s in over["stack"]]
        places = {x: tuple((m, x, head) for m in maps) for x in models}
    differ = ("stack",) if "stack" in over else ()
    change = RATIOS[form][0]
    return {x: change(metric.over(e, a, b, differ)) for x, (a, b) in places.items()}
