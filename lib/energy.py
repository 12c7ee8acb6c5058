"""Gross energy of whole calls from the GPU board's counter, and the paper's estimator beside it.

The boundary is the GPU board: no CPU, no DRAM, no fans of the host. The counter ticks about every
100 ms, so that its value at the edges of a call is interpolated between ticks.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib import decode, records
from lib.device import time_call
from lib.progress import track
from lib.records import Record
from lib.session import begin_records, prompt_ids

LEAD_TOKENS = 4  # length of the calls that keep the card busy before and after the window
LEAD_IN_S = 1.5  # covers the one-second mean that the power reading is
LEAD_OUT_S = 0.5  # covers the counter's tick
AGREEMENT_WARN = 0.03

Trace = Sequence[dict[str, float]]


def sweep(
    model: Any,
    *,
    stack: str = "hf-eager",
    contexts: Sequence[int],
    new_tokens: int,
    repeats: int,
    idle_s: float,
    seed: int,
    records_path: str | Path,
) -> list[Record]:
    """Energy of `repeats` back-to-back calls at every context, each row written at once."""
    rows = begin_records(model, records_path)
    env_id = rows[0].env_id
    idle = idle_power(model.device, idle_s)
    for context in track(contexts, f"energy of {model.name}"):
        row = arm(model, stack=stack, context=context, new_tokens=new_tokens, repeats=repeats,
                  idle=idle, seed=seed, env_id=env_id,
                  trace_path=Path(records_path).with_name(f"trace-{context}.jsonl.gz"))  # fmt: skip
        rows.append(records.append(records_path, row))
    return rows


def idle_power(device: Any, idle_s: float) -> dict[str, float]:
    """Mean board power (W) with the model loaded and nothing running; empty without a counter."""
    if "energy" in device.missing:
        return {}
    device.synchronize()
    with device.power_trace() as trace:
        device.sleep_s(1.0)  # clocks and the counter settle
        start_s = device.clock_s()
        device.sleep_s(idle_s)
        stop_s = device.clock_s()
        device.sleep_s(LEAD_OUT_S)
    joules, _ = counter_between(trace, start_s, stop_s)
    return {} if joules is None else {"idle_w": joules / (stop_s - start_s)}


def arm(
    model: Any,
    *,
    stack: str,
    context: int,
    new_tokens: int,
    repeats: int,
    idle: dict[str, float],
    seed: int,
    env_id: str | None,
    trace_path: Path | None = None,
) -> Record:
    """One cell: lead-in, `repeats` calls, lead-out, all under one trace.

    samples per call: `e2e_s`; `energy_j` from the counter; `average_energy_j`, its power reading
    integrated; `paper_energy_j`, the paper's estimator: the mean of power.draw before and after the
    call, times its duration. `start_s` and `stop_s` are the calls' edges in seconds since the
    trace began, `trace` names the file with the raw readings. values: `window_energy_j` and
    `window_s` over all calls, `idle_w`.
    """
    device = model.device
    generate = decode.open_stack(stack, model.net)
    ids = prompt_ids(model, context, seed=seed)
    time_call(lambda: generate(ids, min(new_tokens, LEAD_TOKENS)), device)
    edges_s, power_w, e2e_s = [], [], []
    with device.power_trace() as trace:
        keep_busy(lambda: generate(ids, min(new_tokens, LEAD_TOKENS)), LEAD_IN_S, device)
        for _ in range(repeats):
            before_w, start_s = device.power_w(), device.clock_s()
            seconds, _ = time_call(lambda: generate(ids, new_tokens), device)
            edges_s.append((start_s, device.clock_s()))
            power_w.append((before_w, device.power_w()))
            e2e_s.append(seconds)
        keep_busy(lambda: generate(ids, min(new_tokens, LEAD_TOKENS)), LEAD_OUT_S, device)
    samples, missing = energy_samples(trace, edges_s, device)
    if "energy" not in device.missing:
        samples["paper_energy_j"] = [
            (before + after) / 2 * seconds
            for (before, after), seconds in zip(power_w, e2e_s, strict=True)
        ]
    traced = {}
    if trace and trace_path:
        zero_s = trace[0]["t_s"]
        records.write_trace(trace_path, ({**row, "t_s": row["t_s"] - zero_s} for row in trace))
        samples["start_s"] = [start_s - zero_s for start_s, _ in edges_s]
        samples["stop_s"] = [stop_s - zero_s for _, stop_s in edges_s]
        traced = {"trace": trace_path.name}
    return Record(
        kind="energy",
        key=model.key(stack=stack, context=context, new_tokens=new_tokens, decoding="greedy"),
        samples={"e2e_s": e2e_s, **samples},
        values={**model.source, **idle, **window_values(samples, edges_s), **traced},
        missing=missing,
        warnings=tuple(agreement_warnings(samples)),
        env_id=env_id,
    )


def keep_busy(call: Callable[[], Any], seconds: float, device: Any) -> None:
    """Repeat a short call for at least this long, where there is a counter to settle."""
    if "energy" in device.missing:
        return
    end_s = device.clock_s() + seconds
    while device.clock_s() < end_s:
        time_call(call, device)


def energy_samples(
    trace: Trace, edges_s: Sequence[tuple[float, float]], device: Any
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Joules of each call by counter and by integrated power, or the reason why there are none."""
    if reason := device.missing.get("energy"):
        return {}, dict.fromkeys(("energy_j", "average_energy_j", "paper_energy_j"), reason)
    samples: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for name, estimator in (("energy_j", counter_between), ("average_energy_j", power_between)):
        results = [estimator(trace, start_s, stop_s) for start_s, stop_s in edges_s]
        if reasons := [reason for joules, reason in results if joules is None]:
            missing[name] = reasons[0]
        else:
            samples[name] = [joules for joules, _ in results]
    return samples, missing


