"""When the report of a run that goes on is written: soon, then now and then, and never for long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lib.files import short
from lib.run.console import say

FIRST_S, AGAIN_S = 75.0, 45.0  # before the first report, and before each further one
REST = 20  # times as long as the last one took passes before the next


@dataclass
class Interim:
    """Called after each job with the folder of the results; `write` makes their report."""

    write: Callable[[Path], Path]
    last_s: float = field(default_factory=lambda: time.monotonic())
    took_s: float | None = None  # the last report's time; None before the first

    def __call__(self, out_dir: Path) -> None:
        start_s, first = time.monotonic(), self.took_s is None
        if start_s - self.last_s < (FIRST_S if first else max(AGAIN_S, REST * self.took_s)):
            return
        page = self.write(out_dir)
        self.last_s = time.monotonic()
        self.took_s = self.last_s - start_s
        if first:
            say(f"report so far, which fills as jobs end: {short(page)}")
