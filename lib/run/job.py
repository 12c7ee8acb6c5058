"""One job: execute a notebook, put its results in place, write run.json."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import files
from lib.files import short
from lib.records import cut_off, executed, slices, store
from lib.records.store import PARTIAL, PREVIOUS
from lib.run import kernel, plan, scrub, warm
from lib.run.console import GOES_ON, say
from lib.run.parameters import check_parameters, notebook_parameters
from lib.run.plan import Task


def begin(folder: Path) -> Path:
    """An empty folder in the job's folder; what a notebook writes into it appears when it ends."""
    discard(folder)
    (folder / PARTIAL).mkdir(parents=True)
    return folder / PARTIAL


def discard(folder: Path) -> None:
    """Drop what an unfinished run has left."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def coming(folder: Path) -> Path:
    """The folder beside a job's in which its next content is put together."""
    return folder.with_name(f".{folder.name}.next")


def recover(folder: Path, out: Path | None = None) -> str:
    """Finish what a runner that died has left, or drop it: the folder holds one whole run.

    A run whose run.json was written is whole, and one that was cut off is settled as interrupted,
    so that its rows stay: a line on it is returned. What lies there else is half of one, or the run
    that has been replaced. `out` is the folder of the results. Raises ParamsError where the folder
    is a disk of its own, into which nothing can be put in one step.
    """
    if folder.is_mount():
        raise files.ParamsError(
            f"{short(folder)} is a disk of its own; results lie on one disk: unmount it"
        )
    new, old = store.read(coming(folder)), store.read(folder)
    if new and (old is None or _order(new) > _order(old)):
        folder.mkdir(parents=True, exist_ok=True)
        files.exchange(coming(folder), folder)
    shutil.rmtree(coming(folder), ignore_errors=True)
    manifest = cut_off.take_up(folder / PARTIAL)
    if manifest is None:
        return ""
    scrub.files((folder / PARTIAL).rglob("*"), scrub.names(out))
    rows, old = len(store.lines(folder / PARTIAL / "records.jsonl")), store.read(folder)
    _settle(folder, old, manifest, force=False)
    is_kept = store.read(folder) != old
    what = f"its {rows} rows are kept" if is_kept else "the finished run of before stays"
    return f"{short(folder)}: {cut_off.WHY}; {what}"


def _order(run: dict[str, Any]) -> tuple[int, str]:
    """Sorts the runs of one folder: each counts one up, whatever the clock has done since."""
    return run.get("attempt") or 0, str(run.get("end"))


def promote(
    folder: Path,
    old: dict[str, Any] | None,
    manifest: dict[str, Any],
    *,
    keep_old: bool,
    spent: bool,
) -> None:
    """Put the run that just ended in place of the `old` one by one atomic step.

    With `keep_old` the old one is kept in `.previous/`; what that held before goes then, or where
    it is `spent`. Files that are no run's stay.
    """
    new = coming(folder)
    shutil.rmtree(new, ignore_errors=True)
    cut_off.retract(folder / PARTIAL)
    (folder / PARTIAL).rename(new)
    if keep_old:
        files.write_json(new / PREVIOUS / "run.json", old)
    elif not spent and (folder / PREVIOUS).exists():
        shutil.copytree(folder / PREVIOUS, new / PREVIOUS)
    names = {item["path"] for item in (old or {}).get("artefacts") or ()} | {"notebook.html"}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if not path.is_file() or name.parts[0][0] == "." or name == Path("run.json"):
            continue
        of_old = name.as_posix() in names
        target = new / PREVIOUS / name if of_old else new / name
        if not target.exists() and (keep_old or not of_old):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    files.write_json(new / "run.json", manifest)
    files.exchange(new, folder)
    shutil.rmtree(new, ignore_errors=True)  # the old one


