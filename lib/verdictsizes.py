"""Rules of the claims about parameters, memory, hardware and what ran.

A rule takes the evidence and a claim's name, and returns what was measured for it. Its docstring
says what is compared; the verdict is given by lib.judge.
"""

from __future__ import annotations

from functools import partial

from lib import judge, papertables, stats
from lib.evidence import (
    NO_STACK,
    STANDS,
    Evidence,
    Map,
    Measured,
    active,
    compared,
    difference,
    gb,
    lower_pct,
    reading,
    reading_ratio,
)
from lib.published import BYTES
from lib.stats import Estimate

TRACED = "parameters that a decode step was traced to use"
PEAK = "peak of generate(), which holds no logits of the prompt"
KV = "bytes of the key and value tensors"
DECIMAL = "GB of 10^9 bytes"


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
    return stats.exact(card.values["total_params"] / 1e9, judge.COUNTED)


def active_params(e: Evidence, name: str) -> Measured:
    """Active parameters by architecture (10^9)."""
    m = e.reference
    nominal, traced = (stats.scaled(active(e, m, realised=x), 1e-9) for x in (False, True))
    return Measured("count", {m: nominal}, {m: traced}, TRACED, NO_STACK)


def active_share(e: Evidence, name: str) -> Measured:
    """Active over total parameters (%)."""
    m = e.reference
    total = _total(e, m)
    nominal, traced = (stats.scaled(active(e, m, realised=x), 1e-7) for x in (False, True))
    shares = [stats.as_exact(stats.quotient(x, total), judge.COUNTED) for x in (nominal, traced)]
    return Measured("count", {m: shares[0]}, {m: shares[1]}, TRACED, NO_STACK)


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

    shown = partial(gb, mib_over_1000=True)
    return Measured(
        "memory",
        {other: shown(gap(e.base))},
        {other: gb(gap(e.base))},
        DECIMAL,
        NO_STACK,
        {other: shown(gap(e.like_paper))},
    )


def baseline(e: Evidence, name: str) -> Measured:
    """Allocation before the prompt, in the unit that the paper's number is in."""
    model = e.published.claim(name)["model"]
    found = reading(e, e.base, model, "baseline_bytes")
    as_meant = gb(found, mib_over_1000=e.published.claim(name)["meant"] == "MiB / 1000")
    return Measured("memory", {model: as_meant}, {model: gb(found)}, DECIMAL, NO_STACK, alone=True)


def saving_from_moe(e: Evidence, name: str) -> Measured:
    """Baseline memory over that of each other model; corrected: per parameter that is stored, so
    that 1 says that the saving is the smaller model's and not the routing's."""
    found, per_parameter = {}, {}
    for other in e.others:
        ratio = reading_ratio(e, e.base, other, "baseline_bytes", "memory-paper")
        sizes = compared(e, e.base, other, partial(_total, e))
        found[other] = ratio
        both = stats.quotient(ratio, sizes)
        per_parameter[other] = stats.as_exact(both, judge.QUOTIENT)
    as_said = "baseline per parameter, all experts resident"
    return Measured("memory", found, per_parameter, as_said, NO_STACK)


def kv_larger(e: Evidence, name: str) -> Measured:
    """Peak above baseline over that of each other model; corrected: the cache's own tensors."""

    def above(m: Map) -> dict[str, Estimate]:
        return {o: reading_ratio(e, m, o, "above", "memory-paper") for o in e.others}

    tensors = {o: reading_ratio(e, e.base, o, "kv_tensor_bytes", "memory-paper") for o in e.others}
    return Measured("memory", above(e.base), tensors, KV, NO_STACK, above(e.like_paper))


def decimal_units(e: Evidence, name: str) -> Measured:
    """Bytes of the measured peak per unit of the printed one, for the dense models."""
    column = "Peak VRAM (MB)"
    found = {}
    for other in e.others:
        peak = reading(e, e.base, other, "peak_bytes")
        found[other] = stats.scaled(peak, 1 / e.published.value(5, other, column))
    as_said = f"MiB of {BYTES['MiB']:,} bytes"
    return Measured("memory", found, STANDS, as_said, NO_STACK, alone=True)


def hardware(e: Evidence, name: str) -> Measured:
    """GPUs of the stated family in the study's files: the device's name begins with it."""
    family = e.published.claim(name)["text"].removeprefix("a single ").removesuffix(" GPU")
    found = stats.exact(float(str(e.published.fact("gpu")).startswith(family)), judge.FILES)
    return Measured(
        "whole", {"": found}, STANDS, "", {"": stats.missing("about the paper's own runs")}
    )


def bf16_only(e: Evidence, name: str) -> Measured:
    """Number formats of table 11, beside the default, whose arm failed."""
    series, labels = e.ablation["precision"], list(e.published.data["tables"][11]["rows"])
    arms = [papertables.arm_row(series, 11, label) for label in labels[1:]]
    if None in arms:
        absent = labels[1 + arms.index(None)]
        found = stats.missing(series.reason or f"not measured: no {absent} arm")
    else:
        found = stats.exact(float(sum(bool(arm.error) for arm in arms)), judge.COUNTED)
    return Measured("whole", {"": found}, STANDS, "", NO_STACK)


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
