"""What torch's profiler saw of a call on the GPU: the time in which it worked, and on what."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Work(NamedTuple):
    """Of one call: seconds in which the GPU was busy, launches of kernels, and for each kernel,
    copy or fill how often it ran and for how long (s)."""

    busy_s: float
    kernels: int
    by_name: dict[str, tuple[int, float]]


def gpu_work(call: Callable[[], Any], device: Any) -> Work:
    """What the GPU did during one call.

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


def counted(events: Iterable[Any]) -> Work:
    """The work among a profiler's events: kernels, copies and fills.

    Events of the host (launches, synchronisation) and named ranges, which span idle time as well,
    are left out.
    """
    spans, kernels, by_name = [], 0, {}
    for event in events:
        if event.device_type().name != "CUDA" or event.is_user_annotation():
            continue
        kernels += not event.name().startswith(("Memcpy", "Memset"))
        spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
        name = short_name(event.name())
        times, seconds = by_name.get(name, (0, 0.0))
        by_name[name] = (times + 1, seconds + event.duration_ns() / 1e9)
    return Work(union_ns(spans) / 1e9, kernels, by_name)


def short_name(kernel: str) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    space = "(anonymous namespace)"
    text = kernel.removeprefix("void ").replace(space, "\0")
    return text.split("<")[0].split("(")[0].replace("\0", space).strip() or kernel


def union_ns(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of (start, end) intervals: what overlaps counts once."""
    total, reached = 0, None
    for start, end in sorted(spans):
        if reached is None or start > reached:
            total, reached = total + end - start, end
        elif end > reached:
            total, reached = total + end - reached, end
    return total
