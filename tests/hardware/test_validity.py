"""Each gate at its edges, from a few readings that are made up."""

import math

import pytest

from lib import stats
from lib.hardware import validity
from lib.hardware.validity import Gate, Window


def rows(**columns):
    """Readings a second apart, from 0 s on; None is a reading that lacks."""
    length = max(map(len, columns.values()))
    return [
        {"t_s": float(n)} | {k: v[n] for k, v in columns.items() if v[n] is not None}
        for n in range(length)
    ]


@pytest.mark.parametrize(
    ("code", "warns", "fails"),
    [
        ("agreement", 0.01, 0.03),
        ("instant_agreement", 0.02, math.inf),
        ("sampler_gap", 0.25, 1.0),
        ("power_cap", 0.01, math.inf),
        ("throttled", 0.0, 0.01),
        ("temperature_drift", 3.0, 10.0),
        ("clock_drift", 0.02, 0.10),
        ("foreign_process", 0, 0),
        ("sampler_disturbs", 0.01, 0.01),
    ],
)
def test_a_limit_belongs_to_what_it_allows(code, warns, fails):
    levels = {warns: "ok"}
    if warns < fails:
        levels |= {warns + 1e-6: "warn", fails: "warn"}
    if fails < math.inf:
        levels[fails + 1e-6] = "invalid"
    assert {size: validity.limited(code, size, "text").level for size in levels} == levels
    assert validity.limited(code, warns, "text") == Gate(code, "ok", warns, "text")
    told = validity.limited(code, -5.0, "text", 1e9)  # the size decides, the value is told
    assert told.value == -5.0 and told.text == f"text; {validity.ADVICE[code]}"
    assert validity.limited(code, None, "not read") == Gate(code, "unknown", None, "not read")


def test_agreement_is_either_way():
    assert [validity.agreement(x, "").level for x in (0.02, -0.02, 0.04, -0.04)] == [
        "warn",
        "warn",
        "invalid",
        "invalid",
    ]
    assert validity.agreement(None, "no ticks") == Gate("agreement", "unknown", None, "no ticks")


@pytest.mark.parametrize(
    ("counter_j", "instant_j", "off", "level"),
    [
        (100.0, 101.0, 0.01, "ok"),
        (100.0, 97.0, -0.03, "warn"),
        (100.0, 103.0, 0.03, "warn"),
        (0.5, 0.5, 0.0, "ok"),
        (0.0, 1.0, None, "unknown"),
        (None, 1.0, None, "unknown"),
        (1.0, None, None, "unknown"),
    ],
)
def test_the_instant_reading_over_the_counter(counter_j, instant_j, off, level):
    gate = validity.instant_agreement(counter_j, instant_j)
    assert gate.level == level and gate.value == (None if off is None else pytest.approx(off))


@pytest.mark.parametrize(
    ("times", "readout", "gap_s"),
    [
        ([1.0, 1.1, 1.3], None, 0.7),  # to the end of the window
        ([1.9], None, 0.9),  # from its start
        ([1.2, 1.8], None, 0.6),
        ([1.2, 1.8], "power_w", 1.0),  # none of this readout
    ],
)
def test_the_longest_time_without_a_reading(times, readout, gap_s):
    gate = validity.sampler_gap([{"t_s": t} for t in times], 1.0, 2.0, readout)
    assert gate.value == pytest.approx(gap_s)
    failed = [{"t_s": t, "error": "x"} for t in times]
    assert validity.sampler_gap(failed, 1.0, 2.0).value == 1.0


def test_a_board_is_held_back_for_what_its_counter_grew():
    inside = rows(power_cap_s=[5.0, None, 5.2, 5.5], sw_thermal_s=[0.0, 0.0, 0.0, 0.0])
    assert validity.slowed("power_cap", inside, 10.0, ("power_cap_s",)).value == pytest.approx(0.05)
    worst = validity.slowed("throttled", inside, 10.0, ("sw_thermal_s", "power_cap_s", "absent"))
    assert worst.value == pytest.approx(0.05)
    assert validity.slowed("throttled", inside, 10.0, ("absent",)).level == "unknown"


@pytest.mark.parametrize(
    ("reasons", "capped", "throttled"),
    [
        (0x01, "ok", "ok"),  # idle
        (0x02, "ok", "ok"),
        (0x04, "warn", "ok"),
        (0x08, "ok", "warn"),
        (0x10, "ok", "ok"),
        (0x20, "ok", "warn"),
        (0x40, "ok", "warn"),
        (0x80, "ok", "warn"),
        (0x100, "ok", "ok"),
        (None, "unknown", "unknown"),
    ],
)
def test_the_drivers_reasons_stand_in_for_counters(reasons, capped, throttled):
    after = {} if reasons is None else {"throttle_reasons": reasons}
    gates = validity.held_back({}, after, 10.0)
    assert [(g.code, g.level) for g in gates] == [("power_cap", capped), ("throttled", throttled)]
    counted = validity.held_back({"power_cap_s": 1.0}, {"power_cap_s": 1.05} | after, 10.0)
    assert (counted[0].level, counted[0].value) == ("ok", pytest.approx(0.005))


