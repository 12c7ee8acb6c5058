"""Statistics: numbers that a reader can check with pencil and paper."""

import math

import numpy as np
import pytest

from lib import stats
from lib.show import wording
from tools import coverage


def test_median_of_six_spans_all_samples():
    # P(all six on one side of the median) = 2 / 2**6 = 3.1 %, so min and max cover it with 96.9 %.
    est = stats.median([6, 1, 5, 2, 4, 3])
    assert (est.value, est.low, est.high, est.n) == (3.5, 1, 6, 6)


def test_median_of_ten_uses_second_and_ninth():
    # P(at most one of ten below the median) = 11 / 1024 = 1.07 % in each tail.
    est = stats.median(range(1, 11))
    assert (est.value, est.low, est.high) == (5.5, 2, 9)
    # Of nine 10 / 512 = 1.95 %.
    est = stats.median(range(1, 10))
    assert (est.value, est.low, est.high, est.method) == (5, 2, 8, "median, order statistics")


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


def test_a_high_percentile_by_hand():
    """Of 59 the largest bounds p95; of 100 the 90th and the 100th do, two-sided.

    Of 100 draws that each lie above p95 in 5 % of cases, at least 11 do in 1.15 % (10 in 2.8 %),
    and none in 0.6 % (at most one in 3.7 %).
    """
    one_sided = stats.percentile(range(59), 95)
    assert (one_sided.value, one_sided.high) == (pytest.approx(0.95 * 58), 58)
    assert one_sided.method == "p95, one-sided upper bound"
    both = stats.percentile(range(100), 95)
    assert (both.value, both.low, both.high) == (pytest.approx(0.95 * 99), 89, 99)
    assert both.method == "p95, order statistics"
    assert stats.required_n(90) == 29  # 0.9**28 = 5.2 %, 0.9**29 = 4.7 %
    assert stats.percentile(range(13), 51).method == "p51, order statistics"
    assert stats.percentile(range(13), 51).value == pytest.approx(0.51 * 12)
    assert stats.percentile(range(13), 49).value == pytest.approx(0.49 * 12)
    low = stats.percentile(range(59), 5)  # all 59 lie above p5 in 4.8 %
    assert low.value == pytest.approx(0.05 * 58) and (low.low, low.high) == (None, None)
    assert stats.percentile(range(5), 51).method == "p51, one-sided upper bound"  # 0.51**5: 3.5 %
    assert stats.percentile(range(3), 51).method == "max of 3"


def test_a_reading_is_exact_and_counts_once():
    assert (stats.exact(5.0).value, stats.exact(5.0).n, stats.exact(5.0).low) == (5.0, 1, None)
    assert stats.as_exact(stats.Estimate(4.0, 3.0, 5.0, 9), "sum") == stats.exact(4.0, "sum")
    assert stats.as_exact(stats.missing("gone"), "sum") == stats.missing("gone")
    assert stats.missing("gone").n == 0
    assert stats.of_few(2.0, 3, "mean", 6).reason == "n = 3: an interval needs n >= 6"


@pytest.mark.parametrize(
    ("ratio", "digits", "text"),
    [
        (stats.Estimate(0.869, 0.84, 0.908), (), "-13.1% [-16.0%, -9.2%]"),
        (stats.Estimate(1.25), (), "+25.0%"),
        (stats.Estimate(1.25, 1.0), (0,), "+25%"),
    ],
)
def test_a_change_is_told_from_one(ratio, digits, text):
    assert stats.change(ratio, *digits) == text


