"""What a board's readouts are like, from one trace under known loads: a step, a square wave, a
long constant load.

The load's edges are known in time, its power is not: nothing here compares the board with a meter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lib.hardware import joules
from lib.hardware.joules import Trace

NAMES = {"energy_j": "counter", "instant_w": "instant", "power_w": "average"}
SETTLED_S = 1.5  # of a constant load, before anything is compared on it
CHANGES = 20  # fewer do not tell a refresh from chance
SPREAD_FULL = 0.25  # over the phases of a square wave: a readout that sees all stays below


def describe(
    trace: Trace, step: tuple[float, float], phases: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """Every number that `values` of an instrument record holds; None where a readout is absent.

    `step` is when the constant load began and ended, `phases` when each square wave did.
    """
    start_s, stop_s = step
    inside = (start_s + SETTLED_S, stop_s - 2 * joules.TICK_S)
    values: dict[str, Any] = {"readings": len(trace), **calls(trace)}
    for field, name in NAMES.items():
        values[f"{name}_refresh_s"] = refresh_s(trace, field)
        values[f"{name}_step_s"] = step_s(trace, field, start_s, stop_s)
        values[f"{name}_phase_spread"] = phase_spread(trace, field, phases)
    window = averaging(trace)
    values |= {"average_window_s": window and window[0], "average_lag_s": window and window[1]}
    counter, _ = joules.counter_j(trace, *inside)
    instant, _ = joules.instant_j(trace, *inside)
    values["constant_average_off"] = joules.average_off(trace, *inside)[0]
    values["constant_instant_off"] = instant / counter - 1 if counter and instant else None
    values["constant_w"] = counter / (inside[1] - inside[0]) if counter else None
    return values | {"counter_sees_all": sees_all(values)}


def calls(trace: Trace) -> dict[str, Any]:
    """How long a reading takes (s), and the share that failed."""
    took = sorted(row["latency_s"] for row in trace if "latency_s" in row)
    failed = sum("error" in row for row in trace)
    return {
        "call_median_s": took[len(took) // 2] if took else None,
        "call_worst_s": took[-1] if took else None,
        "call_errors": failed / len(trace) if trace else None,
    }


def refresh_s(trace: Trace, field: str) -> float | None:
    """Seconds between two changes: of the even grid, or the median where they are not even.

    A readout whose value stays the same at a refresh shows no change there.
    """
    changes = joules.ticks(trace, field)
    if len(changes.times_s) < CHANGES:
        return None
    return changes.period_s or float(np.median(np.diff(changes.times_s)))


def power(trace: Trace, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Times and watts of a readout as it appears; the counter's from tick to tick."""
    if field == "energy_j":
        counter = joules.ticks(trace)
        return counter.times_s[1:], np.diff(counter.joules) / np.diff(counter.times_s)
    points = joules.readings(trace, field)
    return np.array([t for t, _ in points]), np.array([w for _, w in points])


def step_s(trace: Trace, field: str, start_s: float, stop_s: float) -> float | None:
    """Seconds from the start of a constant load until a readout is half of the way up."""
    times, watts = power(trace, field)
    before = watts[(times < start_s) & (times > start_s - 1.0)]
    during = watts[(times > start_s + SETTLED_S) & (times < stop_s)]
    if not len(before) or not len(during) or np.mean(during) <= np.mean(before):
        return None
    half = (np.mean(before) + np.mean(during)) / 2
    above = times[(times > start_s) & (watts >= half)]
    return float(above[0] - start_s) if len(above) else None


def averaging(trace: Trace) -> tuple[float, float] | None:
    """Length and lag (s) of the mean that `power_w` is, as the counter tells them.

    The pair for which the counter's mean over that length, that long ago, is nearest to the
    readings at the moments when they change.
    """
    counter, seen = joules.ticks(trace), joules.ticks(trace, "power_w")
    if len(counter.times_s) < 2 or len(seen.times_s) < 10:
        return None
    best: tuple[float, float, float] | None = None
    for length in np.round(np.arange(0.1, 2.01, 0.1), 2):
        for lag in np.round(np.arange(-0.1, 0.301, 0.01), 2):
            ends = seen.times_s - lag
            covered = (ends - length > counter.times_s[0]) & (ends < counter.times_s[-1])
            if covered.sum() < 10:
                continue
            upper = np.interp(ends[covered], counter.times_s, counter.joules)
            lower = np.interp(ends[covered] - length, counter.times_s, counter.joules)
            off = (upper - lower) / length / seen.joules[covered] - 1
            score = float(np.sqrt(np.mean(off**2)))
            if best is None or score < best[0]:
                best = (score, float(length), float(lag))
    return best and (best[1], best[2] + 0.0)  # no minus zero


def phase_spread(trace: Trace, field: str, phases: Sequence[tuple[float, float]]) -> float | None:
    """(largest - smallest) / mean over square waves that differ in phase only.

    A readout that sees all of the time gives each the same power; one that sees a part of it gives
    more where its part falls on the busy half. Of the one-second mean only the end counts.
    """
    means = []
    for start_s, stop_s in phases:
        if field == "energy_j":
            joules_, _ = joules.counter_j(trace, start_s, stop_s)
            means.append(None if joules_ is None else joules_ / (stop_s - start_s))
            continue
        skip_s = joules.AVERAGE_S if field == "power_w" else 0.0
        times, watts = power(trace, field)
        seen = watts[(times > start_s + skip_s) & (times < stop_s)]
        means.append(float(np.mean(seen)) if len(seen) else None)
    if None in means or not means:
        return None
    return (max(means) - min(means)) / float(np.mean(means))


def sees_all(values: dict[str, Any]) -> bool | None:
    """Whether the counter integrates all of the time; None where the wave did not tell.

    It tells only where the instant reading, which is known to see a part, shows the phase.
    """
    counter, instant = values["counter_phase_spread"], values["instant_phase_spread"]
    if counter is None or instant is None or max(counter, instant) < SPREAD_FULL:
        return None
    return counter < SPREAD_FULL
