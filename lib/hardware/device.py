"""The one seam to the hardware: clock, synchronisation, allocator, NVML, environment.

Everything that measures receives a device and asks it; nothing else touches torch.cuda or NVML
(the runner's `lease` lists GPUs by NVML before any kernel exists).
Tests pass a fake with the same methods. What a device cannot read is None, and `missing` says why.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lib.hardware import board, memory_in_use, profiler
from lib.hardware.host import cpu_name, host_score_per_s, today, version

PACKAGES = ("torch", "transformers", "numpy", "nvidia-ml-py")


class Device:
    """What all kinds of device share: a monotonic clock and the host's description.

    `own_processes` is how many processes of each board are measured: this one where nothing says
    more.
    """

    kind = ""
    torch_device = ""
    memory_source = ""
    own_processes: Sequence[int] = (1,)

    def clock_s(self) -> float:
        """Monotonic seconds (CLOCK_MONOTONIC on Linux, the same for all processes)."""
        return time.perf_counter()

    def sleep_s(self, seconds: float) -> None:
        """Wait, with the device left alone."""
        time.sleep(seconds)

    def clocks_state(self) -> dict[str, Any]:
        """Temperatures, clocks, and for how long what has held the board back; empty where nothing
        tells."""
        return {}

    def environment(self) -> dict[str, Any]:
        """What the numbers depend on: card, driver, versions, host and how fast that host is."""
        return {
            **self.card(),
            "date": today(),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            **{"cpu": cpu_name(), "cpu_count": os.cpu_count()},
            "host_score_per_s": host_score_per_s(),
            "copy_bytes_per_s": self.copy_bytes_per_s(),
            "packages": {name: version(name) for name in PACKAGES},
        }

    def copy_bytes_per_s(self, size: int = 2**28, rounds: int = 8) -> float:
        """Memory bandwidth of a large copy on this device, bytes read plus bytes written a second.

        The best of `rounds`: a ceiling, not a typical value.
        """
        import torch

        source = torch.ones(size, dtype=torch.uint8, device=self.torch_device)
        target = torch.empty_like(source)
        copy = functools.partial(target.copy_, source)
        seconds = min(time_call(copy, self)[0] for _ in range(rounds))
        del source, target, copy
        self.empty_cache()
        return 2 * size / seconds


class CpuDevice(Device):
    """A CPU: times are real, memory is what torch allocates, energy has no counter."""

    kind = "cpu"
    torch_device = "cpu"
    memory_source = "torch CPU allocator"
    missing = {
        "energy": "no NVML energy counter: the device is a CPU",
        "busy": "the device is a CPU: host and device are one",
        "used_bytes": "no NVML figure: the device is a CPU",
    }

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def empty_cache(self) -> None:
        """Drop what Python no longer refers to."""
        gc.collect()

    def watch_memory(self, resident_bytes: int) -> AbstractContextManager[dict[str, Any]]:
        """Bytes in tensors around the block; `resident_bytes` live already (the weights)."""
        return memory_in_use.watch_cpu(resident_bytes)

    def count_memory(self) -> AbstractContextManager[Callable[[], tuple[int, int]]]:
        """A function for use in the block: bytes that came to life, now and at most since asked."""
        return memory_in_use.count_cpu()

    def process_bytes(self) -> int | None:
        return None

    def gpu_used_bytes(self) -> int | None:
        return None

    def busy(self, call: Callable[[], Any]) -> profiler.Work | None:
        """Nothing works beside the host, so that `call` is not run."""
        return None

    def free_bytes(self) -> int | None:
        """Memory that a model may take: what the host says is available."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))

    def energy_j(self) -> float | None:
        return None

    def power_w(self) -> float | None:
        return None

    def gpus_of(self, net: Any) -> list[str]:
        """No GPU holds a part of the model."""
        return []

    def board_state(self) -> dict[str, Any]:
        """No board tells of itself."""
        return {}

    @contextlib.contextmanager
    def power_trace(
        self, period_s: float = board.PERIOD_S, uuids: Sequence[str] = ()
    ) -> Iterator[list[dict[str, Any]]]:
        """No readings on a CPU."""
        yield []

    def card(self) -> dict[str, Any]:
        return {
            "device": "cpu",
            "gpu": None,
            "gpu_total_bytes": None,
            "driver": None,
            "cuda": None,
            "power_limit_w": None,
            "launch_s": None,
        }


