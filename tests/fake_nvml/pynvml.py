"""NVML as a test needs it: one board under a constant load, its counter ticking every 0.1 s.

FAKE_NVML chooses what goes wrong: `no-counter`, or `flaky` (every third counter reading fails).
The library searches this folder before the installed package where a test puts it on PYTHONPATH.
"""

import os
import time
from types import SimpleNamespace

UUID = "GPU-fake"
POWER_W = 300
TICK_S = 0.1
MODE = os.environ.get("FAKE_NVML", "")
calls = {"counter": 0}


class NVMLError(Exception):
    """The real one has a class per return code."""


def nvmlInit():
    pass


def nvmlDeviceGetHandleByUUID(uuid):
    if uuid != UUID:
        raise NVMLError("Not Found")
    return "handle"


def nvmlDeviceGetTotalEnergyConsumption(handle):
    """Millijoules at the last tick of the clock that all processes share."""
    calls["counter"] += 1
    if MODE == "no-counter":
        raise NVMLError("Not Supported")
    if MODE == "flaky" and calls["counter"] % 3 == 0:
        raise NVMLError("Unknown Error")
    ticks = int(time.perf_counter() / TICK_S)
    return round(ticks * TICK_S * POWER_W * 1000)


def nvmlDeviceGetPowerUsage(handle):
    return POWER_W * 1000


def nvmlDeviceGetFieldValues(handle, fields):
    assert fields == [(186, 0)]
    return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=POWER_W * 1000 + 500))]


def nvmlSystemGetDriverVersion():
    return "999.1"


def nvmlDeviceGetEnforcedPowerLimit(handle):
    return 700_000


def nvmlDeviceGetMaxClockInfo(handle, kind):
    return {1: 1980, 2: 2619}[kind]


def nvmlDeviceGetComputeRunningProcesses(handle):
    """This process with 51 GB; `container` numbers it otherwise, `shared` adds a second one."""
    if MODE == "no-list":
        raise NVMLError("No Permission")
    pid = os.getpid() + (MODE in ("container", "shared"))
    listed = [SimpleNamespace(pid=pid, usedGpuMemory=None if MODE == "unsized" else 51 * 10**9)]
    return listed * (2 if MODE == "shared" else 1)


def nvmlDeviceGetMemoryInfo(handle, version=None):
    """The first version adds what the driver sets aside, which belongs to no process."""
    if MODE == "no-info":
        raise NVMLError("Not Supported")
    return SimpleNamespace(used=(52 if version == 0x02000028 else 53) * 10**9)
