"""Statistics: numbers that a reader can check with pencil and paper."""

import pytest

from lib import stats


def test_median_of_six_spans_all_samples():
    # P(all six on one side of the median) = 2 / 2**6 = 3.1 %, so min and max cover it with 96.9 %.
    est = stats.median([6, 1, 5, 2, 4, 3])
    assert (est.value, est.low, est.high, est.n) == (3.5, 1, 6, 6)


def test_median_of_ten_uses_second_and_ninth():
    # P(at most one of ten below the median) = 11 / 1024 = 1.07 % in each tail.
    est = stats.median(range(1, 11))
    assert (est.value, est.low, est.high) == (5.5, 2, 9)


def test_five_samples_have_a_median_but_no_interval():
    est = stats.median([1, 2, 3, 4, 5])
    assert est.value == 3 and est.low is None and "n >= 6" in est.reason


def test_no_samples_is_missing_with_a_reason():
    assert stats.median([]) == stats.missing("no samples")


def test_p95_needs_59_samples():
    assert stats.required_n(95) == 59 and stats.required_n(99) == 299
    few = stats.percentile(range(58), 95)
    assert (few.value, few.method) == (57, "max of 58")
    enough = stats.percentile(range(59), 95)
    assert enough.method.startswith("p95") and enough.high == 58


def test_ratio_of_constants_has_a_point_interval():
    est = stats.ratio([2.0] * 6, [4.0] * 6)
    assert (est.value, est.low, est.high) == (0.5, 0.5, 0.5)


def test_ratio_never_leaves_the_range_of_its_samples():
    est = stats.ratio([2, 2, 3, 3, 4, 4], [1, 1, 1, 1, 1, 1])
    assert 2 <= est.low <= est.value == 3 <= est.high <= 4


def test_ratio_reasons():
    assert "zero" in stats.ratio([1.0] * 6, [0.0] * 6).reason
    assert stats.ratio([1.0] * 5, [2.0] * 6).low is None
    assert stats.ratio([], [1.0]).value is None


def test_median_interval_covers_in_95_percent_of_experiments():
    import numpy as np

    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(2000):
        est = stats.median(rng.exponential(size=10).tolist())
        hits += est.low <= np.log(2) <= est.high
    assert 0.965 < hits / 2000 < 0.99  # exact coverage is 1 - 22 / 1024 = 97.9 %


def test_slope_recovers_seconds_per_token_despite_one_slow_call():
    tokens = [64] * 4 + [128] * 3 + [256] * 3
    seconds = [0.5 + 0.1 * g for g in tokens]
    seconds[0] += 30  # one stall
    est = stats.slope(tokens, seconds)
    assert est.value == pytest.approx(0.1)
    assert est.low <= 0.1 + 1e-9 and est.high >= 0.1 - 1e-9


def test_slope_needs_two_lengths():
    assert "two different" in stats.slope([64, 64], [1, 2]).reason


def test_scaling_and_inverting_move_the_interval():
    est = stats.median([2, 4, 4, 4, 4, 5])
    assert stats.scaled(est, 10).high == 50
    inverse = stats.inverse(est, 20)
    assert (inverse.value, inverse.low, inverse.high) == (5, 4, 10)
    with pytest.raises(ValueError, match="positive"):
        stats.scaled(est, 0)


def test_inverse_of_an_interval_that_reaches_zero_is_open():
    est = stats.Estimate(1.0, -0.5, 2.0, 6)
    inverse = stats.inverse(est)
    assert inverse.low == 0.5 and inverse.high is None and "zero" in inverse.reason


def test_resolved_from():
    assert stats.Estimate(1.2, 1.1, 1.3).resolved_from(1.0) is True
    assert stats.Estimate(1.2, 0.9, 1.3).resolved_from(1.0) is False
    assert stats.Estimate(1.2).resolved_from(1.0) is None


def test_spread():
    assert stats.spread([9, 10, 11]) == pytest.approx(0.2)
    assert stats.spread([1]) is None