class Board:
    """What NVML tells of one GPU, found by its UUID; without NVML, `missing` says why."""

    def _open(self, uuid: str, name: str) -> None:
        self.uuid, self.missing = uuid, {}
        self._nvml = self._handle = None
        if uuid.startswith("MIG-"):
            self.missing["energy"] = (
                f"{name} is a MIG slice: power and energy are those of the whole board, of which "
                "others may use their parts"
            )
            return
        try:
            self._nvml, self._handle = board.open_board(uuid)
        except Exception as error:  # NVML raises its own classes, one per return code
            self.missing["energy"] = f"no NVML power readings of this GPU: {error}"

    def gpu_used_bytes(self) -> int | None:
        """What NVML says is in use on the whole GPU, without what the driver sets aside."""
        return self._from_nvml("gpu_used_bytes", memory_in_use.gpu_used_bytes)

    def _from_nvml(self, name: str, query: Callable[..., tuple[int | None, str]]) -> int | None:
        value, reason = (None, "no NVML") if self._nvml is None else query(self._nvml, self._handle)
        if value is None:
            self.missing[name] = reason
        return value

    def energy_j(self) -> float | None:
        """The board's energy counter (J since the driver was loaded); ticks about every 100 ms."""
        if "energy" in self.missing:
            return None
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        except self._nvml.NVMLError:  # a virtual GPU may tell its power and not count energy
            return None

    def power_w(self) -> float | None:
        """nvidia-smi's power.draw: on Ampere and later the mean of the last second."""
        if "energy" in self.missing:
            return None
        return self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000

    def board_state(self) -> dict[str, Any]:
        """Driver, VBIOS, persistence, limits and temperature now; empty without NVML."""
        return {} if "energy" in self.missing else board.state(self._nvml, self._handle)

    def clocks_state(self) -> dict[str, Any]:
        """Temperatures, clocks, and for how long what has held the board back; empty without
        NVML."""
        if "energy" in self.missing:
            return {}
        from lib.hardware import power_sampler  # needs NVML

        return power_sampler.state(self._handle)

    @contextlib.contextmanager
    def power_trace(
        self, period_s: float = board.PERIOD_S, uuids: Sequence[str] = ()
    ) -> Iterator[list[dict[str, Any]]]:
        """Readings of these GPUs (this one if none are named) taken by another process while the
        block runs; `board.sample` and `power_sampler` say more. Empty without NVML."""
        if "energy" in self.missing:
            yield []
            return
        with board.sample(uuids or [self.uuid], period_s) as trace:
            yield trace


