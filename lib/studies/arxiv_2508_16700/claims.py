"""One rule a claim: what was measured for it, by the paper's protocol and corrected.

A rule takes the evidence and a claim's name. Its docstring says what is compared; the verdict is
given by `studies.verdict`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

from lib import stats
from lib.analysis import metrics
from lib.analysis.series import Series, samples
from lib.stats import Estimate
from lib.studies import paper_tables, verdict
from lib.studies.arxiv_2508_16700 import audit
from lib.studies.evidence import (
    NO_STACK,
    STANDS,
    Evidence,
    Map,
    Measured,
    active,
    compared,
    decode_rate,
    decode_ratio,
    difference,
    gb,
    joules_per_1k,
    lower_pct,
    output_rate,
    output_ratio,
    reading,
    reading_ratio,
    sample_ratio,
    ttft_s,
)
from lib.studies.study import BYTES

DECODE = "decode throughput: the inverse slope of call time over new tokens, prefill left out"
MEDIAN = "median of 6 repetitions or more with its interval; the paper prints single readings"
OWN_RUNS = {"": stats.missing("about the paper's own runs")}
HOST_WORK = {"": stats.missing("not measured: no such arm on a stack that the device bounds")}
ACTIVE_TRACED = "parameters that a decode step was traced to use"
PEAK = "peak of generate(), which holds no logits of the prompt"
KV = "bytes of the key and value tensors"
DECIMAL = "GB of 10^9 bytes"
COUNTER = "energy by the board's counter over the call"
ESTIMATOR = "paper_energy_j"  # the study's: mean of power readings before and after, times time
TRACED = "per parameter that a decode step was traced to use"
Rate = Callable[[Evidence, Map, str], Estimate]
Form = Callable[[Estimate], Estimate]  # of a ratio: itself, its inverse, a change in percent


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
        return {other: metrics.percent_change(output_ratio(e, m, other))}

    def decode(m: Map) -> dict[str, Estimate]:
        return {other: metrics.percent_change(decode_ratio(e, m, other))}

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


def _over_contexts(e: Evidence, models: list[str], form: Form) -> Measured:
    first, last = e.published.contexts[0], e.published.contexts[-1]

    def output(m: Map) -> dict[str, Estimate]:
        return {x: form(_output_over(m, x, (first, last), e.arm[1])) for x in models}

    def decode(m: Map) -> dict[str, Estimate]:
        rates = {x: [decode_rate(e, m, x, c) for c in (last, first)] for x in models}
        return {x: form(stats.quotient(*pair)) for x, pair in rates.items()}

    own = output(e.like_paper) if e.reference in models else {}
    return Measured(
        "time", output(e.base), decode(e.base), DECODE, decode(e.bound), own, alone=True
    )


def _output_over(m: Map, model: str, contexts: tuple[int, int], tokens: int) -> Estimate:
    """Output throughput at the second context over that at the first: inverse ratio of times."""
    pair = [samples(m[model], "latency", "e2e_s", c, tokens) for c in contexts]
    if reason := next((why for values, why in pair if not values), ""):
        return stats.missing(reason)
    return stats.ratio(pair[0][0], pair[1][0])


def prefill_dominates(e: Evidence, name: str) -> Measured:
    """Prefill over decode in one call: TTFT / (call - TTFT), for each model."""

    def over_seconds(m: Map, model: str, rate: Rate) -> Estimate:
        return stats.quotient(ttft_s(e, m, model), stats.inverse(rate(e, m, model), e.arm[1]))

    def shares(m: Map) -> dict[str, Estimate]:
        return {x: _odds(over_seconds(m, x, output_rate)) for x in e.published.models}

    def against_slope(m: Map) -> dict[str, Estimate]:
        return {x: over_seconds(m, x, decode_rate) for x in e.published.models}

    return Measured(
        "time",
        shares(e.base),
        against_slope(e.base),
        "TTFT over new tokens / decode throughput",
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
    series, labels = e.ablation["decoding"], list(e.published.data["tables"][9]["rows"])
    return {label: lower_pct(_table_ratio(series, 9, labels[0], label)) for label in labels[1:]}


def _table_ratio(series: Series, table: int, before: str, after: str) -> Estimate:
    """Output throughput of one row of an ablation over that of another, as a ratio."""
    arms = [paper_tables.arm_row(series, table, label) for label in (before, after)]
    for label, arm in zip((before, after), arms, strict=True):
        if arm is None:
            return stats.missing(series.reason or f"not measured: no row for {label}")
        if arm.error or not arm.samples.get("e2e_s"):
            return stats.missing(f"failed: {arm.error}" if arm.error else "not measured: no e2e_s")
    return stats.ratio(arms[0].samples["e2e_s"], arms[1].samples["e2e_s"])


def decode_degrades(e: Evidence, name: str) -> Measured:
    """Output throughput of each context of table 10 over that of the one before."""
    series, labels = e.ablation["context"], list(e.published.data["tables"][10]["rows"])
    steps = {f"{b} after {a}": _table_ratio(series, 10, a, b) for a, b in pairwise(labels)}
    ends = (e.published.contexts[-1], e.published.contexts[0])
    label = f"{ends[0]} after {ends[1]}"

    def decode(m: Map) -> dict[str, Estimate]:
        return {label: stats.quotient(*(decode_rate(e, m, e.reference, c) for c in ends))}

    return Measured("time", steps, decode(e.base), DECODE, decode(e.bound))


def drop_at_4k(e: Evidence, name: str) -> Measured:
    """Drop of output throughput from the first to the last context of table 10 (%)."""
    labels = list(e.published.data["tables"][10]["rows"])
    first, last = labels[0], labels[-1]
    output = lower_pct(_table_ratio(e.ablation["context"], 10, first, last))

    def decode(m: Map) -> dict[str, Estimate]:
        rates = [decode_rate(e, m, e.reference, int(c)) for c in (last, first)]
        return {"": lower_pct(stats.quotient(*rates))}

    return Measured("time", {"": output}, decode(e.base), DECODE, decode(e.bound), neutral=0)


def parameters(e: Evidence, name: str) -> Measured:
    """Total parameters on the model card (10^9)."""
    model = e.published.claim(name).get("model", e.reference)
    if model == e.reference:  # its active parameters are a claim of their own
        return Measured("count", {model: _total(e, model)}, STANDS, "", NO_STACK, alone=True)
    used = {model: stats.scaled(active(e, model), 1e-9)}
    return Measured(
        "count", {model: _total(e, model)}, used, "active parameters", NO_STACK, alone=True
    )


def _total(e: Evidence, model: str) -> Estimate:
    card = e.base[model].one("card")
    if card is None:
        return stats.missing("not measured: no model card among the rows")
    return stats.exact(card.values["total_params"] / 1e9, verdict.COUNTED)


def active_params(e: Evidence, name: str) -> Measured:
    """Active parameters by architecture (10^9)."""
    m = e.reference
    nominal, traced = (stats.scaled(active(e, m, realised=x), 1e-9) for x in (False, True))
    return Measured("count", {m: nominal}, {m: traced}, ACTIVE_TRACED, NO_STACK)


def active_share(e: Evidence, name: str) -> Measured:
    """Active over total parameters (%)."""
    m = e.reference
    total = _total(e, m)
    nominal, traced = (stats.scaled(active(e, m, realised=x), 1e-7) for x in (False, True))
    shares = [stats.as_exact(stats.quotient(x, total), verdict.COUNTED) for x in (nominal, traced)]
    return Measured("count", {m: shares[0]}, {m: shares[1]}, ACTIVE_TRACED, NO_STACK)


def peak_lower(e: Evidence, name: str) -> Measured:
    """Allocator peak over that of each other model."""

    def peaks(m: Map, kind: str) -> dict[str, Estimate]:
        return {o: reading_ratio(e, m, o, "peak_bytes", kind) for o in e.others}

    return Measured(
        "memory",
        peaks(e.base, "memory-paper"),
        peaks(e.base, "memory"),
        PEAK,
        NO_STACK,
        peaks(e.like_paper, "memory-paper"),
    )


def peak_saving(e: Evidence, name: str) -> Measured:
    """How much lower the allocator peak is than that of the claim's model (%)."""
    other = e.published.claim(name)["model"]

    def saving(m: Map, kind: str) -> dict[str, Estimate]:
        return {other: lower_pct(reading_ratio(e, m, other, "peak_bytes", kind))}

    return Measured(
        "memory",
        saving(e.base, "memory-paper"),
        saving(e.base, "memory"),
        PEAK,
        NO_STACK,
        saving(e.like_paper, "memory-paper"),
        neutral=0,
    )


