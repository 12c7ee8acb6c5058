"""Verdicts: each outcome is reached, and the tolerances hold at their edges."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from lib import stats
from lib.analysis import metrics
from lib.records.record import Record, record_id
from lib.stats import Estimate
from lib.studies import verdict
from lib.studies.verdict import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Verdict


def interval(low: float, high: float, n: int = 10) -> Estimate:
    return Estimate((low + high) / 2, low, high, n, "median, order statistics")


def count(value: float) -> Estimate:
    return Estimate(value, n=1, method=verdict.COUNTED)


@pytest.mark.parametrize(
    ("printed", "unit", "quantity", "low", "high"),
    [
        ("100.0", "ms", "time", 90, 110),  # 10 %
        ("100.0", "MB", "memory", 98, 102),  # 2 %
        ("31.8", "%", "time", 26.8, 36.8),  # 5 points
        ("31.7", "%", "memory", 30.7, 32.7),  # 1 point
        ("2", "%", "effect", 1, 3),
        ("32", "B", "count", 31, 33),  # one unit of the last digit is more than 0.5 %
        ("3.61", "B", "count", 3.59195, 3.62805),  # and here it is less
        ("5", "runs", "whole", 5, 5),
        (["11", "12"], "1", "time", 9.9, 13.2),
        (["12", "11"], "1", "time", 9.9, 13.2),
        ("1e6", "bytes", "memory", 0.98e6, 1.02e6),  # its exponent is no last digit
        ("-10.7", "%", "time", -15.7, -5.7),
        ("50", "%", "whole", 50, 50),
        ("20.50", "%", "count", 20.4, 20.6),  # 0.1 points
        ("100.0", "ms", "effect", 90, 110),
        ("2.0", "%", "effect", 1, 3),
        ("1e1", "s", "time", 9, 11),  # a ten that is not the last digit of anything
    ],
)
def test_the_band_of_a_printed_value(printed, unit, quantity, low, high):
    assert verdict.band(printed, unit, quantity) == pytest.approx((low, high), rel=1e-6)


@pytest.mark.parametrize(
    ("measured", "word"),
    [
        (interval(95, 105), REPRODUCED),
        (interval(90, 110), REPRODUCED),  # the edges belong to it
        (interval(89.9, 105), UNTESTABLE),  # reaches in and out
        (interval(80, 120), UNTESTABLE),
        (interval(70, 89.9), NOT),
        (interval(110.1, 130), NOT),
        (Estimate(100, n=3, method="median", reason="n = 3"), UNTESTABLE),
        (stats.missing("not measured: no row"), UNTESTABLE),
        (count(110), REPRODUCED),
        (count(110.1), NOT),
    ],
)
def test_a_value_without_a_direction(measured, word):
    assert verdict.of_value(measured, verdict.band("100.0", "ms", "time")).word == word


@pytest.mark.parametrize(
    ("measured", "word"),
    [
        (interval(28, 35), REPRODUCED),
        (interval(1, 20), DIRECTION),  # above 0, below the band
        (interval(50, 90), DIRECTION),
        (interval(20, 40), DIRECTION),  # reaches out of the band, but is above 0
        (interval(0, 20), NOT),  # touches no effect
        (interval(-5, 40), UNTESTABLE),
        (interval(-20, -5), NOT),
        (Estimate(5.0, high=6.0), UNTESTABLE),  # half an interval is none
        (Estimate(5.0, low=4.0), UNTESTABLE),
    ],
)
def test_a_change_with_a_direction(measured, word):
    assert verdict.of_value(measured, verdict.band("31.8", "%", "time"), 0).word == word


def test_the_direction_of_a_negative_change_is_down():
    allowed = verdict.band("-21.4", "%", "time")
    assert verdict.of_value(interval(-14, -9), allowed, 0).word == DIRECTION
    assert verdict.of_value(interval(9, 14), allowed, 0).word == NOT
    assert verdict.of_value(interval(-14, 0), allowed, 0).word == NOT  # touches no effect


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (90, 105, REPRODUCED),
        (95, 110, REPRODUCED),
        (80, 90, UNTESTABLE),  # meets the tolerance in one point
        (110, 120, UNTESTABLE),
        (80, 89, NOT),
        (111, 120, NOT),
    ],
)
def test_the_edges_of_the_tolerance_belong_to_it(low, high, word):
    assert verdict.of_value(interval(low, high), (90, 110)).word == word


@pytest.mark.parametrize(
    ("allowed", "measured", "word"),
    [
        ((0.7, 0.9), interval(0.4, 0.5), DIRECTION),  # around 0.8: lower
        ((0.7, 0.9), interval(1.4, 1.5), NOT),
        ((1.2, 1.6), interval(2, 3), DIRECTION),  # around 1.4: higher
        ((1.2, 1.6), interval(0.4, 0.5), NOT),
    ],
)
def test_the_direction_of_a_ratio_is_the_side_of_one_on_which_its_middle_lies(
    allowed, measured, word
):
    assert verdict.of_value(measured, allowed, 1).word == word


@pytest.mark.parametrize(
    ("ratio", "higher", "lower"),
    [
        (interval(1.2, 1.4), REPRODUCED, NOT),
        (interval(0.7, 0.8), NOT, REPRODUCED),
        (interval(0.9, 1.1), UNTESTABLE, UNTESTABLE),
        (interval(0.98, 1.02), NOT, NOT),  # equal within 2 %
        (interval(1.0, 1.2), UNTESTABLE, UNTESTABLE),  # touches 1
        (interval(0.8, 1.0), UNTESTABLE, UNTESTABLE),
        (interval(0.99, 1.03), UNTESTABLE, UNTESTABLE),
        (interval(1.001, 1.019), NOT, NOT),  # resolved, but no difference to speak of
        (count(1.5), REPRODUCED, NOT),
        (count(1.0), NOT, NOT),
        (Estimate(1.5, n=3, reason="n = 3: an interval needs n >= 6"), UNTESTABLE, UNTESTABLE),
        (stats.missing("the rows differ in gpu"), UNTESTABLE, UNTESTABLE),
    ],
)
def test_an_order(ratio, higher, lower):
    assert verdict.of_order(ratio, "higher").word == higher
    assert verdict.of_order(ratio, "lower").word == lower


def test_reasons_are_said():
    why = verdict.of_value(interval(70, 80), (90, 110)).why
    assert why == "[70.00, 80.00] is outside the tolerance [90.00, 110.0]"
    why = verdict.of_value(interval(80, 95), (90, 110)).why
    assert why == "[80.00, 95.00] reaches beyond the tolerance [90.00, 110.0]"
    assert verdict.of_value(count(1), verdict.band("5", "runs", "whole")).why == "1, not 5"
    assert verdict.of_order(count(0.5), "higher").why == "0.5: the other way round"
    for judged in (
        partial(verdict.of_value, allowed=(4, 6)),
        partial(verdict.of_order, direction=""),
    ):
        assert judged(Estimate(5.0)).why == "no interval"
        assert judged(Estimate(5.0, reason="n = 3")).why == "n = 3"
    assert str(Verdict(NOT, "why")) == "not reproduced: why"
    assert str(Verdict(REPRODUCED)) == REPRODUCED


def test_together_the_worst_decides():
    good, turned = Verdict(REPRODUCED), Verdict(NOT, "turned")
    unknown, partly = Verdict(UNTESTABLE, "n = 3"), Verdict(DIRECTION, "far off")
    assert verdict.together({"a": good, "b": good}) == good
    assert verdict.together({"a": good, "b": partly}) == Verdict(DIRECTION, "b: far off")
    assert verdict.together({"a": partly, "b": unknown, "c": unknown}) == Verdict(
        UNTESTABLE, "b and c: n = 3"
    )
    assert verdict.together({"a": unknown, "b": turned}) == Verdict(NOT, "b: turned")
    assert verdict.together({"": turned}) == turned
    assert verdict.together({}).word == UNTESTABLE
    many = {str(i): Verdict(NOT, f"reason {i}") for i in range(5)}
    assert verdict.together(many).why.endswith("2: reason 2; and 2 more")
    three = dict(list(many.items())[:3])
    assert verdict.together(three).why == "0: reason 0; 1: reason 1; 2: reason 2"


@pytest.mark.parametrize(
    ("ours", "word", "why"),
    [
        (1, DIRECTION, "1 session decides the direction only"),
        (2, DIRECTION, "2 sessions decides the direction only"),
        (5, REPRODUCED, ""),
        (6, REPRODUCED, ""),
    ],
)
def test_fewer_sessions_than_the_studys_five_decide_a_direction(ours, word, why):
    settled = verdict.of_sessions(Verdict(REPRODUCED), ours, 5)
    assert settled.word == word and settled.why.startswith(why)
    for other in (Verdict(NOT, "turned"), Verdict(UNTESTABLE, "n = 3")):
        assert verdict.of_sessions(other, ours, 5) == other


def row(samples=None, warnings=(), **key):
    return Record("latency", {"model": "m"} | key, samples or {}, warnings=tuple(warnings))


@pytest.mark.parametrize(
    ("samples", "spread"),
    [
        ({}, None),
        ({"ttft_s": [7.0]}, None),  # one repetition has no spread
        ({"ttft_s": [95.0, 100.0, 105.0]}, None),  # 10 of 100 agree
        ({"ttft_s": [95.0, 100.0, 106.0]}, "11%"),
        ({"ttft_s": [95.0, 100.0, 105.0], "e2e_s": [50.0, 100.0, 200.0]}, "150%"),  # the widest
        ({"energy_j": [50.0, 100.0, 80.0]}, "62%"),  # 50 of 80
    ],
)
def test_repetitions_that_spread_over_more_than_a_tenth_cannot_decide(samples, spread):
    one = row(samples)
    text = f"the latency row of m warns of spread (repetitions spread over {spread} of their median"
    assert verdict.doubts([one]) == ({record_id(one): text + ")"} if spread else {})


def test_a_warning_in_another_visit_is_a_doubt_of_an_estimate_over_visits():
    """The last visit agrees within 2 %, an earlier one spreads over 40 %."""
    last, wide = (
        Record("latency", {"model": "m", "new_tokens": 1}, {"ttft_s": times}, env_id=id)
        for times, id in (([0.99, 1.0, 1.01] * 2, "b"), ([0.8, 1.0, 1.2] * 2, "a"))
    )
    arm = replace(last, visit="2", others=(replace(wide, visit="1"),))
    doubts = verdict.doubts([arm])
    said = "the latency row of m, new tokens 1 in another visit warns of spread"
    assert doubts == {record_id(wide): said}
    assert verdict.settled(metrics.METRICS["ttft"].of([arm]), doubts).low is None
    pair = metrics.METRICS["ttft"].ratio([arm], [arm])
    assert pair.visits == 2 and verdict.settled(pair, doubts).reason == said


def test_a_warning_is_a_doubt_in_its_first_clause_unless_it_is_harmless():
    cap = {"code": "power_cap", "text": "at its limit; cool it"}
    hot = {"code": "throttled", "text": "slowed down; cool it"}
    one = row(warnings=[hot, cap], context=128, experts="none", decoding="top-p")
    said = "the latency row of m, context 128, decoding top-p warns of throttled (slowed down)"
    assert verdict.doubts([one, row(warnings=[cap])]) == {record_id(one): said}


def test_an_estimate_of_a_doubtful_row_loses_its_interval_and_only_then():
    sure = replace(interval(4, 6), records=("a", "b", "b"))
    assert verdict.settled(sure, {"c": "why"}) == sure
    plain = verdict.settled(sure, {"a": "hot", "b": "wide"})
    assert (plain.value, plain.low, plain.high, plain.method) == (5, None, None, "")
    assert plain.reason == "hot; wide"
    gone = replace(stats.missing("not measured"), records=("a",))
    assert verdict.settled(gone, {"a": "hot"}) == gone


def test_a_quotient_spans_the_ends_of_both():
    ratio = stats.quotient(interval(8, 12), interval(4, 5))
    assert (ratio.low, ratio.high, ratio.n) == (8 / 5, 12 / 4, 10)
    assert ratio.value == pytest.approx(10 / 4.5)
    few = Estimate(9, n=3, method="median", reason="n = 3: an interval needs n >= 6")
    assert stats.quotient(interval(8, 12), few).low is None
    assert stats.quotient(interval(8, 12), few).reason == few.reason
    assert stats.quotient(stats.missing("gone"), few).reason == "gone"
    assert stats.quotient(few, Estimate(0.0, n=1)).value is None
    assert stats.quotient(interval(8, 12), interval(-1, 5)).low is None  # the divisor may be zero


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "spread over 16% of their median: the host is noisy; raise",
            "spread over 16% of their median",
        ),
        ("2 of 6 blocks: the clock moved by +2.9%", "2 of 6 blocks: the clock moved by +2.9%"),
    ],
)
def test_a_doubt_has_what_a_warning_found_and_not_its_advice(text, found):
    one = row(warnings=[{"code": "spread", "text": text}])
    (why,) = verdict.doubts([one]).values()
    assert why.endswith(f"spread ({found})")
