"""What is on disk is what was measured, and what is said about it is true.

The kernel is a fake that writes a row at once; profile, plan, loop and report are the real ones.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nbformat
import pytest

from lib import files
from lib.records import jobs, record, store
from lib.report import document
from lib.run import job as run_job
from lib.run import kernel, lease, loop, plan
from tests.run.test_loop import Bench


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A bench with one notebook; each run of the fake kernel counts one up."""
    bench = Bench(tmp_path)
    bench.write(first="ok")
    bench.runs = 0

    def execute(source, output, values, **_):
        bench.runs += 1
        nbformat.write(nbformat.v4.new_notebook(), output)
        env = record.environment_record({"gpu": None, "run": bench.runs})
        store.append(output.with_name("records.jsonl"), env)
        row = record.Record("probe", {"model": "m"}, {"e2e_s": [1.0]}, env_id=env.env_id)
        store.append(output.with_name("records.jsonl"), row)
        return kernel.Outcome("ok")

    monkeypatch.setattr(kernel, "execute", execute)
    return bench


def report_of(bench: Bench) -> str:
    return document.write(bench.out, bench.folder / "rebuilt").read_text()


DAMAGE = {
    "records emptied": ("records.jsonl", lambda data: b""),
    "records truncated": ("records.jsonl", lambda data: data[: len(data) // 2]),
    "a number of the records changed": ("records.jsonl", lambda data: data.replace(b"1.0", b"9.0")),
    "records not UTF-8": ("records.jsonl", lambda data: b"\xff" + data),
    "records deleted": ("records.jsonl", None),
    "notebook broken": ("notebook.ipynb", lambda data: data[:20]),
    "notebook emptied": ("notebook.ipynb", lambda data: b""),
    "notebook deleted": ("notebook.ipynb", None),
    "run.json half": ("run.json", lambda data: data[: len(data) // 2]),
    "run.json a list": ("run.json", lambda data: b"[]"),
    "run.json null": ("run.json", lambda data: b"null"),
    "run.json a word": ("run.json", lambda data: b'{"status": "ok"}'),
    "run.json without sense": (
        "run.json",
        lambda data: data.replace(b'"artefacts": [', b'"artefacts": [7, '),
    ),
    "run.json with a bad end": ("run.json", lambda data: data.replace(b'"end": "20', b'"end": "x')),
    "run.json nested deeply": ("run.json", lambda data: b"[" * 100_000),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_results_are_told_and_measured_again(case, bench, capsys):
    assert bench.run() == 0
    name, change = DAMAGE[case]
    path = bench.job("first") / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    (job,) = jobs.find(bench.out)
    assert job.status == "damaged" and name in job.error
    assert not [row for row in job.records if row.samples.get("e2e_s") == [9.0]]
    capsys.readouterr()
    assert bench.run() == 0
    assert bench.runs == 2
    err = capsys.readouterr().err
    assert "skipped" not in err and f"{name} " in err and "started again" in err
    assert store.fault(bench.job("first")) == ""
    assert bench.run() == 0 and bench.runs == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"jobs": 7}', '{"jobs": ["../x"]}', "null"])
def test_a_damaged_plan_is_one_line_for_a_reader_and_written_anew_by_a_run(content, bench, capsys):
    assert bench.run() == 0
    (bench.out / "plan.json").write_text(content)
    with pytest.raises(files.ParamsError, match=r"plan\.json is damaged .*delete it") as error:
        report_of(bench)
    assert "\n" not in str(error.value)
    capsys.readouterr()
    assert bench.run() == 0
    assert "plan.json is damaged" in capsys.readouterr().err
    assert json.loads((bench.out / "plan.json").read_text())["jobs"] == [
        "a--one/random-hf-eager/first"
    ]


def checkpoint(folder: Path, text: str = "12345") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(text)
    return folder


def another_lock(bench, monkeypatch, model):
    lock = bench.folder / "requirements.lock"
    lock.write_text("numpy==1")
    monkeypatch.setattr(plan, "ROOT", bench.folder)


def another_version(bench, monkeypatch, model):
    version = plan.metadata.version
    monkeypatch.setattr(
        plan.metadata, "version", lambda name: "9.9.9" if name == "transformers" else version(name)
    )


def other_threads(bench, monkeypatch, model):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")


def replaced_weights(bench, monkeypatch, model):
    checkpoint(model, "12346")  # of the same size


CHANGES = [
    (another_lock, "another requirements.lock than today's"),
    (another_version, "transformers [0-9.]+, not 9.9.9 as here"),
    (other_threads, "3 threads, not 7 as now"),
    (replaced_weights, "other weights than those that its model's files hold now"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_what_a_result_depends_on_makes_it_stale(change, says, bench, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    model = checkpoint(bench.folder / "model")
    bench.write(models=[str(model)], first="ok")

    def run(**more) -> int:
        profile = bench.profile(weights="checkpoint")
        return loop.run(profile, bench.out, check=lambda *_: None, **more)

    assert run() == 0 and "measured with" not in capsys.readouterr().err
    change(bench, monkeypatch, model)
    assert run() == 0 and bench.runs == 1
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "measured with" in line]
    assert re.search(says, line)
    text = report_of(bench)
    assert "Stale: measured with" in text and "FORCE=1" in text
    assert run(force=True) == 0 and bench.runs == 2
    assert "Stale: measured with" not in report_of(bench)
    assert run() == 0 and "measured with" not in capsys.readouterr().err


def test_a_large_file_of_weights_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "WHOLE", 100)
    monkeypatch.setattr(plan, "BLOCK", 8)
    monkeypatch.setattr(plan, "BLOCKS", 16)
    data = bytearray(os.urandom(1000))

    def sha() -> str:
        (tmp_path / "w").write_bytes(data)
        plan._content_sha.cache_clear()
        return plan._content_sha(tmp_path / "w", 1000, 0)

    first = sha()
    assert sha() == first
    for place in (0, 999):
        data[place] ^= 1
        assert sha() != first
        data[place] ^= 1


def variables(command: str) -> dict[str, str]:
    words = shlex.split(command)
    assert words[:2] == ["make", "report"]
    return dict(word.split("=", 1) for word in words[2:])


def test_run_it_again_names_profile_folder_and_force(bench, monkeypatch):
    """A failed job needs no FORCE, a finished one does; the folder is named where it is another."""
    monkeypatch.setattr(jobs, "has_profile", lambda name: name == "tiny")
    assert bench.run() == 0
    job = jobs.find(bench.out)[0]
    values = variables(job.rerun)
    assert values == {
        "PROFILE": "tiny",
        "MODELS": "a/one",
        "NOTEBOOKS": "first",
        "WEIGHTS": "random",
        "STACK": "hf-eager",
        "OUT": str(bench.out),
        "FORCE": "1",
    }
    manifest = store.read(job.folder) | {"status": "failed"}
    files.write_json(job.folder / "run.json", manifest)
    assert "FORCE" not in variables(jobs.find(bench.out)[0].rerun)
    assert "OUT" not in variables(jobs.find(bench.out, "outputs/tiny")[0].rerun)
    (job.folder / "run.json").unlink()  # a job that never ran
    missing = jobs.find(bench.out)[0]
    assert missing.status == "missing"
    assert variables(missing.rerun) == {k: v for k, v in values.items() if k != "FORCE"}


def test_run_it_again_names_no_profile_that_is_gone(bench):
    """Results outlive the profile that they were measured with."""
    assert bench.run() == 0
    job = replace(
        jobs.find(bench.out)[0], command={"PROFILE": "of-last-year", "NOTEBOOKS": "first"}
    )
    assert variables(job.rerun)["PROFILE"] == "paper"


def test_a_full_disk_is_said_before_any_work(bench, monkeypatch):
    usage = files.shutil.disk_usage(bench.folder)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=3_000_000))
    with pytest.raises(files.ParamsError, match="3 MB are free there and 50 are needed; make room"):
        bench.run()
    assert bench.runs == 0


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_is_said_before_any_work(bench, monkeypatch, number):
    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    says = f"OUT=.*out cannot be written: {os.strerror(number)}; choose another"
    with pytest.raises(files.ParamsError, match=says):
        bench.run()
    assert bench.runs == 0


def test_a_finished_set_that_cannot_be_written_needs_nothing(bench, monkeypatch, capsys):
    assert bench.run() == 0
    monkeypatch.setattr(Path, "touch", lambda *_: pytest.fail("it was written to"))
    before = {p: p.stat().st_mtime_ns for p in bench.out.rglob("*")}
    assert bench.run() == 0
    assert {p: p.stat().st_mtime_ns for p in bench.out.rglob("*")} == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_during_a_run_is_one_line(number, monkeypatch, capsys, tmp_path):
    from lib import __main__ as command

    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "outputs/x/run.json")

    monkeypatch.setattr(loop, "run", fail)
    assert command.main(["report", "--out", str(tmp_path / "x")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and os.strerror(number) in err and "outputs/x/run.json" in err


def test_a_gpu_whose_driver_fails_is_one_line(monkeypatch):
    import pynvml

    class Broken(pynvml.NVMLError):
        def __str__(self):
            return "GPU is lost"

    def lost(*_):
        raise Broken(15)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lost)
    with pytest.raises(lease.BusyError, match=r"answers with an error \(GPU is lost\); see"):
        lease.gpus()


@pytest.mark.parametrize(
    ("moves_s", "jump_s"), [(0, None), (3, None), (3600, 3600), (-86_400, -86_400)]
)
def test_a_clock_that_moves_during_a_run_is_said(bench, monkeypatch, capsys, moves_s, jump_s):
    """The run starts at noon and takes no time of its own."""
    noon = datetime(2026, 1, 2, 12, tzinfo=UTC)
    times = iter([noon, noon + timedelta(seconds=moves_s)])
    monkeypatch.setattr(run_job, "_now", lambda: next(times).isoformat(timespec="milliseconds"))
    assert bench.run() == 0
    assert bench.manifest("first").get("clock_jump_s") == jump_s
    assert (f"moved by {moves_s:+,} s" in capsys.readouterr().err) == (jump_s is not None)


def test_a_run_of_no_attempt_is_followed_by_the_first(bench):
    assert bench.run() == 0
    path = bench.job("first") / "run.json"
    path.write_text(json.dumps(bench.manifest("first") | {"attempt": None}))
    assert bench.run(force=True) == 0
    assert bench.manifest("first")["attempt"] == 1