class CudaDevice(Board, Device):
    """One NVIDIA GPU, the current CUDA device, found in NVML by its UUID."""

    kind = "cuda"
    torch_device = "cuda"
    memory_source = "cuda allocator"

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        kind = "MIG" if " MIG " in self._properties.name else "GPU"
        self._open(f"{kind}-{self._properties.uuid}", self._properties.name)

    def synchronize(self) -> None:
        """Wait until the GPU has done all that was queued."""
        self._cuda.synchronize()

    def empty_cache(self) -> None:
        """Drop what Python no longer refers to and give the allocator's slack back."""
        gc.collect()
        self._cuda.empty_cache()

    def watch_memory(self, resident_bytes: int) -> AbstractContextManager[dict[str, Any]]:
        """The allocator's readings around the block, and what NVML says at its edges.

        `resident_bytes` is not needed: the allocator knows what lives already.
        """
        return memory_in_use.watch_cuda(self._cuda, self.synchronize, self._in_use)

    def count_memory(self) -> AbstractContextManager[Callable[[], tuple[int, int]]]:
        """A function for use in the block: bytes allocated now and at most since it was asked."""
        return memory_in_use.count_cuda(self._cuda)

    def process_bytes(self) -> int | None:
        """What NVML says that this process uses, the CUDA context included."""
        return self._from_nvml("process_bytes", memory_in_use.process_bytes)

    def _in_use(self) -> dict[str, int | None]:
        free, total = self._cuda.mem_get_info()
        count = memory_in_use.process_count(self._nvml, self._handle) if self._nvml else None
        if (count or 0) > 1:
            self.missing["used_bytes"] = f"{count} processes share this GPU, and none is told apart"
        return {
            "process_bytes": self.process_bytes(),
            "gpu_used_bytes": self.gpu_used_bytes(),
            "driver_used_bytes": total - free,
            "gpu_processes": count,
        }

    def busy(self, call: Callable[[], Any]) -> profiler.Work | None:
        """Seconds in which the GPU worked on this call, and its kernels.

        The profiler slows the host, not the kernels. None, with the reason in `missing`, where it
        sees no kernel.
        """
        work = profiler.gpu_work(call, self)
        if work.kernels:
            return work
        self.missing["busy"] = "torch's profiler saw no kernel: is CUPTI usable on this machine?"
        return None

    def free_bytes(self) -> int | None:
        """Memory that a model may take: free on the card now."""
        return self._cuda.mem_get_info()[0]

    def gpus_of(self, net: Any) -> list[str]:
        """UUIDs of the GPUs that hold parts of a model, in the order in which CUDA counts them."""
        places = {p.device.index for p in net.parameters() if p.device.type == "cuda"}
        return [f"GPU-{self._cuda.get_device_properties(n).uuid}" for n in sorted(places)]

    def card(self) -> dict[str, Any]:
        import torch

        values = {
            "device": "cuda",
            "gpu": self._properties.name,
            "gpu_uuid": self.uuid,
            "gpu_total_bytes": self._properties.total_memory,
            "cache_bytes": self._properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": None,
            "power_limit_w": None,
            "launch_s": self.launch_s(),
        }
        if len(gpus := self.visible()) > 1:
            values["boards"] = gpus
        if "energy" not in self.missing:
            nvml, handle = self._nvml, self._handle
            values |= {
                "driver": nvml.nvmlSystemGetDriverVersion(),
                "power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
                "sm_clock_max_hz": nvml.nvmlDeviceGetMaxClockInfo(handle, 1) * 10**6,
                "memory_clock_max_hz": nvml.nvmlDeviceGetMaxClockInfo(handle, 2) * 10**6,
            }
        return values

    def visible(self) -> list[dict[str, Any]]:
        """Number, kind and bytes of every GPU that CUDA sees, in its order."""
        places = (self._cuda.get_device_properties(n) for n in range(self._cuda.device_count()))
        return [
            {"uuid": f"GPU-{one.uuid}", "gpu": one.name, "gpu_total_bytes": one.total_memory}
            for one in places
        ]

    def launch_s(self, count: int = 2000) -> float:
        """Host seconds to queue and finish one tiny kernel, the mean of a chain of them."""
        import torch

        x = torch.zeros(1, device="cuda")
        for _ in range(100):
            x.add_(1)
        self.synchronize()
        start_s = self.clock_s()
        for _ in range(count):
            x.add_(1)
        self.synchronize()
        return (self.clock_s() - start_s) / count


def open_device(name: str = "auto") -> CpuDevice | CudaDevice:
    """The device to measure on: "cuda", "cpu", or "auto" for the GPU where there is one."""
    if name not in ("auto", "cuda", "cpu"):
        raise ValueError(f'unknown device {name!r}; use "auto", "cuda" or "cpu"')
    if name == "cpu":
        return CpuDevice()
    import torch

    if torch.cuda.is_available():
        return CudaDevice()
    if name == "cuda":
        raise RuntimeError(
            'device "cuda" was asked for, but torch sees no GPU; use device "cpu", or check '
            "the driver with nvidia-smi and that this torch build has CUDA"
        )
    return CpuDevice()


def time_call(call: Callable[[], Any], device: Any) -> tuple[float, Any]:
    """Wall seconds of one call, the device idle at both edges, and what the call returned."""
    device.synchronize()
    start_s = device.clock_s()
    result = call()
    device.synchronize()
    return device.clock_s() - start_s, result
