"""Whether a window's energy can be believed: each check has a code, a level and its value.

A window with an `invalid` gate has no energy, only the reason; `warn` is shown beside the number.
The limits stand in one table.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lib import stats
from lib.hardware import joules
from lib.hardware.joules import Trace
from lib.stats import Estimate

# code: (warn above, invalid above, unit for the reader)
LIMITS: dict[str, tuple[float, float, str]] = {
    "agreement": (0.01, 0.03, "%"),  # one-second mean against counter
    "instant_agreement": (0.02, float("inf"), "%"),  # 25 % coverage: its own fault if it is off
    "sampler_gap": (0.25, 1.0, "s"),
    "power_cap": (0.01, float("inf"), "%"),  # of the window: a board at its limit is not broken
    "throttled": (0.0, 0.01, "%"),  # of the window: heat or a power brake
    "temperature_drift": (3.0, 10.0, "C"),
    "clock_drift": (0.02, 0.10, "%"),
    "foreign_process": (0, 0, "processes"),
    "sampler_disturbs": (0.01, 0.01, "%"),
}
ADVICE = {
    "agreement": "lengthen the window; if that does not help, the two are of different parts: on a "
    "superchip (GH200) the counter is of the whole module, the power of the GPU",
    "instant_agreement": "the load may beat with the readout's refresh; trust the counter",
    "sampler_gap": "the host held the sampler up; close other programs",
    "power_cap": "the board ran at its power limit",
    "throttled": "the board slowed down for heat or a power brake; improve its cooling",
    "temperature_drift": "warm up for longer",
    "clock_drift": "warm up for longer",
    "foreign_process": "another program computed on this GPU; stop it",
    "power_range": "a reading lies outside what the board can draw",
    "power_readings": "the sensor or its driver is wrong, and there is no counter beside it",
    "sampler_disturbs": "sample less often",
}
THROTTLES = ("sw_thermal_s", "hw_thermal_s", "power_brake_s")
# Of NVML's throttle reasons: the power limit; heat, a power brake, and slowdown by either.
REASONS = {"power_cap": 0x04, "throttled": 0x08 | 0x20 | 0x40 | 0x80}
READOUT = {"counter_j": "energy_j", "average_j": "power_w", "instant_j": "instant_w"}
ABOVE_LIMIT = {"power_w": 1.2, "instant_w": 1.5}  # a mean of one second, of some milliseconds
BELOW_IDLE = 0.5
LEAST_W, MOST_W = 1.0, 2500.0  # of any board, where its own limits are not told
LONE = 5.0  # how many times its neighbours on both sides make a reading that cannot be true ...
LONE_S = 0.5  # ... where it lasts less than this


@dataclass(frozen=True)
class Gate:
    """One check: `level` is ok, warn, invalid or unknown (not read, or not resolved)."""

    code: str
    level: str
    value: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Window:
    """What one window gave. `energy_j` is None where a gate is invalid; `reason` says which."""

    seconds: float
    joules: dict[str, float]
    reasons: dict[str, str]
    gates: tuple[Gate, ...]
    estimator: str | None = None
    reason: str = ""
    parts: tuple[Window, ...] = ()  # of several boards: the window of each

    @property
    def boards_j(self) -> list[float]:
        """Joules of each of several boards, by the estimator that is published."""
        return [part.joules[self.estimator] for part in self.parts] if self.estimator else []

    @property
    def energy_j(self) -> float | None:
        """Joules by the estimator that is published."""
        return None if self.estimator is None else self.joules[self.estimator]

    @property
    def mean_w(self) -> float | None:
        """Mean power over the window."""
        return None if self.energy_j is None else self.energy_j / self.seconds

    def failing(self, level: str) -> list[Gate]:
        """Gates of a level."""
        return [gate for gate in self.gates if gate.level == level]


def judge(
    trace: Trace,
    start_s: float,
    stop_s: float,
    *,
    idle_w: float | None = None,
    session: Sequence[Gate] = (),
    lenient: Sequence[str] = (),
    calls_s: Sequence[tuple[float, float]] = (),
    guard_s: float = 2.0,
    own: Sequence[int] = (),
) -> Window:
    """The energy of a window over all its boards, and every gate on the way.

    `idle_w` is the power of all boards with nothing running, `own` how many processes of each board
    are the measured ones (one each, if not said: this process). `session`
    are gates that hold for all windows, such as the sampler's effect on throughput. Gates named in
    `lenient` warn at most: a board that has just been busy cools while it idles. `calls_s` are the
    calls that the window is made of: prefill and decoding differ in clock and heat, so that only
    whole calls tell a drift.
    """
    boards = joules.boards(joules.cut(trace, start_s, stop_s, guard_s))
    each_w = None if idle_w is None else idle_w / max(1, len(boards))
    counts = [*own, *[1] * len(boards)]
    parts = [
        _board(rows, start_s, stop_s, idle_w=each_w, calls_s=calls_s, own=count)
        for rows, count in zip(boards, counts, strict=False)
    ]
    if not parts:
        reason = "not_covered: no readings around the window"
        return Window(
            stop_s - start_s,
            {},
            dict.fromkeys(joules.ESTIMATORS, reason),
            tuple(session),
            reason=reason,
        )
    whole = add(parts)
    gates = (
        replace(g, level="warn") if g.level == "invalid" and g.code in lenient else g
        for g in (*whole.gates, *session)
    )
    return settle(replace(whole, gates=tuple(gates)))


def _board(
    trace: Trace,
    start_s: float,
    stop_s: float,
    *,
    idle_w: float | None,
    calls_s: Sequence[tuple[float, float]],
    own: int,
) -> Window:
    by_estimator, reasons = joules.estimates(trace, start_s, stop_s)
    inside = [row for row in trace if start_s <= row["t_s"] <= stop_s]
    counter, seconds = by_estimator.get("counter_j"), stop_s - start_s
    estimator, reason = joules.primary(by_estimator, reasons)
    readout = READOUT.get(estimator)
    checks = [
        agreement(*joules.average_off(trace, start_s, stop_s)),
        instant_agreement(counter, by_estimator.get("instant_j")),
        sampler_gap(inside, start_s, stop_s, readout),
        slowed("power_cap", inside, seconds, ("power_cap_s",)),
        slowed("throttled", inside, seconds, THROTTLES),
        temperature_drift(inside, calls_s),
        clock_drift(inside, calls_s),
        foreign_process(inside, own),
        power_range(inside, by_estimator.get(estimator), seconds, idle_w),
    ]
    if readout in ABOVE_LIMIT:
        checks.append(power_readings(trace, readout, idle_w))
    return Window(seconds, by_estimator, reasons, tuple(checks), estimator, reason)


def settle(window: Window) -> Window:
    """Without an estimator where a gate is invalid; the first such gate is the reason."""
    bad = window.failing("invalid")
    if window.estimator and bad:
        return replace(window, estimator=None, reason=f"{bad[0].code}: {bad[0].text}")
    return window


def add(parts: Sequence[Window]) -> Window:
    """Windows of several boards at the same time as one: what one of them lacks, the sum lacks."""
    if len(parts) == 1:
        return parts[0]
    shared = set.intersection(*(set(p.joules) for p in parts))
    summed = {name: sum(p.joules[name] for p in parts) for name in shared}
    reasons = {name: reason for p in parts for name, reason in p.reasons.items()}
    gates = tuple(
        replace(g, text=f"GPU {n}: {g.text}") for n, p in enumerate(parts) for g in p.gates
    )
    if len({p.estimator for p in parts}) == 1 and parts[0].estimator:
        seconds, estimator = parts[0].seconds, parts[0].estimator
        return Window(seconds, summed, reasons, gates, estimator, parts=tuple(parts))
    reason = next((p.reason for p in parts if not p.estimator), "the boards have no readout alike")
    return Window(parts[0].seconds, summed, reasons, gates, None, reason)


def limited(code: str, value: float | None, text: str, size: float | None = None) -> Gate:
    """The gate of a value against its limits; `size` is what is compared (default: the value)."""
    if value is None:
        return Gate(code, "unknown", None, text)
    warn, invalid, _ = LIMITS[code]
    size = value if size is None else size
    level = "invalid" if size > invalid else "warn" if size > warn else "ok"
    return Gate(code, level, value, text + (f"; {ADVICE[code]}" if level != "ok" else ""))


def agreement(off: float | None, reason: str) -> Gate:
    """The one-second mean of the same board against the counter (relative)."""
    if off is None:
        return Gate("agreement", "unknown", None, reason)
    return limited(
        "agreement", off, f"the one-second mean gives {off:+.2%} against the counter", abs(off)
    )


def instant_agreement(counter_j: float | None, instant_j: float | None) -> Gate:
    """The integral of the instant reading against the counter (relative)."""
    if not counter_j or instant_j is None:
        return Gate("instant_agreement", "unknown", None, "instant_w or energy_j was not read")
    off = instant_j / counter_j - 1
    return limited(
        "instant_agreement",
        off,
        f"the instant reading gives {off:+.2%} against the counter",
        abs(off),
    )


def sampler_gap(inside: Trace, start_s: float, stop_s: float, readout: str | None = None) -> Gate:
    """The longest time without a reading that worked, of the readout that is published."""
    works = (lambda row: row.get(readout)) if readout else (lambda row: "error" not in row)
    good = [start_s, *(row["t_s"] for row in inside if works(row)), stop_s]
    gap_s = max(b - a for a, b in zip(good, good[1:], strict=False))
    return limited("sampler_gap", gap_s, f"no reading for {gap_s:.2f} s")


def slowed(code: str, inside: Trace, seconds: float, names: Sequence[str]) -> Gate:
    """The share of the window in which the driver's violation counters ran."""
    spans = [[row[name] for row in inside if name in row] for name in names]
    if not any(spans):
        return Gate(code, "unknown", None, "violation counters were not read")
    share = max(span[-1] - span[0] for span in spans if span) / seconds
    return limited(code, share, f"the board was held back in {share:.1%} of the window")