def test_a_drift_is_the_last_third_less_the_first():
    """9 readings: 30, 31, 32 and 36, 37, 38 degrees."""
    warm = rows(temperature_c=[30.0, 31.0, 32.0, 99.0, 0.1, 99.0, 36.0, 37.0, 38.0])
    assert validity.temperature_drift(warm).value == pytest.approx(6)
    clock = rows(sm_hz=[2.0, 2.0, 9.0, 1.0, 1.0])  # a third of five is one
    assert validity.clock_drift(clock).value == pytest.approx(-0.5)
    few = validity.clock_drift(rows(sm_hz=[2.0, 2.0]))
    assert (few.level, few.text) == ("unknown", "the GPU's clock: too few readings")
    cooler = validity.temperature_drift(rows(temperature_c=[40.0, 35.0, 30.0]))
    assert (cooler.value, cooler.level) == (-10, "warn")


@pytest.mark.parametrize(
    ("calls", "drift"),
    [
        ([(0, 2), (2, 4), (4, 6), (6, 8)], 6),  # the first and the last: means of 0-2 and of 6-8
        ([(0, 1), (1, 2), (2, 3), (5, 6), (6, 7), (7, 8)], 6),  # two of six: 0-2 and 6-8
        ([(0, 3), (5, 8)], 5),  # means of 0-3 and of 5-8
        ([(0, 8)], None),
        ([(-2, -1), (0, 8)], None),  # no reading in the first
    ],
)
def test_a_drift_of_calls_is_between_the_first_third_of_them_and_the_last(calls, drift):
    inside = rows(temperature_c=[30.0 + n for n in range(9)])
    gate = validity.temperature_drift(inside, calls)
    assert gate.value == (None if drift is None else pytest.approx(drift))


@pytest.mark.parametrize(
    ("pids", "others"),
    [
        ([[77]], 0),
        ([[77, 78]], 1),
        ([[77], [77, 78, 79]], 2),  # the most at once
        ([[5]], 0),  # a container's number
        ([[77, 77]], 0),  # listed for computing and for drawing
        ([[5, 6]], 1),
        ([[]], 0),
    ],
)
def test_other_processes_are_counted_beside_our_own(pids, others):
    gate = validity.foreign_process([{"t_s": 0.0, "pids": list(p)} for p in pids])
    assert (gate.value, gate.level) == (others, "invalid" if others else "ok")


@pytest.mark.parametrize(
    ("joules", "idle_w", "level"),
    [
        (500.0, 100.0, "ok"),  # 50 W: half of idle
        (499.0, 100.0, "invalid"),
        (3300.0, 100.0, "ok"),  # 330 W: a tenth above the limit of 300 W
        (3301.0, 100.0, "invalid"),
        (0.0, None, "ok"),
        (None, 100.0, "unknown"),
    ],
)
def test_mean_power_lies_between_half_of_idle_and_a_tenth_above_the_limit(joules, idle_w, level):
    inside = rows(power_limit_w=[300.0, 250.0])
    gate = validity.power_range(inside, joules, 10.0, idle_w)
    assert gate.level == level
    assert gate.value == (None if joules is None else joules / 10)
    assert validity.power_range([], 500.0, 10.0, idle_w).level == "unknown"
    if level == "invalid":
        assert f"mean power {joules / 10:.0f} W, not within [50, 330] W" in gate.text


@pytest.mark.parametrize(
    ("limits", "limit_w"),
    [
        ([300.0, 350.0], 350.0),
        ([2500.0], 2500.0),
        ([2501.0], None),
        ([1.0], None),
        ([1.1], 1.1),
        ([], None),
    ],
)
def test_a_limit_is_one_that_a_board_can_have(limits, limit_w):
    assert validity._limit_w([{"t_s": 0.0, "power_limit_w": w} for w in limits]) == limit_w


def powers(*watts, every_s=0.25, limit_w=100.0, name="power_w"):
    limit = {} if limit_w is None else {"power_limit_w": limit_w}
    return [{"t_s": n * every_s, name: w} | limit for n, w in enumerate(watts)]