def ticks(trace: Trace) -> list[tuple[float, float]]:
    """(time, joules) where the counter was first seen with a new value."""
    found: list[tuple[float, float]] = []
    for row in trace:
        if "energy_j" in row and (not found or row["energy_j"] != found[-1][1]):
            found.append((row["t_s"], row["energy_j"]))
    return found[1:]  # the first reading lies somewhere inside a tick


def counter_between(
    trace: Trace, start_s: float, stop_s: float
) -> tuple[float | None, str]:
    """Joules between two times, the counter interpolated linearly between its ticks."""
    points = ticks(trace)
    if any(later[1] < earlier[1] for earlier, later in zip(points, points[1:], strict=False)):
        return None, "the energy counter went backwards: it was reset during the window"
    if len(points) < 2 or points[0][0] > start_s or points[-1][0] < stop_s:
        return None, "the energy counter did not tick before and after the window"
    return interpolated(points, stop_s) - interpolated(points, start_s), ""


def interpolated(points: Sequence[tuple[float, float]], t_s: float) -> float:
    """The value at t_s on the line through the neighbouring points."""
    right = max(1, min(bisect.bisect_left([t for t, _ in points], t_s), len(points) - 1))
    (t0, e0), (t1, e1) = points[right - 1], points[right]
    return e0 + (e1 - e0) * (t_s - t0) / (t1 - t0)


def power_between(trace: Trace, start_s: float, stop_s: float) -> tuple[float | None, str]:
    """Joules between two times from the power readings (mean of the last second), trapezoid.

    Lags the truth by about half a second, which the lead-in and lead-out make harmless only for a
    steady load; it is here to check the counter.
    """
    points = [(row["t_s"], row["power_w"]) for row in trace if "power_w" in row]
    if len(points) < 2 or points[0][0] > start_s or points[-1][0] < stop_s:
        return None, "no power readings before and after the window"
    inner = [(t, w) for t, w in points if start_s < t < stop_s]
    first, last = interpolated(points, start_s), interpolated(points, stop_s)
    path = [(start_s, first), *inner, (stop_s, last)]
    return sum(
        (w0 + w1) / 2 * (t1 - t0) for (t0, w0), (t1, w1) in zip(path, path[1:], strict=False)
    ), ""


def window_values(
    samples: dict[str, list[float]], edges_s: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Energy and duration summed over the calls; empty without a counter."""
    if "energy_j" not in samples:
        return {}
    return {
        "window_energy_j": sum(samples["energy_j"]),
        "window_s": sum(stop_s - start_s for start_s, stop_s in edges_s),
    }


def agreement_warnings(samples: dict[str, list[float]]) -> list[dict[str, str]]:
    """Counter and integrated power read the same board; they should agree."""
    if not {"energy_j", "average_energy_j"} <= samples.keys():
        return []
    difference = sum(samples["average_energy_j"]) / sum(samples["energy_j"]) - 1
    if abs(difference) <= AGREEMENT_WARN:
        return []
    return [records.warning(
        "energy-agreement", f"integrated power differs from the counter by {difference:+.1%}: "
        "lengthen the window, or look for another process on the GPU")]  # fmt: skip
