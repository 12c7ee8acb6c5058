"""Why a kernel died is told by its exit status and its last words; nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from lib.files import ROOT
from lib.records import jobs
from lib.run import kernel, preflight, processes
from tests.run import test_loop
from tests.run.test_loop import Bench, needs_linux

DEATHS = {
    "segfault": ("import ctypes\nctypes.string_at(0)", "segmentation fault: .*SIGSEGV"),
    "abort": ("import os\nos.abort()", "aborted: .*SIGABRT"),
    "assertion": (
        "import os\nos.write(2, b'RuntimeError: CUDA error: device-side assert triggered\\n')\n"
        "os.abort()",
        "SIGABRT.*; its last words: RuntimeError: CUDA error: device-side assert triggered",
    ),
    "leaves": ("import os\nos._exit(0)", "ended by itself with status 0"),
    "leaves-3": ("import os\nos._exit(3)", "ended by itself with status 3"),
    "killed": (test_loop.ENDINGS["kill"], "killed from outside .SIGKILL."),
    "asked": ("import os, signal\nsignal.signal(15, signal.SIG_DFL)\nos.kill(os.getpid(), 15)",
              "asked to end by another process .SIGTERM."),
}  # fmt: skip


@needs_linux
def test_each_death_names_its_cause(tmp_path, monkeypatch, capsys):
    """On the console, in run.json and in the report's list of failures."""
    monkeypatch.setattr(test_loop, "ENDINGS", {name: code for name, (code, _) in DEATHS.items()})
    bench = Bench(tmp_path)
    bench.write(**{name.replace("-", "_"): name for name in DEATHS})
    assert bench.run() == 1
    err = capsys.readouterr().err
    for name, (_, cause) in DEATHS.items():
        error = bench.manifest(name.replace("-", "_"))["error"]
        assert bench.manifest(name.replace("-", "_"))["status"] == "dead-kernel"
        assert re.search(cause, error["value"]), (name, error)
        assert error["value"] in err
    found = {job.notebook: job.error for job in jobs.find(bench.out)}
    assert "last words: RuntimeError: CUDA error: device-side" in found["assertion"]
    assert "in string_at" in found["segfault"]  # where it was
    assert bench.left() == []


@pytest.mark.parametrize(("kills", "says"), [(1, "memory ran out"), (0, "killed from outside")])
def test_memory_is_blamed_only_where_the_system_says_so(kills, says, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    process.wait()
    monkeypatch.setattr(kernel, "_oom_kills", lambda: 5 + kills)
    assert says in kernel._death(kernel.Watch(process=process, oom_kills=5))


# A preflight that starts a child without its environment, and waits.
WAITS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]], env={},
                 start_new_session=True)
time.sleep(600)
"""


@needs_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_preflight_leaves_no_process(number, tmp_path):
    mark = f"preflight-{os.getpid()}-{number}"
    (tmp_path / "waits.py").write_text(WAITS)
    code = textwrap.dedent(f"""
        import os, subprocess, sys
        from lib.run import job, preflight
        real = subprocess.run
        def run(command, **options):
            return real([sys.executable, {str(tmp_path / "waits.py")!r}, {mark!r}], **options)
        subprocess.run = run
        with job.Stop().installed():
            preflight.check_apart([{{"model": "x"}}], dict(os.environ))
    """)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    runner = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True
    )

    def alive() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or ())]

    deadline = time.monotonic() + 60
    while len(alive()) < 2:
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.1)
    time.sleep(1.0)  # until the guard listens
    runner.send_signal(number)
    _, err = runner.communicate(timeout=30)
    assert "Traceback" not in err
    gone = time.monotonic() + 15
    while alive() and time.monotonic() < gone:
        time.sleep(0.1)
    left = alive()
    processes.reap(left)
    assert left == []


def test_a_preflight_that_dies_is_one_line(monkeypatch):
    code = "import os; os.kill(os.getpid(), 9)"
    real = subprocess.run
    monkeypatch.setattr(
        preflight.subprocess, "run", lambda _, **more: real([sys.executable, "-c", code], **more)
    )
    with pytest.raises(preflight.PreflightError, match="SIGKILL; where memory runs out"):
        preflight.check_apart([{"model": "x"}], dict(os.environ))
