"""Memory in use around a block of work, read from torch's allocator, NVML and the driver.

`device` hands over the seams (torch.cuda, NVML's module and handle); nothing is opened here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

# Whose word is taken for what the process uses, the most exact first.
SOURCES = {
    "process_bytes": "NVML, this process",
    "gpu_used_bytes": "NVML, whole GPU",
    "driver_used_bytes": "CUDA driver, whole GPU",
}
_NVML_MEMORY_V2 = 0x02000028


@contextlib.contextmanager
def watch_cuda(
    cuda: Any, synchronize: Callable[[], None], in_use: Callable[[], dict[str, int | None]]
) -> Iterator[dict[str, Any]]:
    """The allocator's readings around the block, and what others say is in use at its edges.

    `cuda` is torch.cuda; `in_use` reads the names of SOURCES and `gpu_processes`. The peak is
    taken from a fresh start. After the block the allocator keeps its segments, so that what is in
    use then is what it reserved and what it does not know: the CUDA context.
    """
    synchronize()
    before, stats = in_use(), cuda.memory_stats()
    usage: dict[str, Any] = {
        "baseline_bytes": cuda.memory_allocated(),
        "reserved_baseline_bytes": cuda.memory_reserved(),
        "requested_baseline_bytes": stats.get("requested_bytes.all.current"),
    }
    retries = stats.get("num_alloc_retries", 0)
    cuda.reset_peak_memory_stats()
    yield usage
    synchronize()
    after, stats = in_use(), cuda.memory_stats()
    usage |= {
        "peak_bytes": cuda.max_memory_allocated(),
        "held_bytes": cuda.memory_allocated(),
        "reserved_bytes": cuda.memory_reserved(),
        "reserved_peak_bytes": cuda.max_memory_reserved(),
        "requested_peak_bytes": stats.get("requested_bytes.all.peak"),
        "inactive_split_bytes": stats.get("inactive_split_bytes.all.current"),
        "alloc_retries": stats.get("num_alloc_retries", 0) - retries,
        **after,
        **figure(before, after, usage["reserved_baseline_bytes"]),
    }
    usage["slack_bytes"] = usage["reserved_bytes"] - usage["peak_bytes"]


def figure(
    before: dict[str, int | None], after: dict[str, int | None], reserved_bytes: int
) -> dict[str, Any]:
    """What is in use at both edges by the best source that has both, and the context before.

    The context is what was in use and not reserved by the allocator at the start. A figure of the
    whole GPU stands for this process only where NVML lists no second one.
    """
    shared = max(before.get("gpu_processes") or 0, after.get("gpu_processes") or 0) > 1
    for name, source in SOURCES.items():
        if before.get(name) is None or after.get(name) is None:
            continue
        if shared and name != "process_bytes":
            continue
        return {
            "used_source": source,
            "used_baseline_bytes": before[name],
            "used_bytes": after[name],
            "context_bytes": before[name] - reserved_bytes,
        }
    return {"used_bytes": None}


def process_bytes(nvml: Any, handle: Any) -> tuple[int | None, str]:
    """Bytes that NVML lists for this process on this GPU, or None and why."""
    try:
        listed = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except Exception as error:  # NVML raises its own classes, one per return code
        return None, f"NVML lists no processes: {error}"
    mine = [p for p in listed if p.pid == os.getpid()]
    if not mine:
        return None, (
            f"none of the {len(listed)} processes that NVML lists on this GPU has this "
            "process's id, as in a container or a virtual machine"
        )
    if mine[0].usedGpuMemory is None:
        return None, "NVML lists this process without its memory"
    return mine[0].usedGpuMemory, ""


def process_count(nvml: Any, handle: Any) -> int | None:
    """Compute processes that NVML lists on this GPU, or None where it lists none at all."""
    try:
        return len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except Exception:  # as above; `process_bytes` tells the reason
        return None


def gpu_used_bytes(nvml: Any, handle: Any) -> tuple[int | None, str]:
    """Bytes in use on the whole GPU by NVML's second version, or None and why.

    The second version leaves out what driver and firmware set aside, which the first one adds to
    what is in use; that part belongs to no process.
    """
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=_NVML_MEMORY_V2).used, ""
    except Exception as error:  # NVML raises its own classes, one per return code
        return None, f"NVML tells no memory in use: {error}"


@contextlib.contextmanager
def count_cuda(cuda: Any) -> Iterator[Callable[[], tuple[int, int]]]:
    """A function that tells the bytes allocated now and the most since it was last asked.

    The allocator counts when an operation is queued, so that no synchronisation is needed.
    """

    def step() -> tuple[int, int]:
        now_and_most = cuda.memory_allocated(), cuda.max_memory_allocated()
        cuda.reset_peak_memory_stats()
        return now_and_most

    step()
    yield step


@contextlib.contextmanager
def watch_cpu(resident_bytes: int) -> Iterator[dict[str, Any]]:
    """Bytes in tensors while the block runs, from every allocation that torch's profiler saw.

    `resident_bytes` are the tensors that live already (the weights): the baseline.
    """
    from torch.profiler import ProfilerActivity, profile

    # Its remarks on starting and stopping would stand in every notebook.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    usage: dict[str, Any] = {"reserved_bytes": None, "used_bytes": None}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        yield usage
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sizes = list(itertools.accumulate((e.nbytes() for e in events), initial=resident_bytes))
    usage |= {"baseline_bytes": resident_bytes, "peak_bytes": max(sizes), "held_bytes": sizes[-1]}


@contextlib.contextmanager
def count_cpu() -> Iterator[Callable[[], tuple[int, int]]]:
    """As `count_cuda`, for tensors that come to life in the block, by watching the operations."""
    from lib.hardware.live_tensors import Live

    with Live() as live:
        yield live.step
