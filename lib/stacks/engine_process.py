"""A process that answers requests, in a group of its own that ends whatever happens.

What the other side runs is `vllm_engine.serve` under `vllm_engine.guard`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STOP_LIMIT_S = 20.0
LOG_LINES = 15
RECORD = "VLLM_RECORD"  # names a file that gets every request with its answer, for tests


class EngineError(RuntimeError):
    """An engine that cannot start, died, hangs, or did something else than it was asked."""


class Process:
    """A process that answers requests: one JSON object a line in, by a pipe of its own out.

    It and all that it starts end with this object, with `close`, and with this process.
    """

    def __init__(self, command: Sequence[str], log: str | Path, env: Mapping[str, str]) -> None:
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        answers, theirs = os.pipe()
        lifeline, self.lifeline = os.pipe()
        with self.log.open("ab") as out:
            self.popen = subprocess.Popen(
                [*command, str(theirs), str(lifeline)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=(theirs, lifeline),
                start_new_session=True,
            )
        os.close(theirs)
        os.close(lifeline)
        self.answers, self.rest = answers, b""
        self.record = os.environ.get(RECORD)
        self._end = weakref.finalize(self, _end, self.popen, (answers, self.lifeline))

    @property
    def ended(self) -> bool:
        """Whether it was ended from here."""
        return not self._end.alive

    def ask(
        self,
        op: str,
        limit_s: float,
        on_token: Callable[[], None] | None = None,
        *,
        needs: Sequence[str] = (),
        **arguments: Any,
    ) -> dict[str, Any]:
        """The answer to a request; raises, and ends the process, where there is none in time, or
        one that lacks what it `needs`."""
        if not self._end.alive:
            raise EngineError(f"the engine was ended before {op!r}: start another one")
        line = json.dumps({"op": op, **arguments}).encode() + b"\n"
        try:
            self.popen.stdin.write(line)
            self.popen.stdin.flush()
        except OSError:
            pass  # it has died; what it last said is read below
        deadline = time.monotonic() + limit_s
        while True:
            answer = self._line(op, deadline, limit_s)
            if "token" in answer:
                if on_token:
                    on_token()
                continue
            if "ended" in answer:
                self._fail(f"the engine ended during {op!r} ({_how(answer['ended'])})")
            if answer.get("op") != op:
                self._fail(f"the engine answered {str(answer)[:200]} when asked {op!r}")
            if "error" in answer:
                self._fail(f"the engine refused {op!r}: {answer['error']}")
            if lacking := [name for name in needs if name not in answer]:
                self._fail(f"the engine's answer to {op!r} lacks {', '.join(lacking)}")
            if self.record:
                with Path(self.record).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"ask": json.loads(line), "answer": answer}) + "\n")
            return answer

    def _line(self, op: str, deadline: float, limit_s: float) -> dict[str, Any]:
        while b"\n" not in self.rest:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self._fail(f"no answer to {op!r} within {limit_s:g} s")
            if select.select([self.answers], [], [], min(left_s, 1.0))[0]:
                data = os.read(self.answers, 2**20)
                if not data:
                    self._fail(f"the engine closed its pipe during {op!r}")
                self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._fail(f"the engine answered {op!r} with {line[:200]!r}, which is no JSON object")
        return answer

    def _fail(self, what: str) -> None:
        self.close(kindly=False)
        raise EngineError(f"{what}; the end of {self.log.name}:\n{tail(self.log)}")

    def close(self, *, kindly: bool = True) -> None:
        """End the process and its whole group; `kindly` lets it finish by itself first."""
        if self._end.alive and kindly:
            with contextlib.suppress(OSError):
                self.popen.stdin.write(b'{"op": "stop"}\n')
                self.popen.stdin.flush()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_LIMIT_S)
        self._end()


def _end(popen: subprocess.Popen, pipes: Iterable[int]) -> None:
    """Close our ends, on which the guard kills its group, and see to it that it does."""
    for pipe in pipes:
        with contextlib.suppress(OSError):
            os.close(pipe)
    with contextlib.suppress(OSError):
        popen.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(STOP_LIMIT_S)
    with contextlib.suppress(OSError):  # no such group is left: as it should be
        os.killpg(popen.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(STOP_LIMIT_S)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def tail(path: Path, lines: int = LOG_LINES) -> str:
    """The last lines of a log, after the last errors above them: a core that dies takes others with
    it, and the cause is what was said first."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"(no log: {error})"
    raised = [re.search(r"\w*(?:Error|Exception): .*", line) for line in text[:-lines]]
    causes = dict.fromkeys(found.group() for found in raised if found)
    return "\n".join([*list(causes)[-3:], *text[-lines:]]) or "(empty)"
