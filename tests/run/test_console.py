"""What the program writes for people: never more than text, and never worth more than the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lib.__main__ import main
from lib.files import ROOT
from lib.run import console, job
from tests.samples import records as sample

CONTROL = ["\x1b[31m", "\x1b]0;owned\x07", "\r", "\x08", "\x7f", "\x9b31m", "\u202e", "\u2028"]
PLAN = ["plan", "--gpu-gb", "80", "--context", "512"]


@pytest.mark.parametrize("text", CONTROL)
def test_what_others_wrote_does_not_steer_the_terminal(text, capsys):
    console.say(f"a{text}b\tc\nd é –")
    console.show(f"a{text}b\tc\nd é –\n")
    out, err = capsys.readouterr()
    assert out == err and text not in out
    assert out.startswith("a\\") and out.endswith("b\tc\nd é –\n")


def test_names_of_a_received_set_are_text_on_the_terminal(tmp_path, capsys):
    name, env_id = f"m{CONTROL[1]}", sample.environment_record(sample.CPU).env_id
    for side in ("a", "b"):
        rows = sample.latency(name, env_id, (64,))
        sample.write_job(tmp_path / side, "m/x/latency", rows, sample.CPU, model=name)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "m\\x1b]0;owned\\x07" in out and not {"\x1b", "\x07"} & {*out, *err}


class Broken:
    """A stream whose reader has gone, or whose disk is full."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    flush = write


@pytest.mark.parametrize("stream", [Broken(), None])
def test_a_line_that_nobody_reads_ends_no_run(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    console.say("a line")


def shell(command: str, **environ: str) -> subprocess.CompletedProcess:
    words = " ".join(["-m lib", *PLAN])
    return subprocess.run(
        ["bash", "-c", command.format(plan=f'"{sys.executable}" {words}')],
        cwd=ROOT,
        # Buffered, as output is unless a machine's environment says otherwise.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", **environ},
        capture_output=True,
        text=True,
    )


def test_a_reader_that_has_enough_is_no_error():
    done = shell("{plan} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")  # noqa: PTH110
def test_an_answer_that_cannot_be_written_is_one_line():
    done = shell("{plan} > /dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: what is being written: No space left on device; make room"
    )


def test_without_an_output_nothing_is_written():
    done = shell("{plan} >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_letters_that_a_terminal_lacks_cost_no_answer(encoding):
    code = "import sys; from lib.run import console; console.show('– é \\ud800 中\\n')"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True)
    assert done.returncode == 0 and done.stdout.decode(encoding).endswith("\\ud800 \\u4e2d\n")


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a program
    try:
        with job.Stop().installed():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
