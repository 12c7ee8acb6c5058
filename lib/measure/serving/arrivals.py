"""When requests arrive and how long they are, drawn before the run, and a test of an arrival law.

A client that draws its arrivals while it runs can be slowed by what it measures. Here every
instant is an offset from the start of the run, fixed by a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

LAWS = ("poisson", "fixed", "closed")
# A law is rejected below this; five tests of one run, so a true law fails one run in some 200.
P_LEAST = 0.001
LEAST_ARRIVALS = 30
CV_DRAWS = 20_000
MOST_GAPS = 1_000  # more would only take longer to draw
ARRIVALS_PER_BIN = 10
FIXED_TOLERANCE_S = 0.005  # how late a request of a fixed rate may be and still keep the law


@dataclass(frozen=True)
class Load:
    """How a server is loaded: by a rate (1/s, Poisson or fixed), or by users in a closed loop."""

    law: str
    value: float

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(f"unknown arrival law {self.law!r}; use one of {', '.join(LAWS)}")
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"a load must be positive, got {self.law} {self.value}")
        if self.law == "closed" and self.value != int(self.value):
            raise ValueError(f"users are whole numbers, got {self.value}")

    @property
    def users(self) -> int | None:
        """Users of a closed loop, each with one request in flight; None where a rate is set."""
        return int(self.value) if self.law == "closed" else None

    @property
    def rate_per_s(self) -> float | None:
        """Requests per second that arrive; None in a closed loop, where the server sets it."""
        return None if self.law == "closed" else float(self.value)

    @property
    def label(self) -> str:
        """A short name, such as "closed 8" or "poisson 2.5/s"."""
        return f"{self.law} {self.value:g}" + ("" if self.law == "closed" else "/s")


@dataclass(frozen=True)
class Lengths:
    """Token counts: all equal to `median`, or from a lognormal law with this `sigma` of logs.

    Draws are rounded; one outside [low, high] is drawn again.
    """

    median: int
    sigma: float = 0.0
    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        high = math.inf if self.high is None else self.high
        if self.median < 1 or self.low < 1 or not self.low <= self.median <= high:
            raise ValueError(f"lengths need 1 <= low <= median <= high, got {self}")
        if self.sigma < 0:
            raise ValueError(f"sigma must not be negative, got {self.sigma}")

    @property
    def label(self) -> str:
        """A short name, such as "512" or "lognormal(512, 0.5)"."""
        return f"lognormal({self.median}, {self.sigma:g})" if self.sigma else str(self.median)

    def draw(self, count: int, seed: str) -> list[int]:
        """`count` lengths, the same for the same seed."""
        if not self.sigma:
            return [self.median] * count
        rng, high = _rng(seed), math.inf if self.high is None else self.high
        lengths: list[int] = []
        while len(lengths) < count:
            values = np.rint(rng.lognormal(math.log(self.median), self.sigma, count)).astype(int)
            lengths += [int(value) for value in values if self.low <= value <= high]
        return lengths[:count]


def _rng(seed: str) -> np.random.Generator:
    return np.random.default_rng(list(seed.encode()))


def offsets_s(load: Load, duration_s: float, seed: str) -> list[float]:
    """Arrival instants (s from the start) of an open loop over `duration_s`.

    Poisson: exponential gaps, the first one before the first arrival. Fixed: every 1 / rate, the
    first after one gap. Raises for a closed loop, whose arrivals follow from the answers.
    """
    rate = load.rate_per_s
    if rate is None:
        raise ValueError("arrivals of a closed loop follow from the answers; use ramp_s")
    if load.law == "fixed":
        return [n / rate for n in range(1, int(rate * duration_s + 1e-9) + 1)]
    rng, times, last = _rng(seed), [], 0.0
    while True:
        for gap in rng.exponential(1 / rate, 256):
            last += float(gap)
            if last > duration_s:
                return times
            times.append(last)


def ramp_s(users: int, ramp: float) -> list[float]:
    """First instants (s) of the users of a closed loop, spread evenly over `ramp` seconds.

    Users that all start at once meet in the server as one burst, whose TTFT is not the load's.
    """
    return [ramp * user / users for user in range(users)]


@dataclass(frozen=True)
class LawCheck:
    """What a test of an arrival law found: rates (1/s) and p-values by test, None where not made.

    Tests for Poisson arrivals of a stated rate: `rate` (the time that n gaps take is gamma
    distributed), `gaps` (Kolmogorov-Smirnov against the exponential law), `spread` (the coefficient
    of variation of the gaps, against seeded draws), `counts` (variance over mean of the arrivals in
    equal bins, chi-square), which sees bursts and gaps that depend on each other, `trend`
    (Laplace's test: the mean instant between the first and the last), which sees one that slows.
    """

    law: str
    n: int
    asked_per_s: float
    rate_per_s: float
    p: dict[str, float]
    worst_s: float | None = None

    @property
    def failing(self) -> tuple[str, ...]:
        """Names of the tests that reject the law."""
        late = self.worst_s is not None and self.worst_s > FIXED_TOLERANCE_S
        return tuple(name for name, p in self.p.items() if p < P_LEAST) + ("gaps",) * late

    @property
    def ok(self) -> bool:
        """Whether no test rejects the law."""
        return not self.failing


def check_law(times_s: Sequence[float], load: Load) -> LawCheck:
    """Test observed arrival instants (s, any zero) against the law that was asked for.

    Needs LEAST_ARRIVALS. For a fixed rate the largest distance from an even grid is compared
    with FIXED_TOLERANCE_S.
    """
    rate = load.rate_per_s
    if rate is None:
        raise ValueError("a closed loop has no arrival law to test")
    times = np.sort(np.asarray(times_s, dtype=float))
    n = len(times)
    if n < LEAST_ARRIVALS:
        raise ValueError(f"a test of an arrival law needs {LEAST_ARRIVALS} arrivals, got {n}")
    gaps = np.diff(times)
    actual_rate = float((n - 1) / (times[-1] - times[0]))
    if load.law == "fixed":
        off = times - np.arange(n) / rate
        worst = float(np.max(np.abs(off - np.median(off))))
        return LawCheck(load.law, n, rate, actual_rate, {}, worst)
    p = {
        "rate": _two_sided(float(scipy_stats.gamma.cdf(gaps.sum() * rate, n - 1))),
        "gaps": float(scipy_stats.kstest(gaps, "expon", args=(0, 1 / rate)).pvalue),
        "spread": _spread_p(gaps),
        "counts": _counts_p(times),
        "trend": _trend_p(times),
    }
    return LawCheck(load.law, n, rate, actual_rate, p)


def _two_sided(cdf: float) -> float:
    return min(1.0, 2 * min(cdf, 1 - cdf))


def _spread_p(gaps: np.ndarray) -> float:
    """Where the coefficient of variation of the first MOST_GAPS gaps lies among seeded exponential
    samples."""
    gaps = gaps[:MOST_GAPS]
    rng, below, count = np.random.default_rng(0), 0, 0
    spread = gaps.std() / gaps.mean()
    while count < CV_DRAWS:
        samples = rng.exponential(size=(2000, len(gaps)))
        below += int(np.sum(samples.std(axis=1) / samples.mean(axis=1) <= spread))
        count += 2000
    return _two_sided((below + 0.5) / (count + 1))


def _counts_p(times: np.ndarray) -> float:
    """Index of dispersion of counts in equal bins over the observed span."""
    bins = max(3, len(times) // ARRIVALS_PER_BIN)
    counts, _ = np.histogram(times, bins=bins)
    statistic = float(np.sum((counts - counts.mean()) ** 2) / counts.mean())
    return _two_sided(float(scipy_stats.chi2.cdf(statistic, bins - 1)))


def _trend_p(times: np.ndarray) -> float:
    """Instants between the first and the last are spread evenly, so that their mean is normal."""
    inside = (times[1:-1] - times[0]) / (times[-1] - times[0])
    deviations = (inside.mean() - 0.5) * math.sqrt(12 * len(inside))
    return _two_sided(float(scipy_stats.norm.cdf(deviations)))