@pytest.mark.parametrize(
    ("trace", "name", "idle_w", "level"),
    [
        (powers(60, 60, 60), "power_w", 60.0, "ok"),
        (powers(60, 120, 60), "power_w", 60.0, "ok"),  # 1.2 of the limit
        (powers(60, 121, 60), "power_w", 60.0, "invalid"),
        (powers(60, 150, 60, name="instant_w"), "instant_w", 60.0, "ok"),  # 1.5 of it
        (powers(60, 151, 60, name="instant_w"), "instant_w", 60.0, "invalid"),
        (powers(60, 30, 60), "power_w", 60.0, "ok"),  # half of idle
        (powers(60, 29, 60), "power_w", 60.0, "invalid"),
        (powers(2, 1, 2), "power_w", None, "ok"),  # no board draws less than a watt
        (powers(2, 0.9, 2), "power_w", None, "invalid"),
        (powers(2000, 2500, 2000, limit_w=None), "power_w", 60.0, "warn"),  # no limit was told
        (powers(2000, 2501, 2000, limit_w=None), "power_w", 60.0, "invalid"),
        (powers(60, math.inf, 60), "power_w", 60.0, "invalid"),
        (powers(60, math.nan, 60), "power_w", 60.0, "invalid"),
        (powers(60, 60, every_s=0.0), "power_w", 60.0, "ok"),  # twice the same time
        (powers(60, 60, every_s=-0.1), "power_w", 60.0, "invalid"),
    ],
)
def test_a_power_reading_is_one_that_the_board_can_draw(trace, name, idle_w, level):
    assert validity.power_readings(trace, name, idle_w).level == level


def beside(lone, width=1, near=10.0):
    """A lone stretch of readings, a quarter of a second apart, in the middle of 13."""
    watts = [near] * 13
    watts[6 : 6 + width] = [lone] * width
    return powers(*watts)


@pytest.mark.parametrize(
    ("trace", "idle_w", "level"),
    [
        (beside(50.0), 10.0, "ok"),  # five times its neighbours
        (beside(51.0), 10.0, "invalid"),
        (beside(51.0, width=2), 10.0, "invalid"),
        (beside(51.0, width=5), 10.0, "ok"),  # a second of it is no lone reading
        (beside(2.0), None, "ok"),  # a fifth
        (beside(1.9), None, "invalid"),
        (beside(5.0), 10.0, "ok"),  # a board that waits between calls shows its idle power
        (powers(10, 10, 51), 10.0, "ok"),  # nothing after it to tell
        # Its neighbours are half a second to a second away, on either side.
        (powers(*[20] * 2, *[10] * 4, 51, *[10] * 3, *[20] * 3), 10.0, "invalid"),
        (powers(*[10] * 3, 11, *[10] * 2, 51, *[10] * 6), 10.0, "ok"),
        (powers(*[10] * 2, 11, *[10] * 3, 51, *[10] * 6), 10.0, "ok"),
        (powers(*[10] * 6, 51, 10, 11, *[10] * 4), 10.0, "ok"),
        (powers(*[10] * 6, 51, *[10] * 2, 11, *[10] * 3), 10.0, "ok"),
        (powers(*[10] * 4, *[11] * 2, 51, 11, *[10] * 5), 10.0, "invalid"),
    ],
)
def test_a_lone_reading_is_five_times_its_neighbours_on_both_sides(trace, idle_w, level):
    assert validity.power_readings(trace, "power_w", idle_w).level == level


@pytest.mark.parametrize(
    ("low", "high", "level"),
    [
        (0.995, 1.004, "ok"),
        (0.9901, 1.0099, "ok"),
        (0.98, 1.0, "unknown"),
        (1.0, 1.02, "unknown"),
        (1.0099, 1.02, "unknown"),
        (1.0101, 1.02, "invalid"),
        (0.98, 0.9899, "invalid"),
        (0.98, 0.9901, "unknown"),
    ],
)
def test_what_the_sampler_costs_is_held_against_one_percent(low, high, level):
    gate = validity.sampler_disturbs(stats.Estimate((low + high) / 2, low, high, 6))
    assert gate.level == level and gate.value == pytest.approx((low + high) / 2 - 1)


@pytest.mark.parametrize("ratio", [stats.missing("gone"), stats.Estimate(1.0, reason="gone")])
def test_without_an_interval_the_sampler_is_not_checked(ratio):
    gate = validity.sampler_disturbs(ratio)
    assert gate == Gate("sampler_disturbs", "unknown", None, "not checked: gone")


@pytest.mark.parametrize(
    ("alarm", "level", "value", "expected", "relation"),
    [
        (0.02, "invalid", 0.03, "invalid", "the same"),
        (-0.02, "invalid", -0.03, "invalid", "the same"),
        (0.02, "invalid", -0.03, "unknown", "not the same"),
        (-0.02, "invalid", 0.03, "unknown", "not the same"),
        (0.02, "ok", 0.001, "ok", "not the same"),
        (0.02, "unknown", 0.001, "unknown", "not the same"),
    ],
)
def test_an_alarm_counts_where_fresh_pairs_say_the_same(alarm, level, value, expected, relation):
    gate = validity.repeated(Gate("c", "invalid", alarm), Gate("c", level, value, "fresh"))
    assert (gate.level, gate.value) == (expected, value)
    assert gate.text == f"fresh; {relation} as {alarm:+.1%} found before, which these pairs check"