@dataclass
class Stop:
    """What SIGINT and SIGTERM do: end the kernel of the job in progress, then the loop."""

    watch: kernel.Watch | None = None
    signum: int = 0
    count: int = 0

    def __call__(self, signum: int, frame: object = None) -> None:
        self.signum, self.count = self.signum or signum, self.count + 1
        if self.watch is None or self.count > 2:
            say(GOES_ON)
            raise SystemExit(128 + signum)
        self.watch.stop(signal.Signals(signum).name)

    @contextlib.contextmanager
    def installed(self) -> Iterator[Stop]:
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            names.remove("SIGHUP")  # under nohup a run outlives its terminal
        old = {name: signal.signal(getattr(signal, name), self) for name in names}
        try:
            yield self
        finally:
            for name, handler in old.items():
                signal.signal(getattr(signal, name), handler)


def run_job(
    job: Task,
    *,
    sha: str,
    gpu: str = "cpu",
    env: dict[str, str],
    timeout_s: float | None = None,
    stop: Stop | None = None,
    force: bool = False,
    worker: warm.Worker | None = None,
) -> dict[str, Any]:
    """Execute one notebook and record how it ended; returns the manifest.

    Notebook and records appear in the job's folder only when the run ends. Rows of earlier runs
    that were not measured again are kept, unless `force`. A run that does not end well leaves a
    finished one of before in `.previous/`; an interrupted one leaves it as is.
    """
    signature = notebook_parameters(job.source)
    values = check_parameters(job.parameters, signature, where=f"notebook {job.notebook!r}")
    stop, old, start, start_s = stop or Stop(), store.read(job.folder), _now(), time.monotonic()
    staged = begin(job.folder)
    folders = scrub.names(job.out)
    stop.watch = kernel.Watch()
    manifest = {
        "parameters": scrub.values(values, folders),
        "job_sha": sha,
        "notebook_sha": plan.notebook_sha(job.source),
        "lib_sha": plan.lib_sha(),
        "git": plan.git_state(),
        "env": plan.environment(gpu, job),
        "attempt": ((old or {}).get("attempt") or 0) + 1,
        "start": start,
    }
    cut_off.announce(staged, manifest)
    try:
        outcome = kernel.execute(
            job.source,
            staged / "notebook.ipynb",
            values,
            env=env,
            watch=stop.watch,
            timeout_s=timeout_s,
            progress=sys.stderr.isatty(),
            worker=worker,
        )
        scrub.files(staged.rglob("*"), folders)
        executed.shrink(staged / "notebook.ipynb")
        executed.pack_logs(staged)
        manifest |= {
            "status": outcome.status,
            "error": scrub.values(outcome.error, folders),
            "end": _now(),
        }
        if jump_s := _jump_s(manifest, time.monotonic() - start_s):
            manifest["clock_jump_s"] = jump_s
            say(
                f"note: the clock of this machine moved by {jump_s:+,} s while {job.title} ran, or "
                "the machine slept; dates of this run may be wrong, times of calls are not by it"
            )
        _settle(job.folder, old, manifest, force=force)
    finally:
        stop.watch = None
    return manifest


def _settle(
    folder: Path, old: dict[str, Any] | None, manifest: dict[str, Any], *, force: bool
) -> None:
    """Add what earlier runs measured, unless `force`, then put files and manifest in place; an
    interrupted run never replaces a finished one."""
    staged = folder / PARTIAL
    added = slices.Added() if force else slices.add_earlier(staged, folder, manifest)
    manifest["earlier"] = list(added.earlier)
    manifest["artefacts"] = store.artefacts(staged)
    was_ok, is_ok = old is not None and old["status"] == "ok", manifest["status"] == "ok"
    if was_ok and manifest["status"] == "interrupted":
        discard(folder)
        return
    if added.aside:
        say(f"note: rows of before stay apart, in {short(folder / store.PREVIOUS)}: {added.aside}")
    keep_old = was_ok and (not is_ok or bool(added.aside))
    promote(folder, old, manifest, keep_old=keep_old, spent=is_ok and added.spent)


def _jump_s(run: dict[str, Any], seconds: float) -> int:
    """By how much the clock moved in a run that took so many seconds; 0 where by less than 5."""
    start, end = (datetime.fromisoformat(run[name]) for name in ("start", "end"))
    jump_s = round((end - start).total_seconds() - seconds)
    return jump_s if abs(jump_s) >= 5 else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
