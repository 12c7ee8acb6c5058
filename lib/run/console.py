"""What the runner says while it works: one line per start and end, and a summary."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category

from lib.files import short

if TYPE_CHECKING:
    from lib.records.record import Record
    from lib.run.eta import Forecast
    from lib.run.plan import Task

MINUTES = {"graph-compiled": 2, "vllm": 3}  # with the calls of the profile gpu
# Errors of arms that a stack, the memory or this machine does not allow, which is a result.
LIMITS = ("StackError", "ModelError", "OutOfMemoryError", "InvalidCxxCompiler", "TritonMissing")
ARM = ("stack", "experts", "dtype", "context", "new_tokens", "batch", "decoding")
SHOWN = 10  # arms that failed; the report has all
BEAT_S = 60.0  # the longest silence while a job runs
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # kinds of characters: controls, directions, ends of lines
GOES_ON = "interrupted: finished jobs are kept, the same command goes on from here"


@dataclass
class Tally:
    """The jobs of a run: how each ended, and about how much time is left."""

    jobs: list[Task]
    ended: list[tuple[Task, str, str]] = field(default_factory=list)
    spent_s: dict[str, list[float]] = field(default_factory=dict)
    stale: dict[str, list[Task]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    started_s: float = 0.0
    forecast: Forecast | None = None
    skips: Collection[str] = ()  # names of jobs that were finished before
    arms: int = 0
    failed_arms: list[str] = field(default_factory=list)
    barred_arms: list[str] = field(default_factory=list)

    @property
    def all_good(self) -> bool:
        """Every job is finished, no arm failed, and every page could be written."""
        whole = len(self._bad()) == 0 and len(self.ended) == len(self.jobs)
        return whole and not self.broken and not self.failed_arms

    @property
    def measured(self) -> bool:
        """Whether a job of this run has ended well."""
        return self._count("ok") > 0

    def left_s(self, running_s: float = 0.0) -> float | None:
        """Seconds until the end, where the next job has been running for so long: as foreseen from
        the machine's speed, or else from the mean of ended jobs of the same notebook; None where
        nothing has ended."""
        waiting = [job for job in self.jobs[len(self.ended) :] if job.name not in self.skips]
        if self.forecast and (left_s := self.forecast.left_s(waiting, running_s)) is not None:
            return left_s
        every = [s for times in self.spent_s.values() for s in times]
        if not every:
            return None
        times = [self.spent_s.get(job.notebook, every) for job in waiting]
        return sum(sum(t) / len(t) for t in times) - running_s

    def skip(self, job: Task, stale: list[str]) -> None:
        """A job that was finished before; `stale`: measured with what, if not today's."""
        say(f"{self._place()} {job.title}: finished before, skipped")
        self.ended.append((job, "skipped", ""))
        for why in stale:
            self.stale.setdefault(why, []).append(job)

    def start(self, job: Task, fault: str) -> None:
        """A job that begins now; `fault` is what is wrong with the results that it had."""
        left_s = self.left_s()
        about = f", about {span(left_s)} left in all" if left_s is not None else ""
        again = f"{fault}; " if fault else ""
        say(f"{self._place()} {job.title}: {again}started{' again' if fault else ''}{about}")
        self.started_s = time.monotonic()

    def end(self, job: Task, manifest: dict[str, Any]) -> None:
        """A job that has ended, well or not."""
        spent_s = time.monotonic() - self.started_s
        status, why = manifest["status"], reason(manifest["error"])
        say(f"{self._place()} {job.title}: {status} after {span(spent_s)}{why and ': ' + why}")
        self.ended.append((job, status, why))
        self.spent_s.setdefault(job.notebook, []).append(spent_s)
        if self.forecast and status == "ok":
            self.forecast.ended(job, spent_s)

    @contextlib.contextmanager
    def beating(self, job: Task, every_s: float = BEAT_S) -> Iterator[None]:
        """While the block runs, a line now and then: for how long it has, and what is left."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(every_s):
                spent_s = time.monotonic() - self.started_s
                left_s = self.left_s(spent_s) or 0.0
                about = f", about {span(left_s)} left in all" if left_s > 0 else ""
                say(f"{self._place()} {job.title}: running for {span(spent_s)}{about}")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def count(self, job: Task, rows: Iterable[Record]) -> None:
        """The arms of a job; those with an error are told at the end."""
        for row in rows:
            self.arms += row.kind not in ("environment", "card")
            if row.error:
                arm = ", ".join(str(x) for name in ARM if (x := row.key.get(name)) is not None)
                barred = any(name in row.error for name in LIMITS)
                texts = self.barred_arms if barred else self.failed_arms
                texts.append(f"{job.title}: {row.kind} of {arm}: {row.error}")

    def ran(self, job: Task, manifest: dict[str, Any]) -> None:
        """A job that another process has just run, and has told of."""
        self.ended.append((job, manifest["status"], reason(manifest["error"])))

    def fail(self, text: str) -> None:
        """Something beside the jobs went wrong, such as a page."""
        self.broken.append(text)
        say(f"error: {text}")

    def summary(self, page: Path | None, *, interrupted: bool = False, results: str = "") -> None:
        """Results, counts, what failed and where to look, and the report where one was written."""
        if results:
            say(f"\n{results}")
        bad, total = self._bad(), len(self.jobs)
        counts = {
            "ok": self._count("ok"),
            "skipped": self._count("skipped"),
            "failed": len(bad),
            "not run": total - len(self.ended),
        }
        parts = (f"{n} {name}" for name, n in counts.items() if n or name == "ok")
        say(f"\n{total} jobs: {', '.join(parts)}")
        for job, status, why in bad:
            say(f"  {status}: {job.title}: {why}\n    see {short(job.folder / 'notebook.ipynb')}")
        for text in self.broken:
            say(f"  error: {text}")
        self._summary_of_arms()
        for why, jobs in self.stale.items():
            more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
            say(f"warning: measured with {why}: {jobs[0].title}{more}; FORCE=1 measures again")
        if interrupted:
            say(GOES_ON)
        if page:
            say(f"report: {short(page)}\n        {page.resolve().as_uri()}")

    def _summary_of_arms(self) -> None:
        for texts, what in (
            (self.failed_arms, "failed"),
            (self.barred_arms, "are beyond what a stack or the memory allows"),
        ):
            if texts:
                say(f"{len(texts)} of {self.arms} arms {what}:")
            for text in texts[:SHOWN]:
                say(f"  {text}")
            if len(texts) > SHOWN:
                say(f"  and {len(texts) - SHOWN} more; the report lists all")
        if self.failed_arms:
            say("FORCE=1 measures them again")

    def _place(self) -> str:
        return f"[{len(self.ended) + 1}/{len(self.jobs)}]"

    def _count(self, status: str) -> int:
        return sum(s == status for _, s, _ in self.ended)

    def _bad(self) -> list[tuple[Task, str, str]]:
        return [entry for entry in self.ended if entry[1] not in ("ok", "skipped")]


def beforehand(jobs: Sequence[Task]) -> str:
    """What stacks that take minutes of their own cost, of those that run and those that could; in
    numbers of 8 billion parameters on an H100."""
    compared = [stack for job in jobs for stack in job.parameters.get("stacks_to_compare", ())]
    if not compared:
        return ""
    stacks = {*compared, *(job.stack for job in jobs)}
    parts = [
        f"{stack} takes about {minutes} min of it"
        if stack in stacks
        else f"{stack} is left out, ALSO={stack} adds about {minutes} min"
        for stack, minutes in MINUTES.items()
    ]
    return f"stacks: {'; '.join(parts)}"


def reason(error: dict[str, Any] | None) -> str:
    """An error of run.json in one line."""
    if not error:
        return ""
    cell = f" in cell [{error['cell']}]" if error.get("cell") else ""
    first = (str(error["value"]).strip().splitlines() or [""])[0]
    return f"{error['name']}{cell}: {first}"


def span(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def say(text: str) -> None:
    """A line on stderr; one that cannot be written is lost, and nothing else."""
    if sys.stderr:
        with contextlib.suppress(OSError):
            sys.stderr.write(plain(text) + "\n")
            sys.stderr.flush()


def show(text: str) -> None:
    """An answer on stdout; ends the program where its reader has had enough, as `| head` has.

    Raises OSError where it cannot be written. What is left of it goes nowhere in either case: its
    end would be tried again as the program ends, which then has a status of its own.
    """
    if not sys.stdout:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(plain(text).encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise


def plain(text: str) -> str:
    """A text that cannot steer a terminal: what is not seen is written as an escape."""
    return "".join(
        c.encode("unicode_escape").decode() if c not in "\n\t" and category(c) in UNSEEN else c
        for c in text
    )
