"""A claim as data: the metrics that it may name, and the forms in which it is tested.

A claim's entry names its `metric`, the `corrected` one, and that of the column on a stack which the
device bounds (`bound`, else `corrected`). The form says what is compared: one model's value, the
study's model against others (or contexts, or stacks, by `over`), or steps from context to context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from lib import stats
from lib.analysis import metrics
from lib.analysis.metrics import MIB
from lib.analysis.series import samples
from lib.files import unknown
from lib.records.record import require_comparable
from lib.stats import Estimate
from lib.studies import evidence, verdict
from lib.studies.evidence import (
    NO_STACK,
    STANDS,
    Evidence,
    Map,
    Measured,
    active,
    compared,
    decode_rate,
    difference,
    joules_per_1k,
    lower_pct,
    output_rate,
    output_ratio,
    reading,
    sample_ratio,
    total,
    ttft_s,
)
from lib.studies.schema import Claim, Test

Of = Callable[[Evidence, Map, str], Estimate]  # a metric of one model, or against that model
Over = Callable[[Evidence, Map, str, tuple[int, int]], Estimate]
Column = dict[str, Estimate]
ESTIMATOR = "paper_energy_j"  # the study's: mean of power readings before and after, times time
TRACED = "per parameter that a decode step was traced to use"
ACTIVE_TRACED = "parameters that a decode step was traced to use"
DECIMAL = "GB of 10^9 bytes"
COMPARES = {"": stats.missing("the claim itself compares stacks")}


@dataclass(frozen=True)
class Metric:
    """A quantity by which a claim is tested.

    `of` is that of one model at the headline arm, `ratio` the study's model over another, `over`
    the second of two contexts over the first. `text` says what is counted where it corrects the
    paper's. `kind` is that of its rows. `stack`, `experts`: whether it depends on the stack, on the
    experts implementation; `decodes`: whether decoding is part of what is timed.
    """

    of: Of
    text: str = ""
    ratio: Of | None = None
    over: Over | None = None
    kind: str = "latency"
    stack: bool = True
    experts: bool = True
    decodes: bool = True

    def against(self, e: Evidence, m: Map, other: str) -> Estimate:
        """The study's model over another."""
        ratio = self.ratio or (lambda e, m, x: compared(e, m, x, partial(self.of, e, m)))
        return ratio(e, m, other)


def _output_over(e: Evidence, m: Map, model: str, contexts: tuple[int, int]) -> Estimate:
    """Output throughput is the inverse of time."""
    return _samples_over(m, model, "latency", "e2e_s", contexts[::-1], e.arm[1])


def _samples_over(
    m: Map, model: str, kind: str, name: str, contexts: tuple[int, int], tokens: int
) -> Estimate:
    before, after = (samples(m[model], kind, name, c, tokens) for c in contexts)
    for values, reason in (after, before):
        if not values:
            return stats.missing(reason)
    return stats.ratio(after[0], before[0])


def _decode_over(e: Evidence, m: Map, model: str, contexts: tuple[int, int]) -> Estimate:
    before, after = (decode_rate(e, m, model, c) for c in contexts)
    return stats.quotient(after, before)


def _ttft_ratio(e: Evidence, m: Map, other: str) -> Estimate:
    return sample_ratio(e, m, other, "latency", "ttft_s", (e.arm[0], 1))


def _prefill_seconds(e: Evidence, m: Map, model: str, rate: Of) -> Estimate:
    return stats.quotient(ttft_s(e, m, model), stats.inverse(rate(e, m, model), e.arm[1]))


def _prefill_over_rest(e: Evidence, m: Map, model: str) -> Estimate:
    """TTFT / (call - TTFT): s / (1 - s) of its share; missing where an end is the whole or more."""
    share = _prefill_seconds(e, m, model, output_rate)
    ends = {name: getattr(share, name) for name in ("value", "low", "high")}
    if any(x is not None and x >= 1 for x in ends.values()):
        return stats.missing("not resolved: the interval of the first token reaches the whole call")
    return replace(share, **{k: None if x is None else x / (1 - x) for k, x in ends.items()})


def tok_per_j(e: Evidence, m: Map, model: str, sample: str = "energy_j") -> Estimate:
    """Generated tokens per joule."""
    return stats.inverse(joules_per_1k(e, m, model, sample), 1e3)


