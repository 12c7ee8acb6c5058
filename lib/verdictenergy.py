"""Rules of the claims about energy and efficiency per active parameter.

A rule takes the evidence and a claim's name, and returns what was measured for it. Its docstring
says what is compared; the verdict is given by lib.judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

from lib import judge, stats
from lib.analysis import metrics as rules
from lib.analysis import series
from lib.evidence import (
    Evidence,
    Map,
    Measured,
    active,
    compared,
    decode_rate,
    joules_per_1k,
    lower_pct,
    output_rate,
    output_ratio,
    sample_ratio,
)
from lib.stats import Estimate

COUNTER = "energy by the board's counter over the call"
ESTIMATOR = "paper_energy_j"  # the study's: mean of power readings before and after, times time
TRACED = "per parameter that a decode step was traced to use"
Rate = Callable[[Evidence, Map, str], Estimate]


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
        return rules.percent_change(stats.inverse(ratio))

    return replace(_energy(e, [e.published.claim(name)["model"]], gain), neutral=0)


def _energy(e: Evidence, others: list[str], shown: Callable[[Estimate], Estimate]) -> Measured:
    def by(m: Map, sample: str) -> dict[str, Estimate]:
        return {o: shown(sample_ratio(e, m, o, "energy", sample)) for o in others}

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
        found = {}
        for model in e.published.models:
            for before, after in pairwise(e.published.contexts):
                pair = [
                    series.samples(m[model], "energy", sample, c, e.arm[1]) for c in (after, before)
                ]
                reason = next((why for values, why in pair if not values), "")
                found[f"{model}, {after} after {before}"] = (
                    stats.missing(reason) if reason else stats.ratio(pair[0][0], pair[1][0])
                )
        return found

    return Measured(
        "time",
        steps(e.base, ESTIMATOR),
        steps(e.base, "energy_j"),
        COUNTER,
        steps(e.bound, "energy_j"),
        alone=True,
        kind="energy",
    )


# --- efficiency per active parameter


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

    found = _ape_ratio(e, gain, partial(tok_per_j, sample="energy_j"))
    return replace(found, neutral=1, kind="energy")


def _ape_ratio(e: Evidence, ratio: Rate, bound_rate: Rate) -> Measured:
    def of(m: Map, realised: bool) -> dict[str, Estimate]:
        return {o: _scaled(ratio(e, m, o), _fewer(e, o, realised)) for o in e.others}

    def bound(other: str) -> Estimate:
        found = compared(e, e.bound, other, partial(bound_rate, e, e.bound))
        return _scaled(found, _fewer(e, other, True))

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
    found = stats.quotient(*pair)
    return stats.as_exact(found, judge.COUNTED)


def _scaled(ratio: Estimate, factor: Estimate) -> Estimate:
    for side in (ratio, factor):
        if side.value is None:
            return side
    return stats.scaled(ratio, factor.value)


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