def held_back(before: dict[str, Any], after: dict[str, Any], seconds: float) -> list[Gate]:
    """Whether the power limit, or heat and a power brake, held the board back between two readings
    of its state; by the reasons that the driver gives at the second where it has no counters."""
    gates = []
    for code, names in (("power_cap", ("power_cap_s",)), ("throttled", THROTTLES)):
        gate = slowed(code, [before, after], seconds, [n for n in names if n in before])
        reasons = after.get("throttle_reasons")
        if gate.level == "unknown" and reasons is not None:
            active = bool(reasons & REASONS[code])
            text = f"the driver's reasons for slower clocks are {reasons:#x}"
            text += f"; {ADVICE[code]}" if active else ""
            gate = Gate(code, "warn" if active else "ok", None, text)
        gates.append(gate)
    return gates


def _ends(
    inside: Trace, name: str, calls_s: Sequence[tuple[float, float]]
) -> tuple[float, float] | str:
    """Means of a reading over the first and the last third of the calls (of the time where no calls
    are given), or why there are none."""
    points = joules.readings(inside, name)
    if not points:
        return "not read"
    if len(calls_s) == 1:
        return "the window is one call, which has no like part to compare"
    if calls_s:
        third = max(1, len(calls_s) // 3)
        first_s, last_s = calls_s[third - 1][1], calls_s[-third][0]
        ends = [v for t, v in points if t <= first_s], [v for t, v in points if t >= last_s]
    else:
        third = len(points) // 3
        ends = [v for _, v in points[:third]], [v for _, v in points[len(points) - third :]]
    if not all(ends):
        return "too few readings"
    return statistics.mean(ends[0]), statistics.mean(ends[1])


def temperature_drift(inside: Trace, calls_s: Sequence[tuple[float, float]] = ()) -> Gate:
    """The last calls of the window against the first (degrees)."""
    ends = _ends(inside, "temperature_c", calls_s)
    if isinstance(ends, str):
        return Gate("temperature_drift", "unknown", None, f"the GPU's temperature: {ends}")
    drift = ends[1] - ends[0]
    return limited(
        "temperature_drift", drift, f"the GPU's temperature moved by {drift:+.1f} C", abs(drift)
    )


def clock_drift(inside: Trace, calls_s: Sequence[tuple[float, float]] = ()) -> Gate:
    """The last calls of the window against the first (relative)."""
    ends = _ends(inside, "sm_hz", calls_s)
    if isinstance(ends, str):
        return Gate("clock_drift", "unknown", None, f"the GPU's clock: {ends}")
    drift = ends[1] / ends[0] - 1
    return limited("clock_drift", drift, f"the GPU's clock moved by {drift:+.1%}", abs(drift))


def foreign_process(inside: Trace, own: int = 1) -> Gate:
    """Programs that hold a context on the GPU, beyond `own` that are measured.

    They are counted, not named: in a container the driver tells process numbers of the host.
    """
    lists = [row["pids"] for row in inside if "pids" in row]
    if not lists:
        return Gate("foreign_process", "unknown", None, "processes were not listed")
    others = max(max(0, len(set(pids)) - own) for pids in lists)
    return limited("foreign_process", others, f"{others} other process(es) on the GPU")


def power_range(
    inside: Trace, published_j: float | None, seconds: float, idle_w: float | None
) -> Gate:
    """Mean power between half of idle and a tenth above the limit."""
    limit_w = _limit_w(inside)
    if published_j is None or limit_w is None:
        return Gate("power_range", "unknown", None, "the energy or the limit was not read")
    watts, low, high = published_j / seconds, BELOW_IDLE * (idle_w or 0.0), 1.1 * limit_w
    text = f"mean power {watts:.0f} W"
    if low <= watts <= high:
        return Gate("power_range", "ok", watts, text)
    return Gate(
        "power_range",
        "invalid",
        watts,
        f"{text}, not within [{low:.0f}, {high:.0f}] W; {ADVICE['power_range']}",
    )


def _limit_w(trace: Trace) -> float | None:
    """The highest limit that was in force; None where none was told that a board can have."""
    limits = [value for _, value in joules.readings(trace, "power_limit_w")]
    return max((w for w in limits if LEAST_W < w <= MOST_W), default=None)


def power_readings(trace: Trace, name: str, idle_w: float | None) -> Gate:
    """Each power reading against what the board can draw, and against its neighbours.

    For a readout that is published without a counter beside it. Zeros are readings that failed,
    and left out here as in the energy.
    """
    code, limit_w = "power_readings", _limit_w(trace)
    points = [(row["t_s"], row[name]) for row in trace if row.get(name)]
    low = BELOW_IDLE * idle_w if idle_w else LEAST_W
    high = MOST_W if limit_w is None else ABOVE_LIMIT[name] * limit_w
    if any(b < a for (a, _), (b, _) in zip(points, points[1:], strict=False)):
        return Gate(code, "invalid", None, f"the times of the readings go back; {ADVICE[code]}")
    for _, watts in points:
        if not math.isfinite(watts) or not low <= watts <= high:
            text = f"a reading of {watts:,.4g} W, not within [{low:.0f}, {high:.0f}] W"
            return Gate(code, "invalid", watts, f"{text}; {ADVICE[code]}")
    times = [t for t, _ in points]
    for t_s, watts in points:
        sides = [
            [value for _, value in points[slice(*(bisect.bisect_left(times, t) for t in edges))]]
            for edges in ((t_s - 2 * LONE_S, t_s - LONE_S), (t_s + LONE_S, t_s + 2 * LONE_S))
        ]
        near = sides[0] + sides[1] if all(sides) else [watts]
        # A board that waits between calls may well show its idle power for a moment.
        if watts > LONE * max(near) or (idle_w is None and LONE * watts < min(near)):
            text = f"a lone reading of {watts:,.4g} W among {min(near):.0f} to {max(near):.0f} W"
            return Gate(code, "invalid", watts, f"{text}; {ADVICE[code]}")
    count = f"{len(points)} readings of {name}"
    if limit_w is None:
        text = f"{count} agree with their neighbours; no limit was read to hold them against"
        return Gate(code, "warn", None, text)
    return Gate(code, "ok", None, f"{count}, all that the board can draw")


def sampler_disturbs(ratio: Estimate) -> Gate:
    """Time of a call with the sampler over time without it; decided by the interval."""
    code, (_, limit, _) = "sampler_disturbs", LIMITS["sampler_disturbs"]
    if ratio.value is None or ratio.low is None:
        return Gate(code, "unknown", None, f"not checked: {ratio.reason}")
    text = f"calls take {stats.change(ratio)} of their time more with the sampler"
    if ratio.low - 1 > limit or ratio.high - 1 < -limit:
        return Gate(code, "invalid", ratio.value - 1, f"{text}; {ADVICE[code]}")
    if -limit <= ratio.low - 1 and ratio.high - 1 <= limit:
        return Gate(code, "ok", ratio.value - 1, text)
    return Gate(code, "unknown", ratio.value - 1, f"{text}: not resolved to {limit:.0%} here")


def repeated(alarm: Gate, fresh: Gate) -> Gate:
    """What an alarm of `sampler_disturbs` and the same check on fresh pairs say together.

    It is invalid where the fresh pairs say the same. On a noisy host a few pairs raise an alarm
    once in some twenty sessions by chance, and twice in the same direction hardly ever.
    """
    invalid = fresh.level == "invalid"
    same = invalid and (fresh.value > 0) == (alarm.value > 0)
    level = "unknown" if invalid and not same else fresh.level
    relation = "the same" if same else "not the same"
    text = f"{fresh.text}; {relation} as {alarm.value:+.1%} found before, which these pairs check"
    return Gate(alarm.code, level, fresh.value, text)


def as_dicts(gates: Sequence[Gate]) -> list[dict[str, Any]]:
    """For a record."""
    return [asdict(gate) for gate in gates]
