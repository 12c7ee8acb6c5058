"""Several GPUs of one host: a lease for each, shared ones refused where something is compared."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest

from lib.__main__ import main
from lib.files import ROOT, ParamsError
from lib.records import record, store
from lib.run import groups, lease, plan, profiles, several
from tests.run import miniature
from tests.run.test_loop import bench as bench  # the fixture
from tests.run.test_loop import make_notebook

ONE, TWO = lease.Gpu("GPU-1", "A"), lease.Gpu("GPU-2", "A")


class NVMLError(Exception):
    pass


def nvml(*, mode=0, processes=0, used=3 * 10**6, screen=0):
    """A driver that tells this of every GPU; what is None it does not know."""

    def answer(value):
        if value is None:
            raise NVMLError("Not Supported")
        return value

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetVirtualizationMode=lambda handle: answer(mode),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [None] * answer(processes),
        nvmlDeviceGetMemoryInfo=lambda handle, version: SimpleNamespace(used=answer(used)),
        nvmlDeviceGetDisplayActive=lambda handle: answer(screen),
    )


SHARED = [  # what the driver tells, the environment, and the reason; empty: its own
    ({}, {}, ""),
    ({"mode": None, "processes": None, "used": None, "screen": None}, {}, ""),
    ({"mode": 1}, {}, ""),  # passed through to a virtual machine, whole
    ({"mode": 2}, {}, "virtual"),
    ({"mode": 3}, {}, "virtual"),
    ({"processes": 2}, {}, r"2 other process\(es\)"),
    ({"used": 600 * 10**6}, {}, "0.6 GB of its memory"),
    ({"used": 600 * 10**6, "screen": None}, {}, "0.6 GB of its memory"),
    ({"used": 600 * 10**6, "screen": 1}, {}, ""),
    ({}, {"CUDA_MPS_PIPE_DIRECTORY": "/x"}, "CUDA_MPS_PIPE_DIRECTORY is set"),
    ({}, {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50"}, "MPS"),
]


@pytest.mark.parametrize(("told", "env", "reason"), SHARED)
def test_a_gpu_that_others_may_use_is_known(told, env, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**told))
    text = lease.shared_by(ONE, env)
    assert re.search(reason, text) if reason else text == ""


def test_a_slice_is_shared_whatever_the_driver_tells():
    assert "MIG slice" in lease.shared_by(lease.Gpu("MIG-1", "A MIG 1g.10gb"), {})


def several_models(bench, *cells: str, names=("latency",), models=("a/one", "b/two")) -> None:
    """Notebooks that want a GPU and note what they saw."""
    head = 'model = "x"\nrecords_path = "x"\ndevice = "auto"'
    for name in names:
        make_notebook(bench.source(name), head, *cells)
    profile = {
        "defaults": {"device": "auto"},
        "notebooks": {name: {} for name in names},
        "models": list(models),
    }
    (bench.folder / "params" / "tiny.yaml").write_text(json.dumps(profile))


NOTE = textwrap.dedent("""
    import os, time
    from lib.measure import session
    from lib.records import record, store
    device = type("D", (), {"environment": lambda self: {"gpu": "A", "gpu_uuid": "GPU-1"}})()
    env = store.append(records_path, session.environment(device))
    row = record.Record("latency", {"model": model}, {"e2e_s": [1.0]}, env_id=env.env_id)
    store.append(records_path, row)
    open(os.environ["ORDER"], "a").write(model + "\\n")
