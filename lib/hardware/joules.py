"""Joules of a window from a trace of one GPU's readings: the counter, and three others beside it.

A trace is a list of readings in time order. Each has `t_s` (CLOCK_MONOTONIC, the middle of the
call) and `latency_s`, and what could be read: `energy_j` (the board's counter), `instant_w` (a
short mean before each refresh), `power_w` (the mean of the last second), temperatures, clocks.
All are readouts of one board, not independent sensors. What cannot be told is None with a reason
that starts with a code; it is never zero and never made positive.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Trace = Sequence[dict[str, Any]]
Reading = tuple[float | None, str]
TICK_S = 0.1  # refresh of all three readouts on an H100; `hardware.readouts` measures it
INSTANT_LAG_S = TICK_S / 2 + 0.025 / 2  # held for a refresh after the mean of 25 ms before it
AVERAGE_S = 1.0  # of the mean that `power_w` is, on Ampere and later
AVERAGE_LAG_S = TICK_S / 2 + AVERAGE_S / 2  # held for a refresh after the mean of one second
GRID_TOLERANCE_S = 0.002  # how far ticks may lie off an even grid and still be called even
STALL_TICKS = 3
# What is published as the energy: the counter, else the reading that covers all of the time, else
# the one that covers a part of it.
LADDER = ("counter_j", "average_j", "instant_j")


@dataclass(frozen=True)
class Ticks:
    """When the counter changed, and to what. `period_s` is None where the ticks are not even."""

    times_s: np.ndarray
    joules: np.ndarray
    period_s: float | None = None

    def at(self, t_s: float) -> float:
        """The counter at t_s, on the line between the neighbouring ticks."""
        return float(np.interp(t_s, self.times_s, self.joules))


def readings(trace: Trace, name: str) -> list[tuple[float, float]]:
    """(time, value) where the field was read. NVML gives 0 where it fails; no board draws 0 W."""
    return [(row["t_s"], row[name]) for row in trace if row.get(name)]


def ticks(trace: Trace, name: str = "energy_j") -> Ticks:
    """The changes of a readout, placed in time more finely than it was sampled.

    A change lies between the reading that still had the old value and the one that had the new
    one. The readouts refresh on an even grid, so the grid that passes through all these brackets
    is known to about a millisecond where the sampling period does not divide the refresh. Where
    no even grid fits, a change is placed in the middle of its bracket.
    """
    rows = [row for row in trace if row.get(name)]
    pairs = [(a, b) for a, b in zip(rows, rows[1:], strict=False) if a[name] != b[name]]
    early = np.array([a["t_s"] - a.get("latency_s", 0.0) / 2 for a, _ in pairs])
    late = np.array([b["t_s"] + b.get("latency_s", 0.0) / 2 for _, b in pairs])
    values = np.array([b[name] for _, b in pairs], dtype=float)
    grid = even_grid(early, late)
    if grid is None:
        return Ticks((early + late) / 2, values)
    return Ticks(grid[0], values, grid[1])


def even_grid(early: np.ndarray, late: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Times first + period x k with early <= time <= late for every tick, and the period.

    None with fewer than four ticks or where the best grid misses a bracket by more than
    GRID_TOLERANCE_S. The room between the brackets is a concave function of the period, so a
    ternary search finds the roomiest one.
    """
    if len(early) < 4:
        return None
    middle = (early + late) / 2
    steps = np.diff(middle)
    usual = float(np.mean(steps[steps < 1.5 * np.median(steps)]))
    k = np.concatenate([[0.0], np.cumsum(np.maximum(np.round(steps / usual), 1.0))])
    guess = float(np.polyfit(k, middle, 1)[0])

    def room(period: float) -> float:
        return float(np.min(late - period * k) - np.max(early - period * k))

    span = float(np.max(late - early)) / k[-1]
    low, high = guess - span, guess + span
    for _ in range(60):
        third = (high - low) / 3
        if room(low + third) < room(high - third):
            low += third
        else:
            high -= third
    period = float((low + high) / 2)
    if room(period) < -2 * GRID_TOLERANCE_S:
        return None
    first = (np.min(late - period * k) + np.max(early - period * k)) / 2
    return first + period * k, period


