"""Process housekeeping: nothing that a notebook started stays behind, however its runner ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator

import psutil

from lib.files import BATCH_VARIABLE, ROOT

_PR_SET_CHILD_SUBREAPER = 36


@contextlib.contextmanager
def guard(mark: str) -> Iterator[None]:
    """While this block runs another process waits; if this one is killed, it kills the `marked`."""
    guardian = subprocess.Popen(
        [sys.executable, "-m", "lib.run.processes", mark],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with guardian:
        try:
            yield
        finally:
            guardian.kill()


def marked(mark: str) -> set[psutil.Process]:
    """Processes whose environment has `mark` in BATCH_VARIABLE, as far as this user may look, and
    those below them, whatever their environment."""
    family = set()
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(BATCH_VARIABLE) == mark:
            with contextlib.suppress(psutil.Error):
                family |= {process, *process.children(recursive=True)}
    return family


@contextlib.contextmanager
def adopt_orphans() -> Iterator[None]:
    """Orphans of the kernel become children of this process, so that they can be found (Linux)."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        if libc is not None:
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)


def descendants(root: int) -> list[psutil.Process]:
    """Processes below the one with this id."""
    return psutil.Process(root).children(recursive=True)


def reap(leftovers: Collection[psutil.Process]) -> None:
    """Kill what the notebook left behind, and collect it."""
    for process in leftovers:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(leftovers, timeout=5)


def kill_group(pid: int) -> None:
    """Kill a process, and its group where it leads one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg") and os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))


if __name__ == "__main__":
    sys.stdin.read()  # ends with the process that holds the other end
    reap(marked(sys.argv[1]))
