"""Reads the power of one or more GPUs at a fixed period, as a process of its own.

Run as a script by `board`; stops when its standard input closes. Each line is one reading of
one GPU: `t_s` (CLOCK_MONOTONIC, the middle of the call that read counter and power), `latency_s`
(how long that call took), `gpu` (its place on the command line), `energy_j` (counter), `instant_w`,
`power_w` (the mean of the last second on Ampere and later), `nvml_s` (NVML's own time of the
reading). Less often also temperatures, clocks, the limit, how long the board was held back, and
which processes compute on it. Where a reading failed there is `error` instead.
"""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml

# name: (field of NVML, its unit in SI). One call reads all of them.
FAST = {"energy_j": (83, 1e-3), "instant_w": (186, 1e-3), "power_w": (185, 1e-3)}
SLOW = {
    "memory_c": (82, 1.0),
    "power_cap_s": (74, 1e-9),
    "sw_thermal_s": (269, 1e-9),
    "hw_thermal_s": (270, 1e-9),
    "power_brake_s": (271, 1e-9),
}
UNION = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # by valueType
SLOW_EVERY = 10  # readings between two of temperature, clocks and violation counters
PROCESSES_EVERY = 40
BACK_OFF_S = 0.1  # the period after a reading that failed: some drivers fail when asked too fast


def fields(handle: Any, names: dict[str, tuple[int, float]]) -> tuple[dict[str, float], float]:
    """The fields that could be read, and NVML's own time of them (s since 1970)."""
    values = pynvml.nvmlDeviceGetFieldValues(handle, [(number, 0) for number, _ in names.values()])
    numbers = {
        name: round(getattr(value.value, UNION[value.valueType]) * unit, 6)
        for (name, (_, unit)), value in zip(names.items(), values, strict=True)
        if value.nvmlReturn == 0
    }
    return numbers, values[0].timestamp * 1e-6


def reading(handle: Any) -> dict[str, Any]:
    """Counter and power in one call; what this board has no field for, by its own function."""
    before_s = time.perf_counter()
    try:
        row, nvml_s = fields(handle, FAST)
        after_s = time.perf_counter()
        if "energy_j" not in row:
            row |= asked(energy_j=lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)
            after_s = time.perf_counter()
        if "power_w" not in row:
            row |= asked(power_w=lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
    except pynvml.NVMLError as error:
        return {"t_s": round(before_s, 6), "error": str(error)}
    middle_s, took_s = (before_s + after_s) / 2, after_s - before_s
    stamped = {"nvml_s": round(nvml_s, 4)} if nvml_s else {}
    return {"t_s": round(middle_s, 6), "latency_s": round(took_s, 6), **row, **stamped}


def asked(**questions: Callable[[], Any]) -> dict[str, Any]:
    """The answers of the questions that this board has an answer to."""
    answers = {}
    for name, question in questions.items():
        try:
            answers[name] = question()
        except (pynvml.NVMLError, AttributeError):  # or the binding has no such function
            continue
    return answers


def state(handle: Any) -> dict[str, Any]:
    """What changes slowly: temperatures (degrees Celsius), clocks, limit, time held back."""
    try:
        row, _ = fields(handle, SLOW)
    except pynvml.NVMLError:
        row = {}
    return row | asked(
        temperature_c=lambda: pynvml.nvmlDeviceGetTemperature(handle, 0),
        sm_hz=lambda: pynvml.nvmlDeviceGetClockInfo(handle, 1) * 10**6,
        memory_hz=lambda: pynvml.nvmlDeviceGetClockInfo(handle, 2) * 10**6,
        power_limit_w=lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        throttle_reasons=lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    )


def processes(handle: Any) -> dict[str, Any]:
    """Numbers of the processes that compute on the GPU, as the host counts them."""
    return asked(
        pids=lambda: sorted(
            process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        )
    )


def main(period_s: float, path: Path, uuids: list[str]) -> None:
    """Sample until standard input closes."""
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
    due_s = time.perf_counter()
    count = 0
    with path.open("w") as file:
        while True:
            rows = [reading(handle) | {"gpu": number} for number, handle in enumerate(handles)]
            for row, handle in zip(rows, handles, strict=True):
                if count % SLOW_EVERY == 0:
                    row |= state(handle)
                if count % PROCESSES_EVERY == 0:
                    row |= processes(handle)
                file.write(json.dumps(row) + "\n")
            file.flush()
            count += 1
            failed = any("error" in row for row in rows)
            due_s = max(
                due_s + (max(period_s, BACK_OFF_S) if failed else period_s),
                time.perf_counter() - period_s,
            )
            wait_s = max(0.0, due_s - time.perf_counter())
            if select.select([sys.stdin], [], [], wait_s)[0]:
                return


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
