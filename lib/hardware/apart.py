"""The boards of an engine that computes in another process; CUDA stays closed in this one."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lib.files import ROOT
from lib.hardware import board, memory_in_use, profiler
from lib.hardware.device import Board, CpuDevice, Device


class OneBoard(Board):
    """One of the boards of a `BoardDevice`."""

    def __init__(self, uuid: str, name: str) -> None:
        self._open(uuid, name)

    def process_count(self) -> int | None:
        """Compute processes on this board, whosever they are."""
        return memory_in_use.process_count(self._nvml, self._handle) if self._nvml else None


class BoardDevice(Device):
    """The boards of one GPU or of several as NVML tells of them, for what computes in another
    process.

    CUDA is not opened here, so that this process holds nothing of the GPUs' memory; `environment`
    is what a process read that has ended, and `gpus` are the boards that it saw (uuid, gpu and
    gpu_total_bytes of each). Bytes, joules and watts are sums over the boards; `boards` tell of
    each. `own_processes` is how many processes of the engine there are on each board.
    """

    kind = "cuda"
    torch_device = "cpu"
    memory_source = "NVML"

    def __init__(
        self, environment: dict[str, Any], gpus: Sequence[dict[str, Any]] = (), devices: int = 1
    ) -> None:
        self._environment = environment
        gpus = list(gpus) or [{"uuid": environment["gpu_uuid"], "gpu": str(environment.get("gpu"))}]
        _require_alike(gpus, devices)
        self.boards = [OneBoard(one["uuid"], one["gpu"]) for one in gpus[:devices]]
        self.uuid, self.own_processes = self.boards[0].uuid, [1] * devices
        self.missing = {name: why for one in self.boards for name, why in one.missing.items()}
        self.missing["busy"] = "the engine computes in another process, which is not profiled"
        if devices > 1:
            self._environment = environment | self._of_all(gpus[:devices])

    def _of_all(self, gpus: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What an environment says of several boards: their kind as one, and each of them."""
        states = [one.board_state() for one in self.boards]
        told = ("driver", "vbios", "power_limit_w", "nvml_index")
        return {
            "gpu": f"{len(gpus)} x {gpus[0]['gpu']}",
            "devices": len(gpus),
            "gpu_total_bytes": sum(one["gpu_total_bytes"] for one in gpus),
            "copy_bytes_per_s": len(gpus) * self._environment["copy_bytes_per_s"],
            "boards": [
                one | {name: state.get(name) for name in told}
                for one, state in zip(gpus, states, strict=True)
            ],
            "link": board.link(*((one._nvml, one._handle) for one in self.boards)),
        }

    def _sum(self, name: str) -> Any:
        """A reading of all boards added up; None where one of them has none."""
        readings = [getattr(one, name)() for one in self.boards]
        for one in self.boards:
            self.missing |= one.missing
        return None if None in readings else sum(readings)

    def environment(self) -> dict[str, Any]:
        """What the numbers depend on, as it was read before the engine took the GPU."""
        return dict(self._environment)

    def copy_bytes_per_s(self, size: int = 2**28, rounds: int = 8) -> float:
        """Memory bandwidth of a large copy on the first board before the engine took it, times the
        boards."""
        return self._environment["copy_bytes_per_s"]

    def synchronize(self) -> None:
        """Nothing is queued from here."""

    def empty_cache(self) -> None:
        """Drop what Python no longer refers to."""
        gc.collect()

    def busy(self, call: Callable[[], Any]) -> profiler.Work | None:
        """Another process is not profiled, so that `call` is not run."""
        return None

    def gpus_of(self, net: Any) -> list[str]:
        """The GPUs that the engine is given."""
        return [one.uuid for one in self.boards]

    def gpu_used_bytes(self) -> int | None:
        """What NVML says is in use, without what the driver sets aside."""
        return self._sum("gpu_used_bytes")

    def free_bytes(self) -> int | None:
        """Memory that nothing uses now."""
        used = self.gpu_used_bytes()
        return None if used is None else self._environment["gpu_total_bytes"] - used

    def energy_j(self) -> float | None:
        """The boards' energy counters (J since the driver was loaded)."""
        return self._sum("energy_j")

    def power_w(self) -> float | None:
        """nvidia-smi's power.draw."""
        return self._sum("power_w")

    def board_state(self) -> dict[str, Any]:
        """Driver, limits and temperature of the first board; empty without NVML."""
        return self.boards[0].board_state()

    def clocks_state(self) -> dict[str, Any]:
        """Temperatures and clocks of the first board; empty without NVML."""
        return self.boards[0].clocks_state()

    def power_trace(
        self, period_s: float = board.PERIOD_S, uuids: Sequence[str] = ()
    ) -> AbstractContextManager[list[dict[str, Any]]]:
        """Readings of these GPUs (all that the engine is given if none are named)."""
        return self.boards[0].power_trace(period_s, uuids or self.gpus_of(None))

    def process_bytes(self) -> int | None:
        """This process uses nothing."""
        return 0


def _require_alike(gpus: Sequence[dict[str, Any]], devices: int) -> None:
    if len(gpus) < devices:
        names = ", ".join(one["gpu"] for one in gpus) or "no GPU"
        raise RuntimeError(
            f"devices: {devices} were asked for, and CUDA sees {len(gpus)} ({names}); use "
            f"DEVICES={max(1, len(gpus))}"
        )
    if len(kinds := {one["gpu"] for one in gpus[:devices]}) > 1:
        raise RuntimeError(
            f"devices: {devices} are of different kinds ({', '.join(sorted(kinds))}), and all "
            "would wait for the slowest; name equal ones with CUDA_VISIBLE_DEVICES"
        )


def open_apart(name: str = "auto", devices: int = 1) -> CpuDevice | BoardDevice:
    """The device for an engine in another process: its boards alone, with CUDA left closed here.

    What the environment holds of CUDA is read by a process of its own, which ends. Raises
    RuntimeError where there are not so many GPUs of one kind.
    """
    if name == "cpu":
        return _on_cpu(devices)
    code = (
        "import json, sys; from lib.hardware.device import open_device; "
        "one = open_device(sys.argv[1]); "
        "json.dump([one.environment(), getattr(one, 'visible', list)()], sys.stdout)"
    )
    command = [sys.executable, "-c", code, name]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if told.returncode:
        raise RuntimeError(told.stderr.strip().rpartition("\n")[2] or f"no device {name!r} opened")
    environment, gpus = json.loads(told.stdout)
    if environment["device"] != "cuda":
        return _on_cpu(devices)
    if str(environment["gpu_uuid"]).startswith("MIG-"):
        gpus = []  # a slice is named by its own number
    return BoardDevice(environment, gpus, devices)


def _on_cpu(devices: int) -> CpuDevice:
    if devices > 1:
        raise RuntimeError(f"devices: {devices} are GPUs, and this is a CPU; use DEVICES=1")
    return CpuDevice()