def peak_gap(e: Evidence, name: str) -> Measured:
    """Difference of the allocator peaks to the claim's model, in the paper's MiB / 1000."""
    other = e.published.claim(name)["model"]

    def gap(m: Map) -> Estimate:
        return difference(*(reading(e, m, x, "peak_bytes") for x in (other, e.reference)))

    as_printed = partial(gb, mib_over_1000=True)
    return Measured(
        "memory",
        {other: as_printed(gap(e.base))},
        {other: gb(gap(e.base))},
        DECIMAL,
        NO_STACK,
        {other: as_printed(gap(e.like_paper))},
    )


def baseline(e: Evidence, name: str) -> Measured:
    """Allocation before the prompt, in the unit that the paper's number is in."""
    claim = e.published.claim(name)
    model = claim["model"]
    size = reading(e, e.base, model, "baseline_bytes")
    as_meant = gb(size, mib_over_1000=claim["meant"] == "MiB / 1000")
    return Measured("memory", {model: as_meant}, {model: gb(size)}, DECIMAL, NO_STACK, alone=True)


def saving_from_moe(e: Evidence, name: str) -> Measured:
    """Baseline memory over that of each other model; corrected: per parameter that is stored, so
    that 1 says that the saving is the smaller model's and not the routing's."""
    ratios, per_parameter = {}, {}
    for other in e.others:
        ratios[other] = reading_ratio(e, e.base, other, "baseline_bytes", "memory-paper")
        sizes = compared(e, e.base, other, partial(_total, e))
        both = stats.quotient(ratios[other], sizes)
        per_parameter[other] = stats.as_exact(both, verdict.QUOTIENT)
    corrected_as = "baseline per parameter, all experts resident"
    return Measured("memory", ratios, per_parameter, corrected_as, NO_STACK)


