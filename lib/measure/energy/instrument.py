"""Characterises the board's readouts under known loads, once in a session: kind `instrument`.

A constant load switched on and off, then square waves of half a refresh on and half off, whose
phase against the refresh differs. What it shows is worked out by `hardware.readouts`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.hardware import readouts
from lib.records import record, store
from lib.records.record import Record

PERIOD_S = 0.007  # of the readings here: many to a refresh
IDLE_S = 2.5  # covers the one-second mean after a change
WAVE_S = 0.1  # one period of the square wave: the refresh of an H100
WAVE_COUNT = 16
PHASES_S = (0.0, 0.025, 0.05, 0.075)
SIZE = 8192
Load = Callable[[float], Any]


def characterise(
    model: Any,
    *,
    seconds: float,
    env_id: str | None,
    records_path: str | Path,
    load: Load | None = None,
) -> list[Record]:
    """The row of the instrument, with its trace beside it; `seconds` of constant load, 0 for none.

    `load` keeps the board busy for so many seconds; by default a chain of matrix products.
    """
    device, key = model.device, dict.fromkeys(record.KEY_FIELDS) | {"model": model.name}
    reason = device.missing.get("energy") or (
        "" if seconds > 0 else "not asked for: instrument_s is 0"
    )
    if reason:
        row = Record(
            "instrument",
            key,
            values=dict(model.source),
            missing={"counter_refresh_s": reason},
            env_id=env_id,
        )
        return [store.append(records_path, row)]
    with device.power_trace(PERIOD_S, model.device.gpus_of(model.net)[:1]) as trace:
        step, phases = run(device, load or matrix_products(device), seconds)
    zero_s = trace[0]["t_s"]
    path = Path(records_path).with_name("trace-instrument.jsonl.gz")
    store.write_trace(path, ({**r, "t_s": round(r["t_s"] - zero_s, 6)} for r in trace))
    description = readouts.describe(trace, step, phases)
    edges = {
        "step_start_s": [step[0] - zero_s],
        "step_stop_s": [step[1] - zero_s],
        "wave_start_s": [start - zero_s for start, _ in phases],
        "wave_stop_s": [stop - zero_s for _, stop in phases],
    }
    absent = "this readout did not change, or the load did not show it"
    row = Record(
        kind="instrument",
        key=key,
        samples=edges,
        values={
            **model.source,
            "trace": path.name,
            **device.board_state(),
            **{name: value for name, value in description.items() if value is not None},
        },
        missing={name: absent for name, value in description.items() if value is None},
        env_id=env_id,
    )
    return [store.append(records_path, row)]


def run(
    device: Any, load: Load, seconds: float
) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """The loads one after another; when the constant one ran, and each of the square waves."""
    load(0.0)  # the first call of a kernel is slow
    device.synchronize()
    device.sleep_s(IDLE_S)
    start_s = device.clock_s()
    load(seconds)
    stop_s = device.clock_s()
    device.sleep_s(IDLE_S)
    phases = []
    first_s = device.clock_s()
    for number, phase_s in enumerate(PHASES_S):
        # Whole periods since the first wave, so that only the phase differs.
        due_s = first_s + number * (WAVE_COUNT + 2) * WAVE_S + phase_s
        wait_until(device, due_s)
        for cycle in range(WAVE_COUNT):
            load(WAVE_S / 2)
            wait_until(device, due_s + (cycle + 1) * WAVE_S)
        phases.append((due_s, due_s + WAVE_COUNT * WAVE_S))
    device.sleep_s(IDLE_S)
    return (start_s, stop_s), phases


def wait_until(device: Any, due_s: float) -> None:
    """Sleep up to a moment, or not at all if it has passed."""
    device.sleep_s(max(0.0, due_s - device.clock_s()))


def matrix_products(device: Any, size: int = SIZE) -> Load:
    """A load that multiplies two matrices of random numbers over and over, one after another."""
    import torch

    left, right = (
        torch.randn(size, size, device=device.torch_device, dtype=torch.bfloat16) for _ in range(2)
    )
    out = torch.empty_like(left)

    def load(seconds: float) -> None:
        end_s = device.clock_s() + seconds
        while True:
            torch.matmul(left, right, out=out)
            device.synchronize()
            if device.clock_s() >= end_s:
                return

    return load
