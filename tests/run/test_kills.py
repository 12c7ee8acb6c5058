"""Whole runs killed at random times: a plain re-run gives what an undisturbed run gives.

KILLS= is how many; `make kill-tests` runs 50. SEED= repeats a series.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from lib.records import store
from tests.run.test_loop import RECORD, Bench, make_notebook, needs_linux

pytestmark = needs_linux
KILLS = int(os.environ.get("KILLS", "8"))
SEED = int(os.environ.get("SEED", "0"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def bench_in(folder: Path) -> Bench:
    """Two notebooks that write a row each, one of them a second one after a while."""
    folder.mkdir()
    bench = Bench(folder)
    bench.write(first="ok", second="ok")
    head = 'model = "x"\nrecords_path = "x"\nmark = ""\nnumber = 1'
    later = RECORD.replace("'latency'", "'itl'")
    make_notebook(bench.source("second"), head, RECORD, "time.sleep(0.5)", later)
    return bench


def outcome(bench: Bench) -> dict[str, tuple]:
    """What a folder of results says: of each job status, rows, and whether its files are whole."""
    jobs = {}
    for path in store.manifests(bench.out):
        folder, manifest = path.parent, store.read(path.parent)
        file = folder / "records.jsonl"
        rows = [(row.kind, row.key) for row in store.load(file)] if file.exists() else []
        name = folder.relative_to(bench.out).as_posix()
        jobs[name] = manifest["status"], rows, store.damage(folder, manifest)
    return jobs


def alive(bench: Bench) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if bench.mark in (p.info["cmdline"] or ())]


def end(runner: subprocess.Popen, what: str, number: int) -> None:
    """The signal to the runner, or to its kernel and what that is forked from."""
    if runner.poll() is not None:  # it ended by itself just before
        return
    victims = [psutil.Process(runner.pid)]
    with contextlib.suppress(psutil.Error):
        if what == "kernel":
            every = victims[0].children(recursive=True)
            victims = [p for p in every if {"ipykernel_launcher", "lib.run.warm"} & {*p.cmdline()}]
        for process in victims:
            process.send_signal(number)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict, float]:
    bench = bench_in(tmp_path_factory.mktemp("kills") / "undisturbed")
    began = time.monotonic()
    runner = bench.start(bench.mark)
    runner.communicate(timeout=120)
    assert runner.returncode == 0
    return outcome(bench), time.monotonic() - began


@pytest.mark.parametrize("trial", range(KILLS))
def test_a_run_killed_at_a_random_time_and_run_again(trial, undisturbed, tmp_path):
    expected, seconds = undisturbed
    draw = random.Random(f"{SEED} {trial}")
    bench = bench_in(tmp_path / "b")
    runner = bench.start(bench.mark)
    with contextlib.suppress(subprocess.TimeoutExpired):
        runner.wait(draw.uniform(0.1, 1.1) * seconds)
    what = "kernel" if draw.random() < 0.25 else "runner"
    end(runner, what, signal.SIGKILL if what == "kernel" else draw.choice(SIGNALS))
    _, err = runner.communicate(timeout=60)
    assert "Traceback" not in err
    for status, _, damage in outcome(bench).values():
        assert damage == "" and status in store.STATUSES
    again = bench.start(bench.mark)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert outcome(bench) == expected
    hidden = {path.name for path in bench.out.rglob(".*")}
    assert hidden <= {store.PREVIOUS}
    assert alive(bench) == []