def kv_larger(e: Evidence, name: str) -> Measured:
    """Peak above baseline over that of each other model; corrected: the cache's own tensors."""

    def above(m: Map) -> dict[str, Estimate]:
        return {o: reading_ratio(e, m, o, "above", "memory-paper") for o in e.others}

    tensors = {o: reading_ratio(e, e.base, o, "kv_tensor_bytes", "memory-paper") for o in e.others}
    return Measured("memory", above(e.base), tensors, KV, NO_STACK, above(e.like_paper))


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
    series, labels = e.ablation["precision"], list(e.published.data["tables"][11]["rows"])
    arms = [paper_tables.arm_row(series, 11, label) for label in labels[1:]]
    if None in arms:
        absent = labels[1 + arms.index(None)]
        failures = stats.missing(series.reason or f"not measured: no {absent} arm")
    else:
        failures = stats.exact(float(sum(bool(arm.error) for arm in arms)), verdict.COUNTED)
    return Measured("whole", {"": failures}, STANDS, "", NO_STACK)


def tokens_per_joule_higher(e: Evidence, name: str) -> Measured:
    """Tokens per joule over that of each other model: the inverse ratio of energies."""
    return _energy(e, e.others, stats.inverse)


def energy_lower(e: Evidence, name: str) -> Measured:
    """Joules per 1,000 tokens over that of each other model."""
    return _energy(e, e.others, lambda ratio: ratio)


def energy_saving(e: Evidence, name: str) -> Measured:
    """How much lower joules per 1,000 tokens are than the claim's model's (%)."""
    return replace(_energy(e, [e.published.claim(name)["model"]], lower_pct), neutral=0)


def tokens_per_joule_gain(e: Evidence, name: str) -> Measured:
    """Gain in tokens per joule over the claim's model (%)."""

    def gain(ratio: Estimate) -> Estimate:
        return metrics.percent_change(stats.inverse(ratio))

    return replace(_energy(e, [e.published.claim(name)["model"]], gain), neutral=0)


def _energy(e: Evidence, others: list[str], form: Form) -> Measured:
    def by(m: Map, sample: str) -> dict[str, Estimate]:
        return {o: form(sample_ratio(e, m, o, "energy", sample)) for o in others}

    return Measured(
        "time",
        by(e.base, ESTIMATOR),
        by(e.base, "energy_j"),
        COUNTER,
        by(e.bound, "energy_j"),
        by(e.like_paper, ESTIMATOR),
        kind="energy",
    )


def energy_rises(e: Evidence, name: str) -> Measured:
    """Energy of a call at each context over that at the one before, for each model."""

    def steps(m: Map, sample: str) -> dict[str, Estimate]:
        ratios = {}
        for model in e.published.models:
            for before, after in pairwise(e.published.contexts):
                pair = [samples(m[model], "energy", sample, c, e.arm[1]) for c in (after, before)]
                reason = next((why for values, why in pair if not values), "")
                ratios[f"{model}, {after} after {before}"] = (
                    stats.missing(reason) if reason else stats.ratio(pair[0][0], pair[1][0])
                )
        return ratios

    return Measured(
        "time",
        steps(e.base, ESTIMATOR),
        steps(e.base, "energy_j"),
        COUNTER,
        steps(e.bound, "energy_j"),
        alone=True,
        kind="energy",
    )


def tok_per_j(e: Evidence, m: Map, model: str, sample: str = ESTIMATOR) -> Estimate:
    """Generated tokens per joule."""
    return stats.inverse(joules_per_1k(e, m, model, sample), 1e3)


def _per_active(e: Evidence, rate: Estimate, model: str, *, realised: bool = False) -> Estimate:
    """A rate per 10^9 active parameters."""
    count = active(e, model, realised=realised)
    if count.value is None:
        return count
    return stats.scaled(rate, 1e9 / count.value) if rate.value is not None else rate


