"""Runs a command in a process group of its own and ends that group whatever happens.

`python guard.py log-file grace-seconds command ...`, started with a pipe as its input: when the
pipe closes, which also happens when the parent is killed, or on SIGTERM, the group gets SIGTERM and
after the grace SIGKILL. A server's workers outlive a killed server otherwise, and hold its memory.
Standard library only, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL_S = 0.05


def alive(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end(process: subprocess.Popen, grace_s: float) -> None:
    """SIGTERM to the group, SIGKILL after the grace, until nothing of it is left."""
    deadline = time.monotonic() + grace_s
    for number, until in ((signal.SIGTERM, deadline), (signal.SIGKILL, deadline + 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        while alive(process.pid) and time.monotonic() < until:
            process.poll()  # collects the leader, which would count as alive
            time.sleep(POLL_S)


def main(argv: list[str]) -> int:
    """The command's exit status, or 0 where it was ended on request."""
    log, grace_s, command = Path(argv[0]), float(argv[1]), argv[2:]
    stops = []
    signal.signal(signal.SIGTERM, lambda *_: stops.append(True))
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        while process.poll() is None and not stops:
            readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
            if readable and not os.read(sys.stdin.fileno(), 4096):
                stops.append(True)
    finally:
        end(process, grace_s)
    return 0 if stops else process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
