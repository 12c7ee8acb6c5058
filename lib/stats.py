"""Medians, intervals, ratios and slopes. Every estimate carries n, its method and its reason.

The unit of resampling is the repetition of a whole call, never the tokens inside one: the steps
of one call are correlated.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats as scipy_stats

CONFIDENCE = 0.95
MIN_N_MEDIAN = 6  # below, no pair of order statistics covers the median with 95 %: 1 - 2 / 2**n
BOOTSTRAP_DRAWS = 5000


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval. `value` is None with a `reason`; so may the interval be."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    method: str = ""
    reason: str = ""

    def resolved_from(self, reference: float = 1.0) -> bool | None:
        """Whether the interval excludes `reference`; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return not self.low <= reference <= self.high


def missing(reason: str) -> Estimate:
    """An estimate that does not exist, and why."""
    return Estimate(None, reason=reason)


def median(samples: Sequence[float]) -> Estimate:
    """Median with the distribution-free interval between two order statistics (needs n >= 6)."""
    return percentile(samples, 50)


def percentile(samples: Sequence[float], q: float) -> Estimate:
    """The q-th percentile with its order-statistic interval, or the maximum where n is too small.

    q = 50 gives the median. A high percentile is quoted only where the sample bounds it at 95 %
    (p95 from n >= 59, p99 from n >= 299); below that the value is the largest sample and the
    method says so.
    """
    ordered = sorted(samples)
    n = len(ordered)
    if n == 0:
        return missing("no samples")
    p = q / 100
    if q > 50 and p**n > 1 - CONFIDENCE:
        return Estimate(ordered[-1], n=n, method=f"max of {n}",
                        reason=f"p{q:g} needs n >= {required_n(q)}")  # fmt: skip
    value = statistics.median(ordered) if q == 50 else float(np.percentile(ordered, q))
    name = "median" if q == 50 else f"p{q:g}"
    lower, upper = _order_statistic_ranks(n, p)
    low = None if lower is None else ordered[lower]
    high = None if upper is None else ordered[upper]
    if q > 50 and upper is None:  # the maximum still bounds it from above, one-sided
        return Estimate(value, low, ordered[-1], n, f"{name}, one-sided upper bound")
    if low is None or high is None:
        return Estimate(value, n=n, method=name,
                        reason=f"n = {n}: an interval needs n >= {MIN_N_MEDIAN}")  # fmt: skip
    return Estimate(value, low, high, n, f"{name}, order statistics")


def required_n(q: float) -> int:
    """Smallest n whose maximum lies above the q-th percentile with 95 % confidence."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(q / 100))


def _order_statistic_ranks(n: int, p: float) -> tuple[int | None, int | None]:
    """Zero-based ranks of the order statistics that cover the p-quantile with 95 %, two-sided.

    The number of samples below the quantile is binomial(n, p). Each tail gets 2.5 %; an end that
    the sample cannot bound is None.
    """
    tail = (1 - CONFIDENCE) / 2
    cdf = scipy_stats.binom.cdf(np.arange(n), n, p)  # cdf[k] = P(at most k samples below)
    lower = int(np.searchsorted(cdf, tail, side="right")) - 1  # largest k with cdf[k] <= tail
    upper = int(np.searchsorted(cdf, 1 - tail, side="left"))  # smallest k with cdf[k] >= 1 - tail
    return (lower if lower >= 0 else None), (upper if upper < n else None)


def ratio(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Estimate:
    """median(a) / median(b) with a percentile bootstrap over repetitions (both resampled)."""
    if not a or not b:
        return missing("no samples on one side of the ratio")
    reference = statistics.median(b)
    if reference == 0:
        return missing("the reference median is zero")
    value = statistics.median(a) / reference
    n = min(len(a), len(b))
    if n < MIN_N_MEDIAN:
        return Estimate(value, n=n, method="ratio of medians",
                        reason=f"n = {n}: an interval needs n >= {MIN_N_MEDIAN}")  # fmt: skip
    rng = np.random.default_rng(seed)
    draws = _boot_medians(a, rng) / _boot_medians(b, rng)
    low, high = np.percentile(draws, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high), n, "ratio of medians, bootstrap")


def _boot_medians(samples: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    picks = rng.integers(len(samples), size=(BOOTSTRAP_DRAWS, len(samples)))
    return np.median(np.asarray(samples, dtype=float)[picks], axis=1)


def slope(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Theil-Sen slope of y over x with Sen's interval: the median of all pairwise slopes.

    Robust against the few slow calls that a shared host produces. Needs two different x.
    """
    if len(set(x)) < 2:
        return missing(f"a slope needs two different x, got {sorted(set(x))}")
    fit = scipy_stats.theilslopes(y, x, alpha=CONFIDENCE)
    if len(x) < MIN_N_MEDIAN:
        return Estimate(float(fit.slope), n=len(x), method="Theil-Sen slope",
                        reason=f"n = {len(x)}: an interval needs n >= {MIN_N_MEDIAN}")  # fmt: skip
    return Estimate(float(fit.slope), float(fit.low_slope), float(fit.high_slope), len(x),
                    "Theil-Sen slope")  # fmt: skip


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate times an exact positive factor (a unit, a token count, a parameter count)."""
    if factor <= 0:
        raise ValueError(f"the factor must be positive, got {factor}")
    return _mapped(estimate, lambda x: x * factor)


def inverse(estimate: Estimate, numerator: float = 1.0) -> Estimate:
    """numerator / estimate; the interval's ends swap. None where the interval reaches zero."""
    if estimate.value is None:
        return estimate
    if estimate.value <= 0:
        return missing(f"the value {estimate.value:g} has no positive inverse")
    swapped = replace(estimate, low=estimate.high, high=estimate.low)
    if swapped.high is not None and swapped.high <= 0:
        swapped = replace(swapped, high=None, reason="the interval reaches zero")
    return _mapped(swapped, lambda x: numerator / x)


def quotient(a: Estimate, b: Estimate) -> Estimate:
    """a / b of two independent positive estimates.

    The interval goes from low / high to high / low: at least as wide as the one that would resample
    both, since both ends would have to be extreme at once.
    """
    for side in (a, b):
        if side.value is None:
            return missing(side.reason)
    if b.value <= 0:
        return missing(f"the divisor {b.value:g} is not positive")
    n, method = min(a.n, b.n), f"({a.method}) / ({b.method})"
    if None in (a.low, a.high, b.low, b.high) or b.low <= 0:
        reason = a.reason or b.reason or "no interval"
        return Estimate(a.value / b.value, n=n, method=method, reason=reason)
    return Estimate(a.value / b.value, a.low / b.high, a.high / b.low, n, method)


def _mapped(estimate: Estimate, function) -> Estimate:
    ends = {
        name: None if getattr(estimate, name) is None else function(getattr(estimate, name))
        for name in ("value", "low", "high")
    }
    return replace(estimate, **ends)


def gaps(stamps: Sequence[float]) -> list[float]:
    """Differences between neighbours, such as the seconds between stamped tokens."""
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


def spread(samples: Sequence[float]) -> float | None:
    """(max - min) / median: what a reader sees first when a host is noisy. None below n = 2."""
    if len(samples) < 2:
        return None
    return (max(samples) - min(samples)) / statistics.median(samples)
