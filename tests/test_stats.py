"""Statistics: numbers that a reader can check with pencil and paper."""

import math

import numpy as np
import pytest

from lib import stats
from tools import coverage


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


@pytest.mark.parametrize(
    "counts, cut, level",
    [
        ((6, 2), 0, 1 - 2 / 28),  # 28 places for the two; one has both at an end
        ((3, 3), 0, 1 - 2 / 20),
        ((4, 4), 0, 1 - 2 / 70),
        ((6, 3), 1, 1 - 2 * 2 / 84),  # 1 + 1 of 84 words have at most one inversion
        ((1, 1, 1, 1), 0, 1 - 2 / 24),
        ((6, 10), 11, 1 - 2 * 168 / 8008),  # Mann and Whitney's table: 11 for 6 and 10
        ((10, 1, 1), 1, 1 - 2 * 3 / 132),  # 1 + 2
    ],
)
def test_the_level_of_sens_interval_is_exact(counts, cut, level):
    assert stats.sen_interval(counts) == (cut, pytest.approx(level))


def test_an_interval_says_its_level_and_there_is_none_below_90_percent():
    x, y = [64] * 6 + [128] * 2, [6.4, 6.5, 6.6, 6.3, 6.2, 6.4, 12.8, 13.0]
    est = stats.slope(x, y)
    assert est.level == pytest.approx(26 / 28)
    assert (est.low, est.high) == (pytest.approx(6.2 / 64), pytest.approx(6.8 / 64))
    assert stats.inverse(stats.scaled(est, 2)).level == est.level
    assert stats.quotient(est, stats.median(range(1, 11))).level == est.level
    assert stats.slope(x + [128], [*y, 12.9]).level == stats.CONFIDENCE
    lone = stats.slope(x[:7], y[:7])
    assert lone.value is not None and lone.low is None
    assert lone.reason == "n = 7: all pairs together hold at 71%, 90% are needed"


@pytest.mark.parametrize("case", coverage.cases(), ids=lambda case: f"{case.of}, {case.counts}")
def test_slopes_of_every_profile_hold_at_95_percent(case):
    """Exactly where the noise is alike; simulated where it grows with the time of a call."""
    counts = tuple(n for _, n in sorted(case.calls.items()))
    assert stats.sen_interval(counts)[1] >= stats.CONFIDENCE
    share, level = coverage.coverage(
        lambda rng: coverage.slope(case.calls, rng, "normal", grows=True), coverage.STEP_S, 400
    )
    assert level == stats.CONFIDENCE and share > 0.92  # 95 % less three standard errors


def test_what_too_few_calls_cover_is_seen_in_the_simulation():
    """6 + 2 calls, as in the released set: 92.9 % where noise is alike, 84 % where it grows."""
    for grows, around in ((False, 26 / 28), (True, 0.84)):
        share, level = coverage.coverage(
            lambda rng, g=grows: coverage.slope({64: 6, 128: 2}, rng, "normal", g),
            coverage.STEP_S,
            1000,
        )
        assert level == pytest.approx(26 / 28) and share == pytest.approx(around, abs=0.035)


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


# --- A/A


def noise(kind, seed, n=40):
    rng = np.random.default_rng(seed)
    return {"normal": 1 + 0.05 * rng.normal(size=n), "long tail": 1 + rng.exponential(size=n)}[
        kind
    ].tolist()


@pytest.mark.parametrize("kind", ["normal", "long tail"])
@pytest.mark.parametrize("seed", [1, 2])
def test_of_neighbouring_blocks_about_95_percent_look_alike(kind, seed):
    share = stats.aa_coverage(noise(kind, seed))
    assert share.value >= stats.AA_LEAST and share.n == 40 - 12 + 1
    assert share.low is None and "share samples" in share.reason
    assert not stats.aa_in_order(noise(kind, seed)).resolved_from(1.0)


def test_intervals_that_are_too_narrow_are_found_out(monkeypatch):
    """A bootstrap over four times as many samples as there are gives intervals half as wide."""
    draw = stats._boot_medians
    monkeypatch.setattr(stats, "_boot_medians", lambda samples, rng: draw([*samples] * 4, rng))
    assert stats.aa_coverage(noise("normal", 1, n=200)).value < stats.AA_LEAST


@pytest.mark.parametrize(
    "level",
    [lambda i: 1 + 0.002 * i, lambda i: 1.0 if i < 20 else 1.1],
    ids=["drift", "two states"],
)
def test_what_changes_while_it_is_measured_shows_in_order(level):
    samples = [level(i) + 0.2 * (x - 1) for i, x in enumerate(noise("normal", 1))]
    assert stats.aa_in_order(samples).resolved_from(1.0)
    assert stats.aa_in_order(samples).value > 1.03


