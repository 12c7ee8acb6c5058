"""The GPU board as NVML tells of it: power readings through a process of their own, and its state.

`hardware.device` opens it; nothing else does. Reading needs no special rights, and nothing is set.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SAMPLER = Path(__file__).with_name("power_sampler.py")
PERIOD_S = 0.023  # no divisor of the 100 ms refresh, so that readings sweep over its phase
START_LIMIT_S = 10.0


def open_board(uuid: str) -> tuple[Any, Any]:
    """NVML and the handle of a board whose power can be read; raises, with the reason, if not.

    A UUID and no index: CUDA and NVML count the boards in different orders, and
    CUDA_VISIBLE_DEVICES changes only CUDA's.
    """
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    with contextlib.suppress(pynvml.NVMLError):  # boards that cannot be split do not know the call
        if pynvml.nvmlDeviceGetMigMode(handle)[0]:
            raise RuntimeError("the board is split (MIG is on), its readings are of all parts")
    pynvml.nvmlDeviceGetPowerUsage(handle)
    return pynvml, handle


@contextlib.contextmanager
def sample(uuids: Sequence[str], period_s: float = PERIOD_S) -> Iterator[list[dict[str, Any]]]:
    """Readings of these boards while the block runs; the list fills when it ends.

    Another process, not a thread: a thread would contend with the measured code for the
    interpreter lock. A session of its own, so that an interrupt of the notebook does not reach it;
    it stops when its input closes, which also happens when this process dies. If it dies itself,
    the readings up to then are there.
    """
    trace: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        command = [sys.executable, str(SAMPLER), str(period_s), str(path), *uuids]
        sampler = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            wait_for_first(path, sampler)
            yield trace
        finally:
            sampler.communicate()  # closing its input tells the sampler to stop
        trace.extend(rows(path.read_text()))


def rows(text: str) -> Iterator[dict[str, Any]]:
    """The readings in a file whose last line may have been cut off."""
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def wait_for_first(path: Path, sampler: subprocess.Popen) -> None:
    """Until there is a reading; raises if there is none, and ends a sampler that hangs."""
    deadline = time.monotonic() + START_LIMIT_S
    while not (path.exists() and path.stat().st_size):
        if sampler.poll() is None and time.monotonic() > deadline:
            sampler.kill()
            sampler.wait()
        if sampler.poll() is not None:
            raise RuntimeError(f"the power sampler gave no reading (exit {sampler.poll()})")
        time.sleep(0.01)


def link(*boards: tuple[Any, Any]) -> str | None:
    """How the first of some boards (NVML and handle of each) reaches the others; None where the
    driver does not tell."""
    (nvml, first), *others = boards
    try:
        answers = [
            nvml.nvmlDeviceGetP2PStatus(first, handle, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
            for _, handle in others
        ]
    except Exception:  # NVML's own classes, and boards that were not opened
        return None
    return "NVLink" if {*answers} == {nvml.NVML_P2P_STATUS_OK} else "no NVLink"


def state(nvml: Any, handle: Any) -> dict[str, Any]:
    """What a board's readings depend on; None where the driver does not tell."""
    questions: dict[str, Callable[[], Any]] = {
        "nvml_index": lambda: nvml.nvmlDeviceGetIndex(handle),
        "driver": nvml.nvmlSystemGetDriverVersion,
        "vbios": lambda: nvml.nvmlDeviceGetVbiosVersion(handle),
        "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(handle)),
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "power_limit_max_w": lambda: (
            nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)[1] / 1000
        ),
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, 0),
    }
    answers: dict[str, Any] = dict.fromkeys(questions)
    for name, question in questions.items():
        with contextlib.suppress(nvml.NVMLError):
            answers[name] = question()
    return answers
