"""Medians, intervals, ratios and slopes. Every estimate carries n, its method and its reason.

The unit of resampling is the repetition of a whole call, never the tokens inside one: the steps
of one call are correlated.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats as scipy_stats

CONFIDENCE = 0.95
LEAST_LEVEL = 0.90  # an interval that holds less often than this is none
MIN_N_MEDIAN = 6  # below, no pair of order statistics covers the median with 95 %: 1 - 2 / 2**n
TOO_FEW = "an interval needs n >= "
BOOTSTRAP_DRAWS = 5000
POWER = 0.8  # of an effect that "could have been seen"
POWER_POINTS = 1000  # of the noise, over which the power is a mean
AA_LEAST = 0.85  # share of pairs of blocks; 0.95 is expected, and blocks that overlap go together


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. `value` is None with a `reason`; so may the interval be.

    `level` is how often such an interval covers; 0.95 unless there were too few repetitions for it,
    and None where `low` and `high` are the range of a few visits, or come from such ranges.
    `visits` are those that the interval or range is over, 0 within one. `records` are the ids of
    the rows that it comes from, where they are known.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    method: str = ""
    reason: str = ""
    records: tuple[str, ...] = ()
    level: float | None = CONFIDENCE
    visits: int = 0

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
        return Estimate(
            ordered[-1], n=n, method=f"max of {n}", reason=f"p{q:g} needs n >= {required_n(q)}"
        )
    value = statistics.median(ordered) if q == 50 else float(np.percentile(ordered, q))
    name = "median" if q == 50 else f"p{q:g}"
    lower, upper = _order_statistic_ranks(n, p)
    low = None if lower is None else ordered[lower]
    high = None if upper is None else ordered[upper]
    if q > 50 and upper is None:  # the maximum still bounds it from above, one-sided
        below = 0.0 if lower is None else float(scipy_stats.binom.cdf(lower, n, p))
        method, level = f"{name}, one-sided upper bound", min(1 - p**n - below, CONFIDENCE)
        return Estimate(value, low, ordered[-1], n, method, level=level)
    if low is None or high is None:
        return of_few(value, n, name, MIN_N_MEDIAN)
    return Estimate(value, low, high, n, f"{name}, order statistics")


def required_n(q: float) -> int:
    """Smallest n whose maximum lies above the q-th percentile with 95 % confidence."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(q / 100))


@functools.lru_cache(maxsize=4096)  # samples are of few sizes, and a table holds many
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


def over_visits(values: Sequence[float]) -> Estimate:
    """The median of one value a visit: from six visits with an interval over visits, of two to five
    with their range, which has no level."""
    est = median(values)
    method = f"median of {est.n} visits"
    if est.low is not None or est.n < 2:
        return replace(est, method=f"{method}, order statistics", visits=est.n if est.low else 0)
    ends, method = (min(values), max(values)), f"{method}, their range"
    return Estimate(est.value, *ends, est.n, method, level=None, visits=est.n)


def of_visits(samples: Sequence[Sequence[float]], q: float = 50) -> Estimate:
    """The percentile of the calls of one visit; of several the median of what each says, without an
    interval where one of them says its maximum."""
    each = [percentile(values, q) for values in samples]
    if len(each) == 1:
        return each[0]
    over = over_visits([estimate.value for estimate in each])
    largest = [e for e in each if e.method.startswith("max")]
    if not largest:
        return over
    counts = sorted(e.n for e in each)
    most = " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))
    method = f"max of {most}, over {over.n} visits"
    return Estimate(over.value, n=over.n, method=method, reason=largest[0].reason)


def exact(value: float, method: str = "single reading") -> Estimate:
    """A count or one reading, which has no sampling error."""
    return Estimate(value, n=1, method=method, reason="one reading, no interval")


def as_exact(estimate: Estimate, method: str) -> Estimate:
    """What was computed from exact values, which is exact again; a missing one stays as it is."""
    return estimate if estimate.value is None else exact(estimate.value, method)


def of_few(value: float, n: int, method: str, least: int) -> Estimate:
    """A value of fewer samples than an interval needs."""
    return Estimate(value, n=n, method=method, reason=f"n = {n}: {TOO_FEW}{least}")


def change(ratio: Estimate, digits: int = 1) -> str:
    """How far a ratio is from 1, with its interval where it has one: "-13.1% [-16.0%, -9.2%]"."""
    value, *ends = (
        None if x is None else f"{x - 1:+.{digits}%}" for x in (ratio.value, ratio.low, ratio.high)
    )
    return f"{value} [{', '.join(ends)}]" if None not in ends else value


def mean(samples: Sequence[float]) -> Estimate:
    """Mean with Student's t interval (n >= 2): for means of blocks, which are nearly normal."""
    n = len(samples)
    if n == 0:
        return missing("no samples")
    value = statistics.fmean(samples)
    if n < 2:
        return of_few(value, n, "mean", 2)
    half = scipy_stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(samples) / n**0.5
    return Estimate(value, value - half, value + half, n, "mean, t interval")


