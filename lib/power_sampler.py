"""Reads a GPU's energy counter and power at a fixed period, as a process of its own.

Run as a script by `device.CudaDevice.power_trace`; stops when its standard input closes. Each
line: t_s (CLOCK_MONOTONIC, the middle of the call), energy_j, power_w (mean of the last second on
Ampere and later), instant_w, or `error` where a reading failed.
"""

from __future__ import annotations

import json
import select
import sys
import time
from pathlib import Path
from typing import Any

import pynvml

INSTANT_FIELD = 186  # NVML_FI_DEV_POWER_INSTANT, mW


def reading(handle: Any) -> dict[str, float | str]:
    """One reading of all fields; a failed one says which error."""
    before_s = time.perf_counter()
    try:
        energy_j = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        after_s = time.perf_counter()
        power_w = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
        field = pynvml.nvmlDeviceGetFieldValues(handle, [(INSTANT_FIELD, 0)])[0]
    except pynvml.NVMLError as error:
        return {"t_s": before_s, "error": str(error)}
    row = {"t_s": (before_s + after_s) / 2, "energy_j": energy_j, "power_w": power_w}
    if field.nvmlReturn == 0:
        row["instant_w"] = field.value.uiVal / 1000
    return row


def main(uuid: str, period_s: float, path: Path) -> None:
    """Sample until standard input closes."""
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    due_s = time.perf_counter()
    with path.open("w") as file:
        while True:
            file.write(json.dumps(reading(handle)) + "\n")
            file.flush()
            due_s += period_s
            wait_s = max(0.0, due_s - time.perf_counter())
            if select.select([sys.stdin], [], [], wait_s)[0]:
                return


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
