"""Killed before any file operation, a settling run loses nothing and run.json never lies.

Where no finished run was there, what the killed one had measured stays as an interrupted run's.
Each history is a folder with an old run and a new one that has just ended. A child process settles
it and is killed at its first, second, ... file operation that changes something, until one is left
undisturbed.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

from lib import files
from lib.records import cut_off, store
from lib.run import job as run_job
from tests.records.test_slices import NOTEBOOK, at, card, environment, job, row, seconds

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
READS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr")
BOTH, OLD, NEW = {128, 512}, {128}, {512}


class History:
    """A job's folder, what its runs have measured, and the run that now ends there."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.force = folder / "out" / "latency", name.startswith("FORCE")
        self.status = "failed" if name.endswith("fails") else "ok"
        self.status = "timeout" if name.endswith("not in time") else self.status
        self.status = "interrupted" if name.endswith("interrupted") else self.status
        other_gpu = name.endswith("another GPU")
        self.env = environment("B" if other_gpu else "A", host=2.0)
        old = environment(host=1.0)
        rows = [old, card(old), row(old, 128, 1.0, trace="t.jsonl.gz")]
        more = {"end": at(2), "job_sha": "old", "traces": {"t.jsonl.gz": "old"}}
        if name.startswith("after a failed one"):
            job(self.folder, [old, row(old, 2048, 9.0)], status="failed", end=at(3), job_sha="f")
            job(self.folder / store.PREVIOUS, rows, **more)
        elif not name.startswith("fresh"):
            more |= {"end": at(9)} if name.endswith("clock set back") else {}
            job(self.folder, rows, **more)
            (self.folder / "notebook.html").write_text("page")
        self.gpu = {"gpu": "B" if other_gpu else "A"}
        self.old = store.read(self.folder)

    def settle(self) -> None:
        """What the runner does when the notebook of the new run has ended."""
        run_job.recover(self.folder)
        self.old = store.read(self.folder)
        staged = run_job.begin(self.folder)
        manifest = {
            "env": self.gpu,
            "job_sha": "new",
            "start": at(4),
            "attempt": (self.old or {}).get("attempt", 0) + 1,
            "parameters": {},
        }
        cut_off.announce(staged, manifest)
        store.append(staged / "records.jsonl", self.env)
        store.append(staged / "records.jsonl", row(self.env, 512, 2.0, trace="u.jsonl.gz"))
        (staged / "u.jsonl.gz").write_text("new")
        (staged / "notebook.ipynb").write_text(NOTEBOOK)
        manifest |= {"status": self.status, "end": at(5)}
        run_job._settle(self.folder, self.old, manifest, force=self.force)

    def settle_killed_at(self, count: int, full: bool = False) -> bool:
        """Settle in another process that dies before its file operation `count`; whether it did.

        Where the disk is `full` from then on, every operation that needs room fails instead.
        """
        if (pid := os.fork()) == 0:
            left = count

            def die(event: str, arguments: tuple) -> None:
                nonlocal left
                write = event.startswith("os.") and event not in READS
                if write or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                    left -= 1
                    if full and left <= 0 and event in ("open", "os.mkdir"):
                        raise OSError(errno.ENOSPC, "No space left on device", arguments[0])
                    if left == 0 and not full:
                        os._exit(99)

            sys.addaudithook(die)
            try:
                self.settle()
            except OSError as error:
                os._exit(99 if error.errno == errno.ENOSPC else 1)
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 99)
        return status == 99

    def finished(self) -> set[int]:
        """Contexts of the rows that a finished run holds, in its place or put away."""
        contexts = set()
        for folder in (self.folder, self.folder / store.PREVIOUS):
            manifest = store.read(folder)
            if manifest and manifest["status"] == "ok":
                assert store.damage(folder, manifest) == ""
                contexts |= {context for context, _ in seconds(folder)}
                assert all(
                    (folder / r.value("trace")).is_file()
                    for r in store.load(folder / "records.jsonl")
                    if r.value("trace")
                )
        return contexts


HISTORIES = {  # what finished runs hold before and after
    "fresh": (set(), NEW),
    "fresh, and it fails": (set(), set()),
    "slice over slice": (OLD, BOTH),
    "slice over slice, another GPU": (OLD, BOTH),
    "after a failed one": (OLD, BOTH),
    "after a failed one, and it fails": (OLD, OLD),
    "a finished one, and it fails": (OLD, OLD),
    "a finished one, not in time": (OLD, OLD),
    "a finished one, and it is interrupted": (OLD, OLD),
    "slice over slice, the clock set back": (OLD, BOTH),
    "FORCE": (OLD, NEW),
    "FORCE, the clock set back": (OLD, NEW),
    "FORCE, and it fails": (OLD, OLD),
}


# Nothing finished was there, so that rows of a run that was cut off stay in its place.
CUT = ("fresh", "fresh, and it fails", "after a failed one", "after a failed one, and it fails")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


SOME = ("fresh", "slice over slice", "FORCE, and it fails")


@pytest.mark.parametrize(
    ("name", "exchanges", "full"),
    [(name, True, False) for name in HISTORIES]
    + [(name, False, False) for name in SOME]
    + [(name, True, True) for name in SOME],
)
def test_killed_before_every_file_operation(name, exchanges, full, tmp_path, monkeypatch):
    """Also on a system that cannot exchange two folders in one step, and on a disk that is full
    from there on."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # against a power cut, and slow
    if not exchanges:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: None)
    before, after = HISTORIES[name]
    undisturbed = History(tmp_path / "undisturbed", name)
    start = tree(undisturbed.folder)
    undisturbed.settle()
    assert undisturbed.finished() == after
    end, count, cut = tree(undisturbed.folder), 0, 0
    while True:
        count += 1
        history = History(tmp_path / str(count), name)
        killed = history.settle_killed_at(count, full)
        manifest = store.read(history.folder)
        if exchanges and manifest:
            assert store.damage(history.folder, manifest) == "", count
            assert history.finished() >= before or history.finished() == after, count
        run_job.recover(history.folder)
        contents = {k: v for k, v in tree(history.folder).items() if store.PARTIAL not in k}
        if contents not in (start, end):  # then what it had measured, of a run that was cut off
            manifest = store.read(history.folder)
            assert manifest["error"]["value"] == cut_off.WHY, f"neither old nor new at {count}"
            assert store.damage(history.folder, manifest) == "", count
            assert {context for context, _ in seconds(history.folder)} >= NEW | before, count
            cut += 1
        history.settle()
        assert history.finished() == after, count
        assert store.read(history.folder)["status"] == store.read(undisturbed.folder)["status"]
        left = {p.name for p in history.folder.parent.rglob("*") if p.name.startswith(".")}
        assert left <= {store.PREVIOUS}
        shutil.rmtree(tmp_path / str(count))
        if not killed:
            break
    assert count > 10
    assert bool(cut) == (name in CUT)
