"""Whether a window's energy can be believed: each check has a code, a level and its value.

A window with an `invalid` gate has no energy, only the reason; `warn` is shown beside the number.
The limits stand in one table.
"""

from __future__ import annotations

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
    "agreement": "lengthen the window, or look for another process on the GPU",
    "instant_agreement": "the load may beat with the readout's refresh; trust the counter",
    "sampler_gap": "the host held the sampler up; close other programs",
    "power_cap": "the board ran at its power limit",
    "throttled": "the board slowed down for heat or a power brake; improve its cooling",
    "temperature_drift": "warm up for longer",
    "clock_drift": "warm up for longer",
    "foreign_process": "another program computed on this GPU; stop it",
    "power_range": "a reading lies outside what the board can draw",
    "sampler_disturbs": "sample less often",
}
THROTTLES = ("sw_thermal_s", "hw_thermal_s", "power_brake_s")


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
    own_pid: int | None = None,
    session: Sequence[Gate] = (),
    lenient: Sequence[str] = (),
    calls_s: Sequence[tuple[float, float]] = (),
    guard_s: float = 2.0,
) -> Window:
    """The energy of a window over all its boards, and every gate on the way.

    `idle_w` is the power of one board with nothing running; `session` are gates that hold for all
    windows, such as the sampler's effect on throughput. Gates named in `lenient` warn at most: a
    board that has just been busy cools while it idles. `calls_s` are the calls that the window is
    made of: prefill and decoding differ in clock and heat, so that only whole calls tell a drift.
    """
    parts = [
        _board(rows, start_s, stop_s, idle_w=idle_w, own_pid=own_pid, calls_s=calls_s)
        for rows in joules.boards(joules.cut(trace, start_s, stop_s, guard_s))
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
    own_pid: int | None,
    calls_s: Sequence[tuple[float, float]],
) -> Window:
    by_estimator, reasons = joules.estimates(trace, start_s, stop_s)
    inside = [row for row in trace if start_s <= row["t_s"] <= stop_s]
    counter, seconds = by_estimator.get("counter_j"), stop_s - start_s
    checks = (
        agreement(*joules.average_off(trace, start_s, stop_s)),
        instant_agreement(counter, by_estimator.get("instant_j")),
        sampler_gap(inside, start_s, stop_s),
        slowed("power_cap", inside, seconds, ("power_cap_s",)),
        slowed("throttled", inside, seconds, THROTTLES),
        temperature_drift(inside, calls_s),
        clock_drift(inside, calls_s),
        foreign_process(inside, own_pid),
        power_range(inside, counter, seconds, idle_w),
    )
    estimator, reason = joules.primary(by_estimator, reasons)
    return Window(seconds, by_estimator, reasons, checks, estimator, reason)


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
        return Window(parts[0].seconds, summed, reasons, gates, parts[0].estimator)
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


def sampler_gap(inside: Trace, start_s: float, stop_s: float) -> Gate:
    """The longest time without a reading that worked."""
    good = [start_s, *(r["t_s"] for r in inside if "error" not in r), stop_s]
    gap_s = max(b - a for a, b in zip(good, good[1:], strict=False))
    return limited("sampler_gap", gap_s, f"no reading for {gap_s:.2f} s")


def slowed(code: str, inside: Trace, seconds: float, names: Sequence[str]) -> Gate:
    """The share of the window in which the driver's violation counters ran."""
    spans = [[row[name] for row in inside if name in row] for name in names]
    if not any(spans):
        return Gate(code, "unknown", None, "violation counters were not read")
    share = max(span[-1] - span[0] for span in spans if span) / seconds
    return limited(code, share, f"the board was held back in {share:.1%} of the window")


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


def foreign_process(inside: Trace, own_pid: int | None) -> Gate:
    """Other programs that hold a context on the GPU.

    In a container the driver tells process numbers of the host, where ours is another; then one
    process is taken for ours.
    """
    lists = [row["pids"] for row in inside if "pids" in row]
    if not lists:
        return Gate("foreign_process", "unknown", None, "processes were not listed")
    others = max(
        len(set(pids) - {own_pid}) if own_pid in pids else max(0, len(pids) - 1) for pids in lists
    )
    return limited("foreign_process", others, f"{others} other process(es) on the GPU")


def power_range(
    inside: Trace, counter_j: float | None, seconds: float, idle_w: float | None
) -> Gate:
    """Mean power between half of idle and a tenth above the limit."""
    limits = [value for _, value in joules.readings(inside, "power_limit_w")]
    if counter_j is None or not limits:
        return Gate("power_range", "unknown", None, "the counter or the limit was not read")
    watts, low, high = counter_j / seconds, 0.5 * (idle_w or 0.0), 1.1 * limits[-1]
    text = f"mean power {watts:.0f} W"
    if low <= watts <= high:
        return Gate("power_range", "ok", watts, text)
    return Gate(
        "power_range",
        "invalid",
        watts,
        f"{text}, not within [{low:.0f}, {high:.0f}] W; {ADVICE['power_range']}",
    )


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