def line(x: Sequence[float], y: Sequence[float]) -> tuple[Estimate, Estimate]:
    """Intercept and slope of y over x by least squares of relative errors, with t intervals.

    Each point weighs 1 / y^2: the noise of an energy grows with the energy. Needs two different x,
    and three points for the intervals.
    """
    if len(set(x)) < 2:
        reason = f"a line needs two different x, got {sorted(set(x))}"
        return missing(reason), missing(reason)
    at, weight = np.asarray(x, dtype=float), 1 / np.asarray(y, dtype=float)
    design = np.stack([weight, at * weight], axis=1)
    inverted = np.linalg.inv(design.T @ design)
    fit = inverted @ design.T @ np.ones(len(at))
    method, free = "least squares of relative errors", len(at) - 2
    if free < 1:
        return tuple(of_few(float(v), len(at), method, 3) for v in fit)
    variance = float(np.sum((1 - design @ fit) ** 2)) / free
    half = scipy_stats.t.ppf((1 + CONFIDENCE) / 2, free) * np.sqrt(variance * inverted.diagonal())
    return tuple(
        Estimate(float(v), float(v - h), float(v + h), len(at), method)
        for v, h in zip(fit, half, strict=True)
    )


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
        return of_few(value, n, "ratio of medians", MIN_N_MEDIAN)
    rng = np.random.default_rng(seed)
    draws = _boot_medians(a, rng) / _boot_medians(b, rng)
    low, high = np.percentile(draws, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high), n, "ratio of medians, bootstrap")


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Geometric mean of a / b over pairs that were taken side by side, with a t interval (n >= 2).

    What both of a pair share, such as a slow drift, cancels.
    """
    if len(a) != len(b) or not a:
        return missing(f"pairs are needed, got {len(a)} and {len(b)}")
    logs = mean([math.log(x / y) for x, y in zip(a, b, strict=True)])
    return replace(_mapped(logs, math.exp), method="geometric mean of paired ratios")


@dataclass(frozen=True)
class Blocks:
    """What blocks of calls in the order A B B A say of B / A.

    `ratio` has its interval; `noise` is the standard deviation of one block's log, what blocks of
    one side differ by; `rounds` of four blocks each.
    """

    ratio: Estimate
    noise: float
    rounds: int

    def power(self, effect: float) -> float:
        """How often a true ratio of 1 + `effect` is resolved at this noise."""
        shift = abs(math.log1p(effect)) * self.rounds**0.5
        if not self.noise:
            return float(shift > 0)
        return _power(shift / self.noise, 3 * self.rounds - 1, self.ratio.level)

    def least(self, power: float = POWER) -> float:
        """The smallest effect (share of A, 0.02 is 2 %) that is resolved with this power."""
        free, level = 3 * self.rounds - 1, self.ratio.level
        low, high = 0.0, 1.0
        while _power(high, free, level) < power:
            low, high = high, 2 * high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if _power(middle, free, level) < power else (low, middle)
        return math.expm1(high * self.noise / self.rounds**0.5)


def _power(shift: float, free: int, level: float) -> float:
    """How often Student's t of a mean `shift` standard errors from zero is outside its interval:
    the mean over what the noise may be estimated as."""
    limit = scipy_stats.t.ppf((1 + level) / 2, free)
    places = (np.arange(POWER_POINTS) + 0.5) / POWER_POINTS
    limits = limit * np.sqrt(scipy_stats.chi2.ppf(places, free) / free)
    outside = scipy_stats.norm.sf(limits - shift) + scipy_stats.norm.cdf(-limits - shift)
    return float(np.mean(outside))


def abba(
    rounds: Sequence[Sequence[float]], within: float = 0.0, level: float = CONFIDENCE
) -> Blocks:
    """B / A from one positive value a block, `rounds` of four in the order A, B, B, A.

    Calls within a block are not independent, so that a block is one value. In a round the mean log
    of B less that of A has lost what drifts steadily. Its noise is that of one block, learnt from A
    against A and B against B within rounds and from how rounds differ: 3 * rounds - 1 degrees of
    freedom. It is never taken to be less than `within`, what the calls of one block say.
    """
    if not rounds:
        raise ValueError("no round of A B B A")
    logs = [[math.log(value) for value in blocks] for blocks in rounds]
    shifts = [(b1 + b2 - a1 - a2) / 2 for a1, b1, b2, a2 in logs]
    shift, free = statistics.fmean(shifts), 3 * len(rounds) - 1
    squares = sum(((a1 - a2) ** 2 + (b1 - b2) ** 2) / 2 for a1, b1, b2, a2 in logs)
    squares += sum((one - shift) ** 2 for one in shifts)
    noise = max((squares / free) ** 0.5, within)
    half = scipy_stats.t.ppf((1 + level) / 2, free) * noise / len(rounds) ** 0.5
    ends = (math.exp(x) for x in (shift, shift - half, shift + half))
    estimate = Estimate(*ends, 2 * len(rounds), "blocks A B B A, t interval", level=level)
    return Blocks(estimate, noise, len(rounds))


def median_error(samples: Sequence[float]) -> float:
    """Standard error of the log of the median of positive samples, by the median distance from it,
    which a few slow calls do not move; 0 for one sample."""
    logs = [math.log(x) for x in samples]
    middle = statistics.median(logs)
    spread = statistics.median(abs(x - middle) for x in logs) / scipy_stats.norm.ppf(0.75)
    return float((math.pi / 2 / len(logs)) ** 0.5 * spread)


def _boot_medians(samples: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    picks = rng.integers(len(samples), size=(BOOTSTRAP_DRAWS, len(samples)))
    return np.median(np.asarray(samples, dtype=float)[picks], axis=1)


def aa_coverage(samples: Sequence[float], *, block: int = MIN_N_MEDIAN) -> Estimate:
    """A/A check: of neighbouring blocks of one arm, the share whose interval of the ratio holds 1.

    Both blocks are the same arm, so that about 95 % should; fewer say that the arm changes from
    block to block by more than the repetitions within one tell. Halves drawn at random would not
    show that: they mix what was measured early and late. n is the number of pairs of blocks.
    """
    if len(samples) < 2 * block:
        return missing(f"n = {len(samples)}: two blocks need n >= {2 * block}")
    starts = range(len(samples) - 2 * block + 1)
    pairs = [(samples[i : i + block], samples[i + block : i + 2 * block]) for i in starts]
    held = [not ratio(a, b).resolved_from(1.0) for a, b in pairs]
    why = "blocks share samples: no interval"
    return Estimate(sum(held) / len(held), n=len(held), method="A/A, neighbours", reason=why)


def aa_in_order(samples: Sequence[float]) -> Estimate:
    """Second half over first half of one arm, as measured: 1 unless the arm changed meanwhile."""
    half = len(samples) // 2
    return ratio(samples[half:], samples[:half])


def slope(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Theil-Sen slope of y over x with Sen's interval: the median of the slopes of all pairs.

    Robust against the few slow calls that a shared host produces. Needs two different x. The
    interval leaves out as many of the steepest and the flattest pairs as 95 % allow. Where even all
    of them hold less often, they are the interval, with the level that holds: 92.9 % for 6 + 2
    points, 90 % for 3 + 3. Levels are exact if the noise is alike at every x.
    """
    if len(set(x)) < 2:
        return missing(f"a slope needs two different x, got {sorted(set(x))}")
    points = sorted(zip(x, y, strict=True))
    slopes = sorted(
        (d - b) / (c - a) for (a, b), (c, d) in itertools.combinations(points, 2) if c > a
    )
    value, n, method = statistics.median(slopes), len(points), "Theil-Sen slope"
    if n < MIN_N_MEDIAN:
        return of_few(value, n, method, MIN_N_MEDIAN)
    cut, level = sen_interval(
        tuple(len(list(same)) for _, same in itertools.groupby(p[0] for p in points))
    )
    if level < LEAST_LEVEL:
        why = f"n = {n}: all pairs together hold at {level:.0%}, {LEAST_LEVEL:.0%} are needed"
        return Estimate(value, n=n, method=method, reason=why)
    return Estimate(value, slopes[cut], slopes[-1 - cut], n, method, level=min(level, CONFIDENCE))


