"""The host's description: processor, single-thread speed, installed versions."""

from __future__ import annotations

import contextlib
import platform
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path


def version(package: str) -> str | None:
    """Installed version without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as the system prints it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def host_score_per_s(rounds: int = 5) -> float:
    """Single-thread speed of the host: million iterations per second of a fixed Python loop.

    `generate()` on a fast GPU is often limited by exactly this; best of `rounds`.
    """
    best_s = float("inf")
    for _ in range(rounds):
        start_s = time.perf_counter()
        total = 0
        for i in range(200_000):
            total += i & 7
        best_s = min(best_s, time.perf_counter() - start_s)
    return 0.2 / best_s


def today() -> str:
    """The date in UTC, as 2026-11-24."""
    return datetime.now(UTC).date().isoformat()