def counter_j(trace: Trace, start_s: float, stop_s: float) -> Reading:
    """Joules between two times by the counter, interpolated linearly between its ticks."""
    if not readings(trace, "energy_j"):
        return None, "not_supported: no energy_j in the trace"
    counter = ticks(trace)
    if reason := reset(trace) or stalled(counter, start_s, stop_s):
        return None, reason
    return counter.at(stop_s) - counter.at(start_s), ""


def reset(trace: Trace) -> str:
    """Why a counter that falls cannot be used: the driver was reloaded, or the board was lost."""
    values = [joules for _, joules in readings(trace, "energy_j")]
    if any(after < before for before, after in zip(values, values[1:], strict=False)):
        return "counter_reset: the energy counter went backwards"
    return ""


def stalled(counter: Ticks, start_s: float, stop_s: float) -> str:
    """Why a counter without ticks around or inside the window cannot be used."""
    times = counter.times_s
    if len(times) < 2:
        return "counter_stalled: the energy counter did not change"
    if times[0] > start_s or times[-1] < stop_s:
        return "not_covered: the energy counter did not tick before and after the window"
    first, last = bisect.bisect_right(times, start_s) - 1, bisect.bisect_left(times, stop_s)
    pause_s = float(np.max(np.diff(times[first : last + 1])))
    if pause_s > (STALL_TICKS + 0.5) * (counter.period_s or float(np.median(np.diff(times)))):
        return f"counter_stalled: the energy counter did not change for {pause_s:.2f} s"
    return ""


def held_j(trace: Trace, name: str, start_s: float, stop_s: float, lag_s: float) -> Reading:
    """Joules between two times from a power reading that stands for what was `lag_s` before.

    A reading holds until the next one (trapezoids, so that a change lies in the middle between the
    reading before and the one after), with the value at both edges. Right for any power that is
    steady around the edges; the lead-in and the lead-out are there for that.
    """
    points = readings(trace, name)
    start_s, stop_s = start_s + lag_s, stop_s + lag_s
    if not points:
        return None, f"not_supported: no {name} in the trace"
    if points[0][0] > start_s or points[-1][0] < stop_s:
        return None, f"not_covered: no {name} before and after the window"
    times, watts = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    inside = (times > start_s) & (times < stop_s)
    edges = np.interp([start_s, stop_s], times, watts)
    path = np.concatenate([[edges[0]], watts[inside], [edges[1]]])
    at = np.concatenate([[start_s], times[inside], [stop_s]])
    return float(np.sum((path[1:] + path[:-1]) / 2 * np.diff(at))), ""


def instant_j(trace: Trace, start_s: float, stop_s: float) -> Reading:
    """Joules by the instant reading: hardly any lag, but on an H100 25 ms of every 100 only."""
    return held_j(trace, "instant_w", start_s, stop_s, INSTANT_LAG_S)


def average_j(trace: Trace, start_s: float, stop_s: float) -> Reading:
    """Joules by the one-second mean, its lag corrected: all of the time, smeared at the edges."""
    return held_j(trace, "power_w", start_s, stop_s, AVERAGE_LAG_S)


def average_off(trace: Trace, start_s: float, stop_s: float) -> Reading:
    """How far the one-second mean is from the counter, relative, with the edges out of the way.

    The counter is seen through the same one-second mean, held until the next refresh, and both are
    integrated over the same readings: power that changes at the edges of the window, which the
    mean smears, cancels. Needs ticks from one second before the window.
    """
    points, counter = readings(trace, "power_w"), ticks(trace)
    if not points or len(counter.times_s) < 2 or counter.times_s[0] + AVERAGE_S > start_s:
        return None, "not_covered: no power_w, or no ticks from one second before the window"
    seen = np.searchsorted(counter.times_s, [t for t, _ in points], side="right") - 1
    before = np.interp(counter.times_s - AVERAGE_S, counter.times_s, counter.joules)
    means = ((counter.joules - before) / AVERAGE_S)[seen]
    rows = [
        {"t_s": t, "power_w": watts, "counter_w": mean}
        for (t, watts), mean in zip(points, means, strict=True)
    ]
    total = {
        name: held_j(rows, name, start_s, stop_s, AVERAGE_LAG_S)
        for name in ("power_w", "counter_w")
    }
    if reasons := [reason for joules, reason in total.values() if joules is None]:
        return None, reasons[0]
    return total["power_w"][0] / total["counter_w"][0] - 1, ""


