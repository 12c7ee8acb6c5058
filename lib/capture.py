"""Recording work of the GPU as one CUDA graph, which the host replays with a single launch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

WARMUP_CALLS = 2  # libraries choose kernels and allocate workspaces before the recording


def record(work: Callable[[], Any], device_type: str) -> Callable[[], Any]:
    """A function that repeats `work` on the same buffers; on a CPU `work` itself.

    `work` runs a few times first, so that its buffers have moved on when this returns. It may not
    wait for the GPU: recording such work raises.
    """
    if device_type != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP_CALLS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    torch.cuda.synchronize()
    return graph.replay


def mark(device_type: str) -> Any:
    """A point in the order of the device's work, for `between_s`."""
    if device_type != "cuda":
        return time.perf_counter()  # a CPU has done all work that was asked for
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_s(first: Any, last: Any) -> float:
    """Seconds from one mark to another by the device's own clock; ask after a synchronisation."""
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3