""").strip()


@pytest.fixture
def held(monkeypatch, tmp_path):
    """One GPU, whose driver says what the test sets."""
    monkeypatch.setattr(lease, "gpus", lambda: [ONE])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("ORDER", str(tmp_path / "order"))
    return lambda **told: monkeypatch.setitem(sys.modules, "pynvml", nvml(**told))


def names_of(bench) -> list[str]:
    return [job.name for job in plan.plan(bench.profile(), bench.out)]


def test_there_and_back_are_two_visits_in_the_order_a_b_b_a(bench, held, tmp_path):
    held()
    several_models(bench, NOTE)
    back = tmp_path / "back"
    assert bench.run(only=names_of(bench), back=back) == 0
    assert (tmp_path / "order").read_text().split() == ["a/one", "b/two", "b/two", "a/one"]
    visits = {
        folder: {
            env["visit"]
            for path in folder.rglob("records.jsonl")
            for env in record.environments(store.load(path)).values()
        }
        for folder in (bench.out, back)
    }
    assert [len(ids) for ids in visits.values()] == [1, 1]
    assert visits[bench.out] != visits[back]
    # Submitted again, all is finished.
    assert bench.run(only=names_of(bench), back=back) == 0
    assert len((tmp_path / "order").read_text().split()) == 4


def test_a_shared_gpu_is_refused_for_what_is_compared_and_told_by_the_rest(
    bench, held, tmp_path, capsys
):
    held(processes=1)
    several_models(bench, NOTE)
    with pytest.raises(lease.BusyError, match=r"GPU A \(GPU-1\) is shared: 1 other"):
        bench.run(only=names_of(bench), back=tmp_path / "back")
    assert not (tmp_path / "order").exists()
    assert bench.run() == 0
    assert "A is shared, which disturbs the numbers: 1 other" in capsys.readouterr().err
    rows = store.load_tree(bench.out)
    envs = record.environments(rows)
    assert {env["gpu_shared"] for env in envs.values()} == {"1 other process(es) use it"}
    with pytest.raises(ValueError, match="GPU that is shared .*1 other process"):
        record.require_comparable(record.select(rows, "latency"), envs)


def test_a_visit_is_refused_on_a_shared_gpu(held, tmp_path, capsys):
    held(mode=2)
    assert main(["visit", "--out", str(tmp_path / "v")]) == 2
    err = capsys.readouterr().err
    assert "GPU A (GPU-1) is shared: it is virtual" in err and err.count("\n") == 1
    assert not (tmp_path / "v").exists()


# --- several at once


def test_as_many_gpus_as_jobs_are_free_and_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(lease, "shared", lambda: tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(lease, "gpus", lambda: [ONE, TWO])
    assert several.choose(2) == [ONE, TWO]
    with lease.lease([ONE]):
        assert several.choose(1) == [TWO]
        with pytest.raises(
            ParamsError, match="JOBS=2 needs 2 GPUs.* of 2 .* 1 are free. Use JOBS=1"
        ):
            several.choose(2)
    split = lease.Gpu("GPU-3", "B", slices=(lease.Gpu("MIG-1", "B MIG 1g"),))
    monkeypatch.setattr(lease, "gpus", lambda: [split])
    with pytest.raises(ParamsError, match=r"B MIG 1g \(MIG-1\) is a slice of a board"):
        several.choose(2)


WORKER = """
import json, os, sys, time
from pathlib import Path
out = next(x[6:] for x in sys.argv if x.startswith("--out="))
names = [x for x in sys.argv[4:] if not x.startswith("--")]
note = Path(out, str(os.getpid()))
seen = {n: os.environ.get(n) for n in ("CUDA_VISIBLE_DEVICES", "WORKBOOK_NEIGHBOURS")}
note.write_text(json.dumps({"names": names, **seen}))
if "wait" in out:
    import signal
    signal.signal(signal.SIGTERM, lambda *_: (note.with_suffix(".end").touch(), sys.exit(143)))
    time.sleep(60)
deadline = time.monotonic() + 20  # until each GPU has one
while len(list(Path(out).iterdir())) < 2 and time.monotonic() < deadline:
    time.sleep(0.02)
sys.stderr.write("[1/1] done\\n")
"""


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """A stand-in for Python that notes how it was called."""
    path, code = tmp_path / "python", tmp_path / "worker.py"
    code.write_text(WORKER)
    path.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} '{code}' \"$@\"\n")
    path.chmod(0o755)
    monkeypatch.setattr(several.sys, "executable", str(path))


def make_groups(*names: str) -> list[groups.Group]:
    jobs = [SimpleNamespace(name=f"{name}/x/latency") for name in names]
    return [groups.Group(job.name, (job,), False) for job in jobs]


def test_each_gpu_has_a_process_of_its_own(workers, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert several.run(make_groups("a", "b", "c"), [ONE, TWO], [f"--out={out}"]) == (0, [])
    notes = [json.loads(path.read_text()) for path in out.iterdir()]
    assert sorted(name for note in notes for name in note["names"]) == [
        "a/x/latency",
        "b/x/latency",
        "c/x/latency",
    ]
    assert {note["CUDA_VISIBLE_DEVICES"] for note in notes} == {"GPU-1", "GPU-2"}
    assert {note["WORKBOOK_NEIGHBOURS"] for note in notes} == {"1"}
    assert {"GPU 0: [1/1] done", "GPU 1: [1/1] done"} <= {*capsys.readouterr().err.splitlines()}


def test_a_process_that_does_not_do_its_work_is_told(monkeypatch, tmp_path):
    """Such as one whose GPU another run has taken since: what it should measure is of before."""
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\nexit 2\n")
    path.chmod(0o755)
    monkeypatch.setattr(several.sys, "executable", str(path))
    signum, broken = several.run(make_groups("a"), [ONE], [])
    assert signum == 0 and len(broken) == 1
    assert re.search(r"a/x/latency on A \(GPU-1\) ended with status 2", broken[0])


def test_a_signal_goes_on_to_every_process_and_no_other_begins(workers, tmp_path):
    out = tmp_path / "wait"
    out.mkdir()

    def interrupt():
        deadline = time.monotonic() + 20
        while len(list(out.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        if len(list(out.iterdir())) == 2:  # else nobody waits for it, and it would end the tests
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    signum, broken = several.run(make_groups("a", "b", "c"), [ONE, TWO], [f"--out={out}"])
    thread.join()
    assert (signum, broken) == (signal.SIGTERM, [])
    assert len(list(out.glob("*.end"))) == 2 and len(list(out.iterdir())) == 4


DRIVER = """
class NVMLError(Exception):
    pass