def _energy(sample: str, text: str = "", *, inverse: bool = False) -> Metric:
    def ratio(e: Evidence, m: Map, other: str) -> Estimate:
        energies = sample_ratio(e, m, other, "energy", sample)
        return stats.inverse(energies) if inverse else energies

    def over(e: Evidence, m: Map, model: str, contexts: tuple[int, int]) -> Estimate:
        return _samples_over(m, model, "energy", sample, contexts, e.arm[1])

    of = partial(tok_per_j, sample=sample) if inverse else partial(joules_per_1k, name=sample)
    return Metric(of, text, ratio, None if inverse else over, kind="energy")


def _counted(of: Callable[[Evidence, str], Estimate], text: str = "") -> Metric:
    return Metric(lambda e, m, model: of(e, model), text, stack=False, experts=False)


def _active(e: Evidence, model: str, *, realised: bool) -> Estimate:
    return stats.scaled(active(e, model, realised=realised), 1e-9)


def _share(e: Evidence, model: str, *, realised: bool) -> Estimate:
    used = stats.scaled(active(e, model, realised=realised), 1e-7)
    return stats.as_exact(stats.quotient(used, total(e, model)), verdict.COUNTED)


def _reading(
    name: str,
    text: str = "",
    *,
    kind: str = "memory-paper",
    unit: float = MIB,
    experts: bool = True,
    ratio: Of | None = None,
) -> Metric:
    """One reading of the allocator."""

    def of(e: Evidence, m: Map, model: str) -> Estimate:
        return stats.scaled(reading(e, m, model, name, kind), 1 / unit)

    return Metric(of, text, ratio, stack=False, experts=experts)


def _baseline_per_parameter(e: Evidence, m: Map, other: str) -> Estimate:
    ratio = METRICS["baseline_gb"].against(e, m, other)
    sizes = compared(e, m, other, partial(total, e))
    return stats.as_exact(stats.quotient(ratio, sizes), verdict.QUOTIENT)


def _per_active(plain: Metric, text: str = "", *, realised: bool = False) -> Metric:
    """A rate per 10^9 active parameters."""

    def of(e: Evidence, m: Map, model: str) -> Estimate:
        rate, count = plain.of(e, m, model), active(e, model, realised=realised)
        return count if count.value is None else stats.scaled(rate, 1e9 / count.value)

    def ratio(e: Evidence, m: Map, other: str) -> Estimate:
        pair = [active(e, x, realised=realised) for x in (other, e.reference)]
        rates, fewer = plain.against(e, m, other), stats.quotient(*pair)
        if None in (rates.value, fewer.value):
            return fewer if rates.value is not None else rates
        return stats.scaled(rates, fewer.value)

    return Metric(of, text, ratio, kind=plain.kind)


def _timed(of: Callable[..., Estimate], text: str = "", factor: float = 1.0) -> Metric:
    """A metric of a decode step at the headline context."""
    return Metric(lambda e, m, model: stats.scaled(of(m[model], e.arm[0], e.envs), factor), text)