def test_means_by_hand():
    """Of 1 and 3: Student's t of one degree is 12.706, the standard error 1."""
    mean = stats.mean([1.0, 3.0])
    assert (mean.value, mean.n) == (2, 2)
    assert (mean.low, mean.high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    assert stats.mean([]).reason == "no samples"
    alone = stats.mean([4.0])
    assert (alone.value, alone.low, alone.n) == (4, None, 1) and "n >= 2" in alone.reason


def test_a_line_with_its_intervals_by_hand():
    """At 0 they are 1 and 1/2, at 10 ten times that: m with the least sum of (1 - m / y)^2 is
    (1 + 2) / (1 + 4) = 0.6 and 6, and the errors are 0.4 and -0.2 at each. Their variance is
    0.4 / 2; that of 0.6 is a fifth of it, that of 6 a hundred times as much."""
    at_zero, slope = stats.line([0, 0, 10, 10], [1.0, 0.5, 10.0, 5.0])
    assert (at_zero.value, slope.value) == pytest.approx((0.6, 0.54))
    t = 4.3027  # of two degrees, 97.5 %
    assert at_zero.high - at_zero.value == pytest.approx(t * 0.2, rel=1e-4)
    assert at_zero.value - at_zero.low == pytest.approx(t * 0.2, rel=1e-4)
    assert slope.high - slope.value == pytest.approx(t * (0.04 + 4) ** 0.5 / 10, rel=1e-4)
    assert at_zero.n == slope.n == 4
    two = stats.line([0, 10], [1.0, 3.0])
    assert [round(e.value, 9) for e in two] == [1, 0.2] and two[0].n == 2
    assert [e.reason for e in two] == ["n = 2: an interval needs n >= 3"] * 2
    three = stats.line([0, 10, 20], [1.0, 3.0, 5.0])
    assert three[1].low == pytest.approx(0.2) == three[1].high
    assert stats.line([3, 3], [1.0, 2.0])[0].reason == "a line needs two different x, got [3]"


def test_a_ratio_holds_what_95_of_100_redrawn_medians_are():
    """Of 1 to 9 drawn anew the median is 1 in 0.1 % and at most 2 in 3.0 %; and so from above."""
    est = stats.ratio([1, 2, 3, 4, 5, 6, 7, 8, 9], [0.5] * 6)
    assert (est.value, est.low, est.high, est.n) == (10, 4, 16, 6)
    assert stats.ratio([1.0] * 6, [0.5] * 5).reason == "n = 5: an interval needs n >= 6"
    assert stats.ratio([3.0], [2.0] * 9).value == 1.5


def test_pairs_by_hand():
    """2 and 8 times as long: 4 in the mean of their logarithms, which lie log 2 from it."""
    est = stats.paired_ratio([4.0, 8.0], [2.0, 1.0])
    assert (est.value, est.n) == (pytest.approx(4), 2)
    assert (est.low, est.high) == pytest.approx((4 * 2**-12.7062, 4 * 2**12.7062), rel=1e-3)
    assert stats.paired_ratio([2.0], [1.0, 1.0]).reason == "pairs are needed, got 1 and 2"
    assert stats.paired_ratio([], []).reason == "pairs are needed, got 0 and 0"


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


def test_slope_is_the_median_over_pairs():
    """Pairs of (1, 1), (2, 2), (3, 5): slopes of 1, 3 and 2."""
    est = stats.slope([3, 1, 2], [5.0, 1.0, 2.0])
    assert (est.value, est.n) == (2, 3) and est.reason == "n = 3: an interval needs n >= 6"
    six = stats.slope([1, 2, 3, 4, 5, 6], [1.0, 2.0, 3.0, 4.0, 5.0, 11.0])
    assert (six.value, six.low, six.high) == (1, 1, 3.5)  # but for 6, the steepest of 15 pairs
    with pytest.raises(ValueError, match="zip"):
        stats.slope([1, 2], [1.0])


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
    three = stats.slope([64] * 3 + [128] * 3, [6.4, 6.5, 6.6, 12.8, 12.9, 13.0])
    assert three.level == 0.9 and three.low == pytest.approx(6.2 / 64)  # just enough
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
    assert stats.scaled(est, 0.5).value == 2
    for factor in (0, -1):
        with pytest.raises(ValueError, match="positive"):
            stats.scaled(est, factor)
    assert stats.inverse(stats.missing("gone")) == stats.missing("gone")
    assert stats.inverse(est).value == 0.25
    for value in (0.0, -1.0):
        assert "no positive inverse" in stats.inverse(stats.Estimate(value)).reason
    assert stats.inverse(stats.Estimate(0.5)).value == 2


def test_inverse_of_an_interval_that_reaches_zero_is_open():
    est = stats.Estimate(1.0, -0.5, 2.0, 6)
    inverse = stats.inverse(est)
    assert inverse.low == 0.5 and inverse.high is None and "zero" in inverse.reason
    assert stats.inverse(stats.Estimate(1.0, 0.0, 2.0, 6)).high is None
    assert stats.inverse(stats.Estimate(1.0, 0.5, 2.0, 6)).high == 2


def test_a_quotient_takes_the_lesser_n_and_level():
    a, b = stats.Estimate(6.0, 4.0, 8.0, 9, "a"), stats.Estimate(0.5, 0.25, 1.0, 7, "b", level=0.9)
    for first, second, ends in ((a, b, (12, 4, 32)), (b, a, (1 / 12, 0.25 / 8, 1 / 4))):
        est = stats.quotient(first, second)
        assert (est.value, est.low, est.high) == pytest.approx(ends)
        assert (est.n, est.level) == (7, 0.9)
    assert stats.quotient(a, b).method == "(a) / (b)"
    for low in (0.0, -0.1):
        assert stats.quotient(a, stats.Estimate(0.5, low, 1.0)).reason == "no interval"
    for value, told in ((-0.5, "-0.5"), (0.0, "0")):
        reason = stats.quotient(a, stats.Estimate(value)).reason
        assert reason == f"the divisor {told} is not positive"
    half = stats.quotient(a, stats.Estimate(0.5, 0.25))
    assert (half.value, half.low) == (12, None)
    few = stats.Estimate(1.0, reason="few"), stats.Estimate(1.0, reason="fewer")
    assert [stats.quotient(*pair).reason for pair in (few, few[::-1])] == ["few", "fewer"]


def test_resolved_from():
    assert stats.Estimate(1.2, 1.1, 1.3).resolved_from(1.0) is True
    assert stats.Estimate(1.2, 0.9, 1.3).resolved_from(1.0) is False
    assert stats.Estimate(1.2).resolved_from(1.0) is None
    assert stats.Estimate(1.2, 1.1).resolved_from() is stats.Estimate(1.2, None, 2).resolved_from()
    assert stats.Estimate(1.2, 1.1).resolved_from() is None
    for low, high, resolved in ((1.1, 1.3, True), (1.0, 2.0, False), (0.5, 1.0, False)):
        assert stats.Estimate(1.2, low, high).resolved_from() is resolved


def test_spread():
    assert stats.spread([9, 10, 11]) == pytest.approx(0.2)
    assert stats.spread([1]) is None
    assert stats.spread([1, 3]) == 1
    assert stats.gaps([1, 2, 4]) == [1, 2] and stats.gaps([1]) == []


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
    assert stats.aa_coverage(samples).value < 0.7 < stats.AA_LEAST
    assert stats.aa_coverage(noise("normal", 1, n=48)).value >= stats.AA_LEAST


def test_an_a_a_check_needs_two_blocks_of_six():
    assert stats.aa_coverage([1.0] * 11).reason == "n = 11: two blocks need n >= 12"
    assert stats.aa_coverage([1.0] * 12).value == 1
    # Of 7 pairs of neighbouring blocks only those do not hold whose medians differ surely.
    step = stats.aa_coverage([1.0] * 6 + [2.0] * 12)
    assert step.n == 7 and 0 < step.value < 1
    assert stats.aa_coverage([1.0, 1.0, 2.0, 2.0], block=1).n == 3
    assert stats.aa_coverage([1.0] * 6 + [2.0] * 6).value == 0
    # Six slow ones of eighteen: blocks that both hold two to four of them look alike.
    assert stats.aa_coverage([1.0] * 6 + [2.0] * 6 + [1.0] * 6).value == 3 / 7


def test_in_order_is_the_second_half_over_the_first():
    doubled = stats.aa_in_order([1.0] * 6 + [2.0] * 7)
    assert (doubled.value, doubled.n) == (2, 6)


def test_over_visits_the_estimate_is_of_their_medians():
    assert stats.over_visits([2.0]).low is None
    two = stats.over_visits([2.0, 4.0])
    assert (two.value, two.low, two.high, two.level) == (3.0, 2.0, 4.0, None)
    few = stats.over_visits([1.0, 2.0, 4.0])
    assert (few.value, few.low, few.high, few.n, few.level) == (2.0, 1.0, 4.0, 3, None)
    assert stats.scaled(few, 2).level is None and stats.quotient(few, few).level is None
    six = stats.over_visits([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (six.value, six.low, six.high, six.level) == (3.5, 1.0, 6.0, stats.CONFIDENCE)
    eight = stats.over_visits([float(i) for i in range(1, 9)])
    assert (eight.low, eight.high) == (1.0, 8.0) and "8 visits" in eight.method


def test_what_an_interval_is_over_goes_with_it():
    few, six = (stats.over_visits([1.0 + i for i in range(n)]) for n in (3, 6))
    within = stats.median([1.0] * 6)
    assert (few.visits, six.visits, within.visits) == (3, 6, 0)
    assert wording.interval(few) == "[1.000, 3.000], range of 3 visits"
    assert wording.interval(six) == "[1.000, 6.000] over 6 visits"
    assert wording.interval(within) == "[1.000, 1.000]"
    assert wording.interval(stats.scaled(six, 2)) == "[2.000, 12.00] over 6 visits"
    assert wording.interval(stats.quotient(six, within)).endswith("over 6 visits")
    # The ends of two ranges bound a ratio, and are the range of no visits' ratios.
    assert wording.interval(stats.quotient(few, within)) == "[1.000, 3.000], from ranges of visits"


@pytest.mark.parametrize("q, n", [(95, 59), (95, 65), (95, 71), (99, 299), (99, 330)])
def test_a_percentile_bounded_by_the_maximum_says_the_level_that_holds(q, n):
    """The k-th smallest and the largest of n hold the quantile where k to n - 1 lie below it."""
    estimate = stats.percentile([float(i) for i in range(1, n + 1)], q)
    p, k = q / 100, int(estimate.low)
    held = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n))
    assert estimate.high == n and estimate.level == pytest.approx(min(held, 0.95), abs=1e-9)


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