BOARDS = ("GPU-one-of-a-test", "GPU-two-of-a-test")
nvmlInit = lambda: None
nvmlDeviceGetCount = lambda: len(BOARDS)
nvmlDeviceGetHandleByIndex = lambda index: BOARDS[index]
nvmlDeviceGetHandleByUUID = nvmlDeviceGetUUID = lambda handle: handle
nvmlDeviceGetName = lambda handle: "Board"
nvmlDeviceGetComputeRunningProcesses = lambda handle: []

def unknown(*_, **__):
    raise NVMLError("Not Supported")

nvmlDeviceGetMigMode = nvmlDeviceGetVirtualizationMode = unknown
nvmlDeviceGetMemoryInfo = nvmlDeviceGetDisplayActive = unknown
"""


def test_a_profile_on_two_gpus_of_one_host(tmp_path):
    """Two groups at once, each on its board; then the report, with every job in one tally."""
    workbook, driver = miniature.make(tmp_path / "w"), tmp_path / "driver"
    driver.mkdir()
    (driver / "pynvml.py").write_text(DRIVER)
    out = workbook / "outputs" / "tiny"
    for name in ("latency", "memory"):  # so that one board cannot do both
        (workbook / "hold" / name).touch()

    def release():
        pattern = f"*/*/*/{store.PARTIAL}/records.jsonl"
        deadline = time.monotonic() + 120
        while len({p.parts[-3] for p in out.glob(pattern)}) < 2 and time.monotonic() < deadline:
            if over.wait(0.1):
                break
        for name in ("latency", "memory"):
            (workbook / "hold" / name).unlink()

    over = threading.Event()
    thread = threading.Thread(target=release)
    thread.start()
    done = miniature.run(
        workbook, "report", "--profile", "tiny", "--jobs", "2", PYTHONPATH=str(driver)
    )
    over.set()
    thread.join()
    assert "3 jobs: 3 ok" in done.stderr, done.stderr
    assert (out / "report.html").exists() and done.returncode == 0
    envs = {
        path.parent.name: {
            (env["CUDA_VISIBLE_DEVICES"], env["WORKBOOK_NEIGHBOURS"])
            for env in record.environments(store.load(path)).values()
        }
        for path in out.rglob("records.jsonl")
    }
    boards = {board for pairs in envs.values() for board, _ in pairs}
    assert boards == {"GPU-one-of-a-test", "GPU-two-of-a-test"}
    assert {count for pairs in envs.values() for _, count in pairs} == {"1"}
    assert len(list(out.rglob("notebook.html"))) == 3


def test_what_others_ran_is_told_and_not_run_again(bench, capsys):
    bench.write(ok="ok", **{"raise": "raise"}, summary="")
    assert bench.run(only=[name for name in names_of(bench) if "summary" not in name]) == 1
    ran = [name for name in names_of(bench) if "summary" not in name]
    pages = []
    assert bench.run(ran=ran, write_page=lambda folder: pages.append(folder.name)) == 1
    assert bench.manifest("raise")["attempt"] == bench.manifest("ok")["attempt"] == 1
    assert pages == ["ok", "raise", "summary"]
    assert "3 jobs: 2 ok, 1 failed" in capsys.readouterr().err
    (bench.job("ok") / "run.json").unlink()  # its process had died
    assert bench.run(ran=ran) == 1
    assert "3 jobs: 1 ok, 1 failed, 1 not run" in capsys.readouterr().err


def test_a_profile_for_the_cpu_takes_no_several_jobs(capsys):
    assert main(["report", "--jobs", "2", "--out", "outputs/none"]) == 2
    err = capsys.readouterr().err
    assert "JOBS=2 is one job a GPU" in err and err.count("\n") == 1
    assert not (ROOT / "outputs" / "none").exists()


# --- what stays together


def test_groups_hold_what_is_compared_and_its_way_back():
    profile = profiles.profile("paper", {"weights": "random"})
    jobs = plan.plan(profile, ROOT / "outputs" / "paper")
    by_name = {group.name: group for group in groups.groups(jobs)}
    members = [job.name for group in by_name.values() for job in group.jobs]
    assert sorted(members) == sorted(job.name for job in jobs if not job.reads)
    assert {name for name, group in by_name.items() if group.compares} == {
        "latency",
        "energy",
        "stacks",
        "batch",
        "serving",
    }
    latency = by_name["latency"].jobs
    models = [job.model for job in latency]
    assert models == ["gpt-oss-20b", "Qwen3-32B", "Yi-34B"]
    assert [job.model for job in groups.way_back(latency)] == models[::-1]
    # Energy has its second pass in the plan; what has none there is repeated.
    energy = by_name["energy"].jobs
    again = [job.model for job in energy if job.notebook == "energy_again"]
    assert again == models[::-1]
    assert {job.stack for job in groups.way_back(energy)} == {"graph-compiled"}