OUTPUT = Metric(output_rate, "", output_ratio, _output_over)
DECODE = Metric(
    decode_rate,
    "decode throughput: the inverse slope of call time over new tokens, prefill left out",
    over=_decode_over,
)
METRICS: dict[str, Metric] = {
    "output_tok_per_s": OUTPUT,
    "decode_tok_per_s": DECODE,
    "ttft_ms": Metric(
        lambda e, m, model: metrics.at("ttft", m[model], *e.arm),
        "median of 6 repetitions or more with its interval; the paper prints single readings",
        _ttft_ratio,
        decodes=False,
    ),
    "decode_step_ms": _timed(evidence.decode_step_ms),
    "memory_floor_pct": _timed(evidence.memory_floor_share, factor=100),
    "useful_mbu_pct": _timed(
        evidence.useful_mbu, "bytes that a step must read: one row of the input embedding", 100
    ),
    "device_busy_share": _timed(evidence.device_busy_share),
    "prefill_over_rest": Metric(_prefill_over_rest),
    "prefill_over_decode": Metric(
        partial(_prefill_seconds, rate=decode_rate), "TTFT over new tokens / decode throughput"
    ),
    "paper_joules_per_1k": _energy(ESTIMATOR),
    "joules_per_1k": _energy("energy_j", "energy by the board's counter over the call"),
    "paper_tokens_per_j": _energy(ESTIMATOR, inverse=True),
    "tokens_per_j": _energy(
        "energy_j", "energy by the board's counter over the call", inverse=True
    ),
    "total_billion": _counted(total),
    "active_billion": _counted(partial(_active, realised=False), "active parameters"),
    "active_billion_traced": _counted(partial(_active, realised=True), ACTIVE_TRACED),
    "active_pct": _counted(partial(_share, realised=False)),
    "active_pct_traced": _counted(partial(_share, realised=True), ACTIVE_TRACED),
    "peak_mib": _reading("peak_bytes"),
    "peak_gb": _reading("peak_bytes", DECIMAL, unit=1e9),
    "peak_mib_over_1000": _reading("peak_bytes", unit=MIB * 1e3),
    "generate_peak_mib": _reading(
        "peak_bytes", "peak of generate(), which holds no logits of the prompt", kind="memory"
    ),
    "baseline_gb": _reading("baseline_bytes", DECIMAL, unit=1e9, experts=False),
    "baseline_mib_over_1000": _reading("baseline_bytes", unit=MIB * 1e3, experts=False),
    "baseline_per_parameter": _reading(
        "baseline_bytes",
        "baseline per parameter, all experts resident",
        ratio=_baseline_per_parameter,
    ),
    "above_baseline_mib": _reading("above"),
    "kv_mib": _reading("kv_tensor_bytes", "bytes of the key and value tensors"),
    "ape_tpot": _per_active(OUTPUT),
    "ape_tpot_traced": _per_active(OUTPUT, TRACED, realised=True),
    "ape_decode_traced": _per_active(DECODE, TRACED, realised=True),
    "paper_ape_energy": _per_active(_energy(ESTIMATOR, inverse=True)),
    "paper_ape_energy_traced": _per_active(_energy(ESTIMATOR, inverse=True), TRACED, realised=True),
    "ape_energy_traced": _per_active(Metric(tok_per_j, kind="energy"), TRACED, realised=True),
}


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
    rerun = (
        metric.experts
        and not stacks
        and test["form"] != "steps"
        and (not alone or e.reference in models)
    )
    return Measured(
        test["tolerance"],
        column(test["metric"], e.base),
        column(corrected, e.base) if corrected else STANDS,
        metric_of(corrected).text if corrected else "",
        column(bound, e.bound) if bound and metric.stack else COMPARES if stacks else NO_STACK,
        column(test["metric"], e.like_paper) if rerun else {},
        RATIOS.get(test["form"], (same, None))[1],
        alone,
        metric.decodes,
        metric.kind,
    )


def _column(e: Evidence, test: Test, metric: Metric, m: Map, models: Sequence[str]) -> Column:
    form, over = test["form"], test.get("over", {})
    if form == "value":
        return {x: metric.of(e, m, x) for x in models}
    if form == "difference":
        return {x: difference(*(metric.of(e, m, y) for y in (x, e.reference))) for x in models}
    if form == "steps":
        return {
            f"{x}, {after} after {before}": metric.over(e, m, x, (before, after))
            for x in models
            for before, after in pairwise(over["context"])
        }
    change = RATIOS[form][0]
    if "context" in over:
        after, before = over["context"]
        return {x: change(metric.over(e, m, x, (before, after))) for x in models}
    if "stack" in over:
        return {x: change(_over_stacks(e, metric, x, over["stack"])) for x in models}
    return {x: change(metric.against(e, m, x)) for x in models}


def _over_stacks(e: Evidence, metric: Metric, model: str, stacks: Sequence[str]) -> Estimate:
    """A metric of a model on the first of two stacks over that on the second."""
    maps = [e.base if s == e.published.data["stack"] else e.stacks[s] for s in stacks]
    rows = [r for m in maps if (r := m[model].one(metric.kind, context=e.arm[0])) is not None]
    try:
        require_comparable(rows, e.envs, differ=("stack",))
    except ValueError as error:
        return stats.missing(f"not compared: {error}")
    return stats.quotient(*(metric.of(e, m, model) for m in maps))