def test_a_host_that_changes_from_block_to_block_is_found_out():
    """Six calls fast, six slow, and so on: random halves would be alike, neighbours are not."""
    samples = [(1.0 if i // 6 % 2 else 1.2) * x for i, x in enumerate(noise("normal", 1, n=48))]
    assert stats.aa_coverage(samples).value < 0.7
    assert stats.aa_coverage(noise("normal", 1, n=48)).value >= stats.AA_LEAST


def test_an_a_a_check_needs_two_blocks_of_six():
    assert stats.aa_coverage([1.0] * 11).reason == "n = 11: two blocks need n >= 12"
    assert stats.aa_coverage([1.0] * 12).value == 1


def test_over_visits_the_estimate_is_of_their_medians():
    assert stats.over_visits([2.0]).low is None
    few = stats.over_visits([1.0, 2.0, 4.0])
    assert (few.value, few.low, few.high, few.n, few.level) == (2.0, 1.0, 4.0, 3, None)
    assert stats.scaled(few, 2).level is None and stats.quotient(few, few).level is None
    six = stats.over_visits([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (six.value, six.low, six.high, six.level) == (3.5, 1.0, 6.0, stats.CONFIDENCE)
    eight = stats.over_visits([float(i) for i in range(1, 9)])
    assert (eight.low, eight.high) == (1.0, 8.0) and "8 visits" in eight.method


# --- blocks in the order A B B A ---------------------------------------------------------------


def test_a_steady_drift_cancels_between_the_sides_of_a_round():
    """Each block takes twice the time of the one before it, and B three times that of A."""
    blocks = stats.abba([(1.0, 3 * 2.0, 3 * 4.0, 8.0), (1.0, 3 * 2.0, 3 * 4.0, 8.0)])
    assert blocks.ratio.value == pytest.approx(3) and blocks.ratio.n == 4


def test_the_noise_of_a_block_is_what_blocks_of_one_side_differ_by():
    """Logs 0, 0, 0, x: A against A gives x^2 / 2, two degrees of freedom give x / 2."""
    x = 0.04
    blocks = stats.abba([(1.0, 1.0, 1.0, math.exp(x))])
    assert blocks.noise == pytest.approx(x / 2)
    half = 4.302653 * x / 2  # Student's t of two degrees of freedom
    assert math.log(blocks.ratio.value) == pytest.approx(-x / 2)
    assert math.log(blocks.ratio.high) == pytest.approx(-x / 2 + half)
    assert blocks.ratio.resolved_from() is False


def test_rounds_that_differ_are_noise_too():
    """B / A is e^d in one round and e^-d in the other: d^2 + d^2 over five degrees of freedom."""
    d = 0.03
    blocks = stats.abba(
        [(1.0, math.exp(d), math.exp(d), 1.0), (1.0, math.exp(-d), math.exp(-d), 1.0)]
    )
    assert blocks.noise == pytest.approx((2 * d * d / 5) ** 0.5)
    assert blocks.ratio.value == pytest.approx(1)


def test_the_noise_is_never_less_than_what_the_calls_say():
    same = (1.0, 1.001, 1.001, 1.0)
    assert stats.abba([same]).ratio.resolved_from() is True
    assert stats.abba([same], within=0.01).ratio.resolved_from() is False


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("level", [0.95, 1 - 0.05 / 3])
def test_the_smallest_effect_is_resolved_in_four_runs_of_five(rounds, level):
    """Against runs drawn at random; without an effect one in twenty, or in sixty, is resolved."""
    even = stats.Estimate(1.0, level=level)
    blocks = stats.Blocks(even, 0.01, rounds)
    assert blocks.power(0) == pytest.approx(1 - level, abs=1e-3)
    effect, rng = math.log1p(blocks.least()), np.random.default_rng(rounds)
    logs = rng.normal(0, 0.01, (1000, rounds, 4)) + effect * np.array([0, 1, 1, 0])
    share = np.mean(
        [stats.abba(np.exp(x).tolist(), level=level).ratio.resolved_from() for x in logs]
    )
    assert share == pytest.approx(0.8, abs=0.04)


def test_blocks_without_noise_see_everything_but_nothing():
    blocks = stats.abba([(1.0, 1.0, 1.0, 1.0)])
    assert blocks.least() == 0 and blocks.power(0) == 0 and blocks.power(0.001) == 1
    with pytest.raises(ValueError, match="no round"):
        stats.abba([])


def test_a_few_slow_calls_do_not_move_the_error_of_a_median():
    calm = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99]
    slow = [*calm[:-1], 2.0]
    assert stats.median_error(slow) == pytest.approx(stats.median_error(calm), rel=0.5)
    assert stats.median_error([1.0]) == 0
