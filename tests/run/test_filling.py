"""A report that fills while a run goes on, stacks that are added, and what is said beforehand."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.files import ParamsError
from lib.run import console, interim, profiles
from tests.run.test_loop import RECORD, Bench, make_notebook, needs_linux


def test_each_job_but_the_last_is_followed_by_a_report_of_what_is_there(tmp_path):
    bench, seen = Bench(tmp_path), []
    bench.write(first="ok", second="raise", third="ok")

    def after_job(out: Path) -> None:
        seen.append(sorted(path.parent.name for path in out.rglob("run.json")))

    assert bench.run(after_job=after_job, write_report=lambda out: seen.append("whole")) == 1
    assert seen == [["first"], ["first", "second"], "whole"]


def test_a_first_report_that_cannot_be_written_costs_no_measurement(tmp_path, capsys):
    bench = Bench(tmp_path)
    bench.write(first="ok", second="ok")
    assert bench.run(after_job=lambda out: 1 / 0) == 1
    assert bench.manifest("second")["status"] == "ok"
    assert "ZeroDivisionError" in capsys.readouterr().err


@needs_linux
@pytest.mark.parametrize(("done", "reports"), [("ok", 1), ("raise", 0)])
def test_an_interrupted_run_leaves_a_report_of_what_it_measured(tmp_path, done, reports):
    bench, written = Bench(tmp_path), []
    bench.write(first=done, second="wait")

    def interrupt() -> None:
        bench.wait_for_hang("second")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert bench.run(write_report=written.append) == 128 + signal.SIGINT
    thread.join()
    assert len(written) == reports


def test_the_first_report_comes_before_two_minutes_and_no_report_takes_much(monkeypatch, capsys):
    clock, written = [0.0], []
    monkeypatch.setattr(interim, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def write(out: Path) -> Path:
        written.append(clock[0])
        clock[0] += 4.0
        return out / "report.html"

    after_job = interim.Interim(write)
    for second in (8, 60, 110, 130, 170, 200, 290):
        clock[0] = float(second)
        after_job(Path("out"))
    assert written == [110, 200, 290]  # 4 s of writing may come every 80 s
    assert capsys.readouterr().err.count("report so far") == 1


def test_a_stack_is_added_where_stacks_are_compared():
    plain = profiles.profile("gpu", {"models": "tiny-qwen3"})
    more = profiles.profile("gpu", {"models": "tiny-qwen3", "also": "graph-compiled"})
    choice = more.choices[0]
    assert more.parameters("stacks", choice)["stacks_to_compare"] == ["graph", "graph-compiled"]
    assert more.parameters("batch", choice)["stacks_to_compare"][-1] == "graph-compiled"
    assert more.parameters("latency", choice) == plain.parameters("latency", plain.choices[0])


def test_an_engine_is_added_with_the_notebooks_that_measure_it():
    profile = profiles.profile("gpu", {"models": "tiny-qwen3", "also": "vllm, graph-compiled"})
    own, engine = profile.choices
    assert (own.stack, engine.stack) == ("hf-eager", "vllm")
    assert set(engine.notebooks) == {"latency", "batch", "energy"}
    assert profile.parameters("batch", engine)["stacks_to_compare"] == ["vllm"]


def test_an_unknown_stack_is_refused_with_those_that_there_are():
    with pytest.raises(ParamsError, match="graph-compilde.*ALSO=<name>"):
        profiles.profile("gpu", {"models": "tiny-qwen3", "also": "graph-compilde"})


def test_what_takes_minutes_of_its_own_is_said_beforehand():
    def job(stack, *compared):
        return SimpleNamespace(stack=stack, parameters={"stacks_to_compare": list(compared)})

    assert console.beforehand([job("hf-eager", "graph")]) == (
        "stacks: graph-compiled is left out, ALSO=graph-compiled adds about 2 min; "
        "vllm is left out, ALSO=vllm adds about 3 min"
    )
    assert "graph-compiled takes about 2 min of it" in console.beforehand(
        [job("hf-eager", "graph", "graph-compiled")]
    )
    assert console.beforehand([SimpleNamespace(stack="hf-eager", parameters={})]) == ""


def test_silence_is_broken_while_a_job_runs(capsys):
    tally = console.Tally([SimpleNamespace(title="long job", name="x", notebook="n")])
    tally.started_s = time.monotonic() - 120
    with tally.beating(tally.jobs[0], every_s=0.02):
        time.sleep(0.1)
    assert "[1/1] long job: running for 2 min\n" in capsys.readouterr().err


def failing(bench: Bench, name: str, error: str) -> None:
    row = (
        f"store.append(records_path, record.Record('ablation-decoding', "
        f"{{'model': model, 'decoding': 'top-p 0.5', 'context': 16}}, error={error!r}))"
    )
    head = 'model = "x"\nrecords_path = "x"\nmark = ""\nnumber = 1'
    make_notebook(bench.source(name), head, RECORD, row)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        ("ValueError: no such setting", 1, "1 of 3 arms failed:"),
        ("GateError: it computes something else", 1, "1 of 3 arms failed:"),
        ("StackError: cannot be captured", 0, "1 of 3 arms are beyond what a stack or"),
        ("OutOfMemoryError: CUDA out of memory", 0, "1 of 3 arms are beyond"),
        ("InductorError: InvalidCxxCompiler: none here", 0, "1 of 3 arms are beyond"),
    ],
)
def test_a_failed_arm_is_told_and_is_in_the_exit_code(tmp_path, capsys, error, status, says):
    """Also where its job was finished before; what a stack cannot do is a result."""
    bench = Bench(tmp_path)
    bench.write(first="ok", second="ok")
    failing(bench, "second", error)
    for _ in range(2):
        assert bench.run() == status
        err = capsys.readouterr().err
        assert says in err
        assert f"a/one random-hf-eager second: ablation-decoding of 16, top-p 0.5: {error}" in err
        assert ("FORCE=1 measures them again" in err) == bool(status)


def test_results_come_last_with_the_reports_address(tmp_path, capsys):
    bench = Bench(tmp_path)
    bench.write(first="ok")

    def write(out: Path) -> Path:
        (out / "report.html").write_text("x")
        return out / "report.html"

    assert bench.run(write_report=write, results=lambda out: "a table of results") == 0
    err = capsys.readouterr().err
    assert err.index("a table of results") < err.index("1 jobs: 1 ok")
    assert f"file://{bench.out.resolve().as_posix()}/report.html" in err