@functools.lru_cache(maxsize=256)
def sen_interval(counts: tuple[int, ...]) -> tuple[int, float]:
    """How many slopes of pairs Sen's interval leaves out at each end, and its exact level.

    `counts` are the points at each x. With slopes taken from the true one, each order of the points
    is equally likely, so that the pairs that rise are distributed as the inversions of a word with
    these numbers of each letter: the coefficients of a Gaussian multinomial.
    """
    ways, letters = [1], 0
    for count in counts:
        for i in range(1, count + 1):  # times (1 - q^(letters + i)), over (1 - q^i)
            longer = ways + [0] * (letters + i)
            for at, number in enumerate(ways):
                longer[at + letters + i] -= number
            for at in range(i, len(longer)):
                longer[at] += longer[at - i]
            ways = longer[: len(longer) - i]
        letters += count
    below, total = list(itertools.accumulate(ways)), sum(ways)
    outside = (1 - CONFIDENCE) / 2
    cut = max(sum(1 for n in below if n <= outside * total) - 1, 0)
    return cut, 1 - 2 * below[cut] / total


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
    level = None if None in (a.level, b.level) else min(a.level, b.level)
    if None in (a.low, a.high, b.low, b.high) or b.low <= 0:
        reason = a.reason or b.reason or "no interval"
        return Estimate(a.value / b.value, n=n, method=method, reason=reason)
    visits = 0 if level is None else max(a.visits, b.visits)
    ends = (a.low / b.high, a.high / b.low)
    return Estimate(a.value / b.value, *ends, n, method, level=level, visits=visits)


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
