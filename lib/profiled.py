"""What torch's profiler saw of a call on the GPU: the time in which it worked, and its kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any


def gpu_work(call: Callable[[], Any], device: Any) -> tuple[float, int]:
    """Busy seconds of the GPU during one call, and the number of kernels.

    Only GPU activity is recorded. The device is idle at both edges, so that nothing of another
    call is counted; kernels of a replayed CUDA graph are recorded one by one like any other.
    """
    from torch.profiler import ProfilerActivity, profile

    # Its remarks on starting and stopping would stand in every notebook.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    device.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        call()
        device.synchronize()
    return counted(watched.profiler.kineto_results.events())


def counted(events: Iterable[Any]) -> tuple[float, int]:
    """Seconds in which at least one kernel, copy or fill ran, and the number of kernels.

    Events of the host (launches, synchronisation) and named ranges, which span idle time as well,
    are left out.
    """
    spans, kernels = [], 0
    for event in events:
        if event.device_type().name != "CUDA" or event.is_user_annotation():
            continue
        kernels += not event.name().startswith(("Memcpy", "Memset"))
        spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    return union_ns(spans) / 1e9, kernels


def union_ns(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of (start, end) intervals: what overlaps counts once."""
    total, reached = 0, None
    for start, end in sorted(spans):
        if reached is None or start > reached:
            total, reached = total + end - start, end
        elif end > reached:
            total, reached = total + end - reached, end
    return total