def paper_j(trace: Trace, start_s: float, stop_s: float) -> Reading:
    """The paper's estimator: (reading before + reading after) / 2 x time, from the 1 s mean."""
    before, after = shown(trace, "power_w", start_s), shown(trace, "power_w", stop_s)
    if before is None or after is None:
        return None, "not_covered: no power_w at the edges of the window"
    return (before + after) / 2 * (stop_s - start_s), ""


def two_readings_j(trace: Trace, start_s: float, stop_s: float) -> Reading:
    """Two plain readings of the counter subtracted: what most tools do."""
    before, after = shown(trace, "energy_j", start_s), shown(trace, "energy_j", stop_s)
    if before is None or after is None:
        return None, "not_covered: no energy_j at the edges of the window"
    return (after - before, "") if after >= before else (None, reset(trace))


def shown(trace: Trace, name: str, t_s: float) -> float | None:
    """What a program that asks at t_s is told: the value at the last reading before."""
    points = readings(trace, name)
    if not points or not points[0][0] <= t_s <= points[-1][0]:
        return None
    return points[bisect.bisect_right(points, (t_s, math.inf)) - 1][1]


ESTIMATORS = {
    "counter_j": counter_j,
    "instant_j": instant_j,
    "average_j": average_j,
    "paper_j": paper_j,
}


def estimates(
    trace: Trace, start_s: float, stop_s: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Joules by each estimator that has them, and the reasons of those that do not."""
    results = {name: estimator(trace, start_s, stop_s) for name, estimator in ESTIMATORS.items()}
    joules = {name: value for name, (value, _) in results.items() if value is not None}
    return joules, {name: reason for name, (value, reason) in results.items() if value is None}


def primary(joules: dict[str, float], reasons: dict[str, str]) -> tuple[str | None, str]:
    """The estimator to publish, or None and why.

    A counter that is not there gives way to the power readings. One that was reset or stalled, or
    did not cover the window, does not: what happened to it may have happened to them.
    """
    reason = reasons.get("counter_j", "")
    if reason and not reason.startswith("not_supported"):
        return None, reason
    chosen = next((name for name in LADDER if name in joules), None)
    return chosen, "" if chosen else reasons["average_j"]


def cut(trace: Trace, start_s: float, stop_s: float, guard_s: float) -> list[dict[str, Any]]:
    """The readings of a window and of `guard_s` around it."""
    return [row for row in trace if start_s - guard_s <= row["t_s"] <= stop_s + guard_s]


def boards(trace: Trace) -> list[list[dict[str, Any]]]:
    """The readings of each GPU of a trace, in the order of the devices."""
    numbers = sorted({row.get("gpu", 0) for row in trace})
    return [[row for row in trace if row.get("gpu", 0) == number] for number in numbers]


def over_boards(
    estimator: Callable[[Trace, float, float], Reading], trace: Trace, start_s: float, stop_s: float
) -> Reading:
    """The sum of an estimator over the boards of a trace; what one of them lacks, the sum lacks."""
    results = [estimator(rows, start_s, stop_s) for rows in boards(trace)]
    if not results:
        return None, "not_covered: no readings"
    if reasons := [reason for joules, reason in results if joules is None]:
        return None, reasons[0]
    return sum(joules for joules, _ in results), ""


def additivity(trace: Trace, start_s: float, stop_s: float, guard_s: float = 1.5) -> Reading:
    """E(first half) + E(second half) over E(all), less one.

    Each of the three is found from its own part of the trace only. (From one set of ticks the sum
    would be exact by construction and show nothing.)
    """
    middle_s = (start_s + stop_s) / 2
    spans = ((start_s, stop_s), (start_s, middle_s), (middle_s, stop_s))
    results = [over_boards(counter_j, cut(trace, *span, guard_s), *span) for span in spans]
    if reasons := [reason for joules, reason in results if joules is None]:
        return None, reasons[0]
    (whole, _), (first, _), (second, _) = results
    return (first + second) / whole - 1, ""