def ape_throughput(e: Evidence, name: str) -> Measured:
    """Output throughput per 10^9 active parameters of the study's model (tok/s/B)."""
    return _ape(e, [e.reference], output_rate, decode_rate)


def ape_throughput_dense(e: Evidence, name: str) -> Measured:
    """Output throughput per 10^9 active parameters of the other models (tok/s/B)."""
    return _ape(e, e.others, output_rate, decode_rate)


def ape_energy(e: Evidence, name: str) -> Measured:
    """Tokens per joule and 10^9 active parameters of the study's model."""
    return _ape(e, [e.reference], tok_per_j, partial(tok_per_j, sample="energy_j"))


def ape_energy_dense(e: Evidence, name: str) -> Measured:
    """Tokens per joule and 10^9 active parameters of the other models."""
    return _ape(e, e.others, tok_per_j, partial(tok_per_j, sample="energy_j"))


def _ape(e: Evidence, models: list[str], rate: Rate, bound_rate: Rate) -> Measured:
    def per_active(m: Map, of: Rate, realised: bool) -> dict[str, Estimate]:
        return {x: _per_active(e, of(e, m, x), x, realised=realised) for x in models}

    own = per_active(e.like_paper, rate, False) if e.reference in models else {}
    return Measured(
        "time",
        per_active(e.base, rate, False),
        per_active(e.base, rate, True),
        TRACED,
        per_active(e.bound, bound_rate, True),
        own,
        alone=True,
    )


def ape_throughput_ratio(e: Evidence, name: str) -> Measured:
    """Throughput per active parameter over that of each other model."""
    return replace(_ape_ratio(e, output_ratio, decode_rate), neutral=1)


def ape_higher(e: Evidence, name: str) -> Measured:
    """Throughput per active parameter over that of each other model, as an order."""
    return _ape_ratio(e, output_ratio, decode_rate)


def ape_energy_ratio(e: Evidence, name: str) -> Measured:
    """Tokens per joule and active parameter over that of each other model."""

    def gain(e: Evidence, m: Map, other: str) -> Estimate:
        return stats.inverse(sample_ratio(e, m, other, "energy", ESTIMATOR))

    measured = _ape_ratio(e, gain, partial(tok_per_j, sample="energy_j"))
    return replace(measured, neutral=1, kind="energy")


def _ape_ratio(e: Evidence, ratio: Rate, bound_rate: Rate) -> Measured:
    def of(m: Map, realised: bool) -> dict[str, Estimate]:
        return {o: _scaled(ratio(e, m, o), _fewer(e, o, realised)) for o in e.others}

    def bound(other: str) -> Estimate:
        rates = compared(e, e.bound, other, partial(bound_rate, e, e.bound))
        return _scaled(rates, _fewer(e, other, True))

    return Measured(
        "time",
        of(e.base, False),
        of(e.base, True),
        TRACED,
        {o: bound(o) for o in e.others},
        of(e.like_paper, False),
    )


def _fewer(e: Evidence, other: str, realised: bool) -> Estimate:
    """Active parameters of another model over those of the study's."""
    pair = [active(e, x, realised=realised) for x in (other, e.reference)]
    return stats.as_exact(stats.quotient(*pair), verdict.COUNTED)


def _scaled(ratio: Estimate, factor: Estimate) -> Estimate:
    for side in (ratio, factor):
        if side.value is None:
            return side
    return stats.scaled(ratio, factor.value)


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
SIZES = {
    "total-params": parameters,
    "active-params": active_params,
    "active-share": active_share,
    "qwen-params": parameters,
    "yi-params": parameters,
    "peak-lower": peak_lower,
    "peak-vs-qwen": peak_saving,
    "peak-saving-qwen": peak_saving,
    "peak-saving-yi": peak_saving,
    "peak-gap-qwen": peak_gap,
    "peak-gap-yi": peak_gap,
    "baseline-gpt-oss": baseline,
    "baseline-qwen": baseline,
    "baseline-yi": baseline,
    "saving-from-moe": saving_from_moe,
    "kv-larger": kv_larger,
    "decimal-units": decimal_units,
    "hardware": hardware,
    "bf16-only": bf16_only,
}
ENERGY = {
    "tokens-per-joule-higher": tokens_per_joule_higher,
    "energy-lower": energy_lower,
    "energy-vs-qwen": energy_saving,
    "energy-vs-yi": energy_saving,
    "tokens-per-joule-vs-qwen": tokens_per_joule_gain,
    "tokens-per-joule-vs-yi": tokens_per_joule_gain,
    "energy-rises": energy_rises,
    "ape-higher": ape_higher,
    "ape-throughput": ape_throughput,
    "ape-throughput-dense": ape_throughput_dense,
    "ape-throughput-ratio": ape_throughput_ratio,
    "ape-energy": ape_energy,
    "ape-energy-dense": ape_energy_dense,
    "ape-energy-ratio": ape_energy_ratio,
}