# --- windows


def window(joules, estimator="counter_j", reason="", gates=()):
    return Window(10.0, joules, {}, tuple(gates), estimator, reason)


def test_boards_add_up_where_all_have_the_same_readout():
    one = window({"counter_j": 1000.0, "average_j": 990.0}, gates=[Gate("a", "ok", text="fine")])
    two = window({"counter_j": 500.0}, gates=[Gate("b", "warn", text="hot")])
    whole = validity.add([one, two])
    assert whole.joules == {"counter_j": 1500.0} and whole.energy_j == 1500
    assert (whole.mean_w, whole.seconds) == (150, 10)
    assert [g.text for g in whole.gates] == ["GPU 0: fine", "GPU 1: hot"]
    assert [g.code for g in whole.failing("warn")] == ["b"]
    assert validity.add([one]) is one
    mixed = validity.add([one, window({"average_j": 500.0}, "average_j")])
    assert (mixed.energy_j, mixed.mean_w) == (None, None)
    assert mixed.reason == "the boards have no readout alike"
    lame = window({"average_j": 500.0}, None, "counter_reset: it fell")
    for pair in ([one, lame], [lame, lame]):
        assert validity.add(pair).reason == "counter_reset: it fell"


def test_the_first_invalid_gate_is_the_reason():
    gates = [Gate("a", "warn"), Gate("b", "invalid", text="one"), Gate("c", "invalid", text="two")]
    settled = validity.settle(window({"counter_j": 1.0}, gates=gates))
    assert (settled.estimator, settled.reason) == (None, "b: one")
    lacking = window({}, None, "not_covered", gates)
    assert validity.settle(lacking) is lacking


def board(watts=100.0, seconds=20, every_s=0.1, **more):
    """Readings of a steady board whose counter ticks at each of them."""
    return [
        {"t_s": n * every_s, "energy_j": 1e3 + watts * n * every_s, "power_w": watts}
        | {"instant_w": watts}
        | {k: v(n * every_s) for k, v in more.items()}
        for n in range(round(seconds / every_s) + 1)
    ]


def test_a_window_is_judged_by_the_readings_inside_it():
    hot = board(sw_thermal_s=lambda t: min(max(t - 5.0, 0.0), 10.0))
    assert validity.judge(hot, 5.0, 15.0).reason.startswith("throttled")
    for start_s, stop_s in ((2.5, 5.0), (15.0, 17.5)):
        calm = validity.judge(hot, start_s, stop_s)
        assert calm.energy_j == pytest.approx(250) and calm.mean_w == pytest.approx(100)


@pytest.mark.parametrize(
    ("at_s", "others"), [(4.75, 0), (5.0, 1), (10.0, 1), (15.0, 1), (15.25, 0)]
)
def test_readings_at_the_edges_are_inside(at_s, others):
    busy = board(every_s=0.25, pids=lambda t: [1, 2] if t == at_s else [1])
    window = validity.judge(busy, 5.0, 15.0)
    assert {g.code: g.value for g in window.gates}["foreign_process"] == others


def test_gates_that_are_lenient_warn_at_most_and_those_of_the_session_count():
    warm = board(temperature_c=lambda t: 30 + 2 * t)
    assert validity.judge(warm, 5.0, 15.0).reason.startswith("temperature_drift")
    lenient = validity.judge(warm, 5.0, 15.0, lenient=("temperature_drift",))
    assert lenient.energy_j == pytest.approx(1000)
    assert [g.code for g in lenient.failing("warn")] == ["temperature_drift"]
    bad = Gate("sampler_disturbs", "invalid", 0.02, "slower")
    session = validity.judge(board(), 5.0, 15.0, session=(bad,))
    assert session.reason == "sampler_disturbs: slower" and bad in session.gates
    none = validity.judge([], 5.0, 15.0, session=(bad,))
    assert (none.seconds, none.gates, none.joules) == (10.0, (bad,), {})


def test_readings_of_two_seconds_around_the_window_belong_to_it():
    """The one-second mean is held against ticks from a second before on."""
    assert validity.judge(board(), 5.0, 15.0, guard_s=0.5).gates[0].level == "unknown"
    assert validity.judge(board(), 5.0, 15.0).gates[0].level == "ok"


def test_gates_are_plain_data_for_a_record():
    gate = Gate("a", "ok", 1.0, "fine")
    assert validity.as_dicts([gate]) == [{"code": "a", "level": "ok", "value": 1.0, "text": "fine"}]
