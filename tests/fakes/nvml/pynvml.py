"""NVML as a test needs it: boards under a constant load, their counters ticking every 0.1 s.

FAKE_NVML chooses what goes wrong: `unlinked` (no NVLink), `no-link` (not told), `no-counter`,
`no-power`, `split` (MIG is on), `old` (fields are not known), `flaky` (every third reading fails),
or `dies` (the sampler is killed after ten).
The library searches this folder before the installed package where a test puts it on PYTHONPATH.
"""

import os
import time
from types import SimpleNamespace

BOARDS = {"GPU-fake": 300, "GPU-other": 200}  # UUID: watts
TICK_S = 0.1
MODE = os.environ.get("FAKE_NVML", "")
calls = {"fields": 0}


class NVMLError(Exception):
    """The real one has a class per return code."""


def nvmlInit():
    pass


def nvmlDeviceGetHandleByUUID(uuid):
    if uuid not in BOARDS:
        raise NVMLError("Not Found")
    return uuid


def nvmlDeviceGetMigMode(handle):
    if MODE == "split":
        return [1, 1]
    raise NVMLError("Not Supported")


def nvmlDeviceGetTotalEnergyConsumption(handle):
    """Millijoules at the last tick of the clock that all processes share."""
    if MODE == "no-counter":
        raise NVMLError("Not Supported")
    ticks = int(time.perf_counter() / TICK_S)
    return round(ticks * TICK_S * BOARDS[handle] * 1000)


def nvmlDeviceGetPowerUsage(handle):
    if MODE == "no-power":
        raise NVMLError("Not Supported")
    return BOARDS[handle] * 1000


def _field(value, kind):
    names = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
    known = value is not None and MODE != "old"
    return SimpleNamespace(
        nvmlReturn=0 if known else 3,
        valueType=kind,
        timestamp=1_700_000_000,
        value=SimpleNamespace(**{names[kind]: value}),
    )


def nvmlDeviceGetFieldValues(handle, fields):
    calls["fields"] += 1
    if MODE == "flaky" and calls["fields"] % 3 == 0:
        raise NVMLError("Unknown Error")
    if MODE == "dies" and calls["fields"] == 10:
        os._exit(9)
    watts = BOARDS[handle]
    counter = None if MODE == "no-counter" else nvmlDeviceGetTotalEnergyConsumption(handle)
    known = {
        (83, 0): (counter, 3),
        (186, 0): (watts * 1000 + 500, 1),
        (185, 0): (watts * 1000, 1),
        (82, 0): (55, 1),
        (74, 0): (2 * 10**9, 3),
        (269, 0): (0, 3),
        (270, 0): (0, 3),
        (271, 0): (None, 3),
    }
    return [_field(*known[field]) for field in fields]


def nvmlDeviceGetTemperature(handle, sensor):
    return 48


def nvmlDeviceGetClockInfo(handle, kind):
    return {1: 1755, 2: 2619}[kind]


def nvmlDeviceGetCurrentClocksThrottleReasons(handle):
    return 4


def nvmlDeviceGetIndex(handle):
    return [*BOARDS].index(handle)


def nvmlSystemGetDriverVersion():
    return "999.1"


def nvmlDeviceGetVbiosVersion(handle):
    return "96.00"


def nvmlDeviceGetPersistenceMode(handle):
    return 1


def nvmlDeviceGetPowerManagementLimitConstraints(handle):
    raise NVMLError("Not Supported")


NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 2, 0


def nvmlDeviceGetP2PStatus(handle, other, index):
    if MODE == "no-link":
        raise NVMLError("Not Supported")
    return 5 if MODE == "unlinked" else NVML_P2P_STATUS_OK


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
