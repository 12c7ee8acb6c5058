"""The runner against tiny notebooks: how each ending reads, and that nothing is lost or left."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest

from lib import files
from lib.__main__ import main
from lib.files import ParamsError
from lib.records import cut_off, slices, store
from lib.run import job as run_job
from lib.run import kernel as run_kernel
from lib.run import lease, preflight, processes, profiles
from lib.run import loop as lib_run
from lib.run import plan as lib_manifest

ROOT = files.ROOT
RECORD = (
    "import time\nfrom lib.records import record, store\n"
    "store.append(records_path, record.Record('latency', {'model': model}, "
    "samples={'e2e_s': [time.time()]}))"
)
LINE = f"loaded from {ROOT}/models\n"
ENDINGS = {
    "ok": "number += 1",
    "raise": "1 / 0",
    "exit-3": "import sys\nsys.exit(3)",
    "exit-0": "import sys\nsys.exit(0)",
    "kill": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    # Holds the interpreter lock, as a stuck call into a driver would.
    "hang": "import ctypes\nctypes.PyDLL(None).sleep(600)",
    "wait": (
        "try:\n    time.sleep(600)\n"
        "finally:\n    store.append(records_path, record.Record('itl', {'model': model}))"
    ),
    "fork": (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', mark], "
        "start_new_session=True)"
    ),
}
ENDINGS["log"] = "from pathlib import Path\nlog = Path(records_path).with_name('server.log')\n"
ENDINGS["log"] += f"log.write_text({LINE!r} * 1000)"
WAITING = ("hang", "wait", "fork-hang")
ENDINGS["fork-hang"] = ENDINGS["fork"] + "\n" + ENDINGS["hang"]
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="adopts orphans")


def make_notebook(path: Path, parameters: str, *cells: str) -> Path:
    nb = nbformat.v4.new_notebook()
    nb.metadata.kernelspec = {"name": "a-kernel-that-is-not-installed", "display_name": "x"}
    nb.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *cells)]
    nb.cells[0].metadata.tags = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)
    return path


@pytest.fixture
def bench(tmp_path):
    """A folder with notebooks, a profile that runs them, and an output folder."""
    return Bench(tmp_path)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.mark = f"mark-{folder.name}-{os.getpid()}"
        (folder / "params").mkdir()

    def write(self, models=("a/one",), **endings: str) -> None:
        """One measuring notebook for each name, ending as it says; a summary where it is named."""
        head = 'model = "x"\nrecords_path = "x"\nmark = ""\nnumber = 1'
        for name, ending in endings.items():
            if name == "summary":
                cell = (
                    "from pathlib import Path\n"
                    "paths = sorted(Path(results_dir).rglob('records.jsonl'))\nlen(paths)"
                )
                make_notebook(self.source(name), 'results_dir = "x"', cell)
            else:
                make_notebook(self.source(name), head, RECORD, ENDINGS[ending], "after = True")
        profile = {
            "defaults": {"mark": self.mark, "number": 1} if set(endings) != {"summary"} else {},
            "notebooks": {name: {} for name in endings},
            "models": list(models),
        }
        (self.folder / "params" / "tiny.yaml").write_text(json.dumps(profile))

    def source(self, name: str) -> Path:
        return self.folder / "notebooks" / f"{name}.ipynb"

    def profile(self, **slices: str) -> profiles.Profile:
        return profiles.profile(
            "tiny",
            slices,
            params_dir=self.folder / "params",
            notebooks_dir=self.folder / "notebooks",
        )

    def run(self, **options) -> int:
        return lib_run.run(self.profile(), self.out, models_path=self.folder / "none", **options)

    def job(self, notebook: str, model: str = "a--one") -> Path:
        return self.out / model / "random-hf-eager" / notebook

    def manifest(self, notebook: str, model: str = "a--one") -> dict:
        return json.loads((self.job(notebook, model) / "run.json").read_text())

    def statuses(self, notebook: str) -> list[str]:
        nb = nbformat.read(self.job(notebook) / "notebook.ipynb", as_version=4)
        return [c.metadata.papermill["status"] for c in nb.cells if c.cell_type == "code"]

    def start(self, *more: str) -> subprocess.Popen:
        """The runner in a process of its own; like the command, it has no work to lose at first."""
        code = textwrap.dedent(f"""
            import os, signal, sys
            signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
            from pathlib import Path
            from lib.run import loop, profiles
            signal.signal(signal.SIGINT, signal.default_int_handler)
            profile = profiles.profile("tiny", params_dir={str(self.folder / "params")!r},
                                     notebooks_dir={str(self.folder / "notebooks")!r})
            sys.exit(loop.run(profile, Path({str(self.out)!r}), models_path=Path("none")))
        """)
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-c", code, *more], env=env, stderr=subprocess.PIPE, text=True
        )

    def wait_for_hang(self, notebook: str) -> None:
        partial = self.job(notebook) / store.PARTIAL / "records.jsonl"
        deadline = time.monotonic() + 30
        while not partial.exists():
            assert time.monotonic() < deadline, "the notebook did not start"
            time.sleep(0.05)

    def left(self) -> list[str]:
        """Processes that carry the mark of this bench, and kernels that this process started."""
        return [
            command
            for process in psutil.process_iter(["cmdline", "ppid"])
            if self.mark in (command := " ".join(process.info["cmdline"] or ()))
            or ("ipykernel_launcher" in command and process.info["ppid"] == os.getpid())
        ]


@needs_linux
def test_every_ending_is_told_as_it_happened(bench, capsys):
    names = {name.replace("-", "_"): name for name in ENDINGS if name not in WAITING}
    bench.write(**names)
    assert bench.run() == 1

    manifests = {name: bench.manifest(name) for name in names}
    assert {name: m["status"] for name, m in manifests.items()} == {
        "ok": "ok",
        "fork": "ok",
        "log": "ok",
        "raise": "failed",
        "exit_3": "failed",
        "exit_0": "failed",
        "kill": "dead-kernel",
    }
    assert manifests["ok"]["error"] is None
    assert manifests["raise"]["error"] == {
        "name": "ZeroDivisionError",
        "value": "division by zero",
        "cell": 4,
    }
    assert manifests["exit_3"]["error"]["name"] == "SystemExit"
    assert manifests["exit_0"]["error"] == {"name": "SystemExit", "value": "0", "cell": 4}
    assert manifests["kill"]["error"]["cell"] == 4
    # Parameters, injected parameters, the record: then the cell that ended it.
    assert bench.statuses("kill") == ["completed"] * 3 + ["failed", "pending"]
    assert bench.statuses("raise") == ["completed"] * 3 + ["failed", "pending"]
    for name in names:  # what was measured before the end is kept
        assert len((bench.job(name) / "records.jsonl").read_text().splitlines()) == 1
        assert not (bench.job(name) / store.PARTIAL).exists()
    assert bench.left() == []
    err = capsys.readouterr().err
    assert "7 jobs: 3 ok, 4 failed" in err
    assert "failed: a/one random-hf-eager raise: ZeroDivisionError in cell [4]" in err
    assert "encryption" not in err


def test_a_manifest_has_exactly_these_fields(bench):
    bench.write(ok="ok")
    assert bench.run() == 0
    manifest = bench.manifest("ok")
    assert set(manifest) == {
        "status",
        "error",
        "parameters",
        "job_sha",
        "notebook_sha",
        "lib_sha",
        "git",
        "env",
        "attempt",
        "start",
        "end",
        "earlier",
        "artefacts",
    }
    for item in manifest["artefacts"]:
        assert files.file_sha(bench.job("ok") / item["path"]) == item["sha256"]
    assert [a["path"] for a in manifest["artefacts"]] == ["notebook.ipynb", "records.jsonl"]
    assert manifest["env"]["gpu"] == "cpu"
    assert manifest["git"]["commit"] or manifest["git"]["reason"]
    assert manifest["start"] < manifest["end"]


def test_a_log_is_kept_compressed_without_this_machine_s_folders(bench):
    bench.write(log="log")
    assert bench.run() == 0
    assert [a["path"] for a in bench.manifest("log")["artefacts"]] == [
        "notebook.ipynb",
        "records.jsonl",
        "server.log.gz",
    ]
    packed = (bench.job("log") / "server.log.gz").read_bytes()
    assert gzip.decompress(packed).decode() == "loaded from models\n" * 1000 and len(packed) < 500


@needs_linux
@pytest.mark.parametrize(("failures", "status"), [(1, "ok"), (2, "dead-kernel")])
def test_a_kernel_that_does_not_start_is_tried_once_more(bench, monkeypatch, failures, status):
    bench.write(first="ok")
    start, starts = run_kernel.Client.start_new_kernel_client, []

    def start_late(client):
        starts.append(client)
        if len(starts) <= failures:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return start(client)

    monkeypatch.setattr(run_kernel.Client, "start_new_kernel_client", start_late)
    assert bench.run() == (status != "ok")
    manifest = bench.manifest("first")
    assert (manifest["status"], len(starts)) == (status, 2)
    if status == "dead-kernel":
        assert manifest["error"]["cell"] is None
        assert bench.statuses("first") == ["pending"] * 5
    assert bench.left() == []


@needs_linux
def test_the_limit_is_for_the_whole_notebook(bench):
    bench.write(hang="hang", ok="ok")
    started = time.monotonic()
    assert bench.run(timeout_s=4) == 1
    assert time.monotonic() - started < 20
    assert bench.manifest("hang")["status"] == "timeout"
    assert bench.manifest("hang")["error"]["cell"] == 4
    assert bench.statuses("hang")[-2:] == ["failed", "pending"]
    assert bench.manifest("ok")["status"] == "ok"  # the loop went on
    assert bench.left() == []


@needs_linux
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_cell_may_write_what_it_has(bench, signum):
    """As a measurement does that writes its rows at the end."""
    bench.write(wait="wait", never="ok")
    runner = bench.start(bench.mark)
    bench.wait_for_hang("wait")
    time.sleep(0.5)
    runner.send_signal(signum)
    _, err = runner.communicate(timeout=20)
    assert runner.returncode == 128 + signum
    manifest = bench.manifest("wait")
    assert (manifest["status"], manifest["error"]["name"]) == ("interrupted", "Interrupted")
    assert manifest["error"]["cell"] == 4
    rows = store.load(bench.job("wait") / "records.jsonl")
    assert [row.kind for row in rows] == ["latency", "itl"]
    assert not bench.job("never").exists()
    assert "Traceback" not in err and bench.left() == []


@needs_linux
def test_the_limit_lets_a_cell_write_what_it_has(bench):
    bench.write(wait="wait")
    assert bench.run(timeout_s=4) == 1
    assert bench.manifest("wait")["status"] == "timeout"
    rows = store.load(bench.job("wait") / "records.jsonl")
    assert [row.kind for row in rows] == ["latency", "itl"]


@needs_linux
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_cleanly(bench, signum):
    bench.write(ok="ok", hang="hang", never="ok")
    runner = bench.start(bench.mark)
    bench.wait_for_hang("hang")
    runner.send_signal(signum)
    _, err = runner.communicate(timeout=20)
    assert runner.returncode == 128 + signum
    assert bench.manifest("ok")["status"] == "ok"
    assert bench.manifest("hang")["status"] == "interrupted"
    assert not bench.job("never").exists()
    assert "interrupted: finished jobs are kept" in err
    assert "Traceback" not in err
    assert bench.left() == []


@needs_linux
def test_nothing_outlives_a_killed_runner(bench):
    """Neither a kernel that holds its lock nor what it started in a session of its own."""
    bench.write(hang="fork-hang")
    runner = bench.start(bench.mark)
    bench.wait_for_hang("hang")
    deadline = time.monotonic() + 20
    while True:
        leftovers = processes.descendants(runner.pid)
        if any(bench.mark in process.cmdline() for process in leftovers):
            break
        assert time.monotonic() < deadline, "the notebook started nothing"
        time.sleep(0.1)
    time.sleep(0.5)
    runner.kill()
    runner.communicate(timeout=10)
    alive = psutil.wait_procs(leftovers, timeout=5)[1]
    processes.reap(alive)
    assert alive == []
    assert not (bench.job("hang") / "run.json").exists()  # so that it is run again


@needs_linux
def test_what_a_killed_runner_had_measured_stays(bench, capsys):
    """Its rows are an interrupted run's for the next command, and for a merge of a copy; a line
    that was being written is dropped."""
    bench.write(hang="hang")
    runner = bench.start(bench.mark)
    bench.wait_for_hang("hang")
    runner.kill()
    runner.communicate(timeout=10)
    with (bench.job("hang") / store.PARTIAL / "records.jsonl").open("a") as file:
        file.write('{"kind": "lat')
    copy = shutil.copytree(bench.out, bench.folder / "copy")

    merged = bench.folder / "merged"
    slices.merge([copy], merged)
    assert (copy / bench.job("hang").relative_to(bench.out) / store.PARTIAL).exists()
    bench.write(hang="ok")  # and the same notebook, which now comes to its end
    assert bench.run() == 0
    assert f"{cut_off.WHY}; its 1 rows are kept" in capsys.readouterr().err

    folder = merged / bench.job("hang").relative_to(bench.out)
    found, again = store.read(folder), bench.manifest("hang")
    assert (found["status"], found["error"]["value"]) == ("interrupted", cut_off.OPEN)
    assert found["start"] < found["end"] and found["env"]["gpu"] == "cpu"
    assert [row.kind for row in store.load(folder / "records.jsonl")] == ["latency"]
    assert store.damage(folder, found) == ""
    assert (again["status"], again["attempt"]) == ("ok", 2)


AWKWARD = {
    "text": "007",
    "sha": "1234e56",
    "yes": "yes",
    "flag": True,
    "nothing": None,
    "small": 1e-3,
    "big": 2**63,
    "nested": {"a": {"b": [1, 2.5, None, False]}, "ü": "→ \u2028"},
    "quotes": 'it\'s "quoted" \\ and \n new',
    "braces": "{model}",
}


def test_parameters_arrive_as_they_are(bench, tmp_path):
    head = "\n".join(
        f"{name} = {type(value)() if value is not None else None!r}"
        for name, value in AWKWARD.items()
    )
    cell = (
        "import json\nfrom pathlib import Path\n"
        f"values = [globals()[name] for name in {list(AWKWARD)}]\n"
        "Path(seen).write_text(json.dumps(values))"
    )
    seen = tmp_path / "seen.json"
    make_notebook(bench.source("typed"), f'{head}\nseen = ""', cell)
    outcome = run_kernel.execute(
        bench.source("typed"),
        tmp_path / "{out}.ipynb",
        {**AWKWARD, "seen": str(seen)},
        env=run_kernel.kernel_env(offline=True),
        watch=run_kernel.Watch(),
    )
    assert outcome.status == "ok"
    assert json.loads(seen.read_text()) == list(AWKWARD.values())
    assert (tmp_path / "{out}.ipynb").exists()


def test_an_unknown_parameter_stops_before_any_work(bench):
    bench.write(ok="ok")
    job = lib_manifest.plan(bench.profile(), bench.out)[0]
    wrong = dataclasses.replace(job, parameters={**job.parameters, "nmber": 2})
    with pytest.raises(ParamsError, match="'nmber'; did you mean 'number'"):
        run_job.run_job(wrong, sha="x", env={})
    assert not bench.out.exists()


def test_finished_jobs_are_skipped_until_something_changes(bench, capsys):
    bench.write(models=["a/one", "a/two"], first="ok", summary="")
    everything = [("a--one", "first"), ("a--two", "first"), ("_all", "summary")]

    def attempts() -> list[int]:
        summary = json.loads((bench.out / "_all" / "summary" / "run.json").read_text())
        return [*(bench.manifest(n, m)["attempt"] for m, n in everything[:2]), summary["attempt"]]

    assert bench.run() == 0
    assert attempts() == [1, 1, 1]
    assert bench.run() == 0
    assert attempts() == [1, 1, 1]
    assert "3 jobs: 0 ok, 3 skipped" in capsys.readouterr().err

    (bench.job("first", "a--two") / "run.json").unlink()
    assert bench.run() == 0
    # One measuring notebook, and the reading one, whose records were replaced.
    assert attempts() == [1, 1, 2]

    text = bench.source("first").read_text()
    bench.source("first").write_text(text.replace("after = True", "after = False"))
    capsys.readouterr()
    assert bench.run() == 0
    assert attempts() == [1, 1, 2]
    assert "measured with other code than today's: a/one" in capsys.readouterr().err
    assert bench.run(force=True) == 0
    assert attempts() == [2, 2, 3]


def test_a_second_pass_begins_with_the_last_model_when_all_are_through(bench):
    bench.write(models=["a/one", "a/two"], energy_again="ok", energy="ok", summary="")
    titles = [job.title for job in lib_manifest.plan(bench.profile(), bench.out)]
    assert titles == [
        "a/one random-hf-eager energy",
        "a/two random-hf-eager energy",
        "a/two random-hf-eager energy_again",
        "a/one random-hf-eager energy_again",
        "all models summary",
    ]


def test_the_machine_is_measured_once_and_before_the_models(bench, capsys):
    bench.write(models=["a/one", "a/two"], first="ok", summary="", machine="ok")
    titles = [job.title for job in lib_manifest.plan(bench.profile(), bench.out)]
    assert titles == [
        "this machine",
        "a/one random-hf-eager first",
        "a/two random-hf-eager first",
        "all models summary",
    ]
    assert bench.run() == 0
    manifest = json.loads((bench.out / "_all/machine/run.json").read_text())
    assert (manifest["status"], manifest["parameters"]["model"]) == ("ok", "_all")
    assert (bench.out / "_all/machine/records.jsonl").exists()
    assert manifest["end"] < bench.manifest("first")["start"]
    capsys.readouterr()
    assert bench.run() == 0
    assert "4 jobs: 0 ok, 4 skipped" in capsys.readouterr().err
    (alone,) = lib_manifest.plan(bench.profile(notebooks="machine"), bench.out)
    assert (alone.notebook, alone.reads) == ("machine", None)


def test_a_reading_notebook_is_repeated_when_its_code_changed(bench):
    bench.write(models=["a/one"], summary="")
    assert bench.run() == 0
    text = bench.source("summary").read_text()
    bench.source("summary").write_text(text.replace("len(paths)", "print(len(paths))"))
    assert bench.run() == 0
    assert json.loads((bench.out / "_all/summary/run.json").read_text())["attempt"] == 2


def test_what_was_measured_survives_a_failed_repetition(bench):
    bench.write(first="ok")
    assert bench.run() == 0
    before = (bench.job("first") / "records.jsonl").read_text()
    bench.write(first="raise")
    assert bench.run(force=True) == 1
    assert bench.manifest("first")["status"] == "failed"
    assert (bench.job("first") / store.PREVIOUS / "records.jsonl").read_text() == before


@needs_linux
def test_an_interrupted_repetition_leaves_the_finished_job(bench):
    bench.write(first="ok")
    assert bench.run() == 0
    before = bench.manifest("first")
    bench.write(first="hang")
    job = lib_manifest.plan(bench.profile(), bench.out)[0]
    stop = run_job.Stop()
    timer = threading.Timer(4, stop, [signal.SIGINT])
    timer.start()
    manifest = run_job.run_job(job, sha="x", env=run_kernel.kernel_env(offline=True), stop=stop)
    assert manifest["status"] == "interrupted"
    assert bench.manifest("first") == before
    assert not (bench.job("first") / store.PARTIAL).exists()


def test_a_reader_never_sees_half_a_file(bench):
    bench.write(first="ok")
    torn, reads, done = [], [], threading.Event()

    def poll() -> None:
        while not done.is_set():
            for name in ("run.json", "notebook.ipynb", ".partial/notebook.ipynb"):
                try:
                    json.loads((bench.job("first") / name).read_text())
                    reads.append(name)
                except FileNotFoundError:
                    pass
                except ValueError as error:
                    torn.append((name, error))
            time.sleep(0.0005)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        bench.run()
        bench.run(force=True)
    finally:
        done.set()
        thread.join()
    assert torn == []
    assert {"run.json", "notebook.ipynb", ".partial/notebook.ipynb"} == set(reads)


def test_two_runs_cannot_share_a_gpu_or_a_folder(tmp_path):
    two = [lease.Gpu("GPU-1", "A"), lease.Gpu("GPU-2", "B")]
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom lib.run import lease\n"
        f"with lease.lease([lease.Gpu('GPU-1', 'A')], folder=Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True)\n    time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(lease.BusyError, match=f"GPU A .GPU-1. .*process {holder.pid}.*--wait"),
            lease.lease(two[:1], folder=tmp_path),
        ):
            pass
        with lease.lease(two, folder=tmp_path) as (gpu,):
            assert gpu.uuid == "GPU-2"
    finally:
        holder.kill()
        holder.communicate()
    with lease.lease(two[:1], wait=True, folder=tmp_path) as (gpu,):  # freed by the death
        assert gpu.uuid == "GPU-1"


FOUR = [lease.Gpu(f"GPU-{n}", "A") for n in range(4)]


def test_several_gpus_are_held_together(tmp_path):
    """The first free ones, in the order given; one too few names the holder and holds none."""
    with lease.lease(FOUR[1:2], folder=tmp_path):
        with lease.lease(FOUR, 2, folder=tmp_path) as held:
            assert [gpu.uuid for gpu in held] == ["GPU-0", "GPU-2"]
        with (
            pytest.raises(lease.BusyError, match=rf"GPU A .GPU-1.*process {os.getpid()}.*--wait"),
            lease.lease(FOUR[:2], 2, folder=tmp_path),
        ):
            pass
        with lease.lease(FOUR[:1], folder=tmp_path) as held:  # was let go
            assert held == FOUR[:1]


def test_two_that_wait_for_several_gpus_never_wait_for_each_other(tmp_path):
    """Each names the other's GPUs first, many times over; a thread's lock is its own."""
    turns = []

    def run(order):
        for _ in range(20):
            with lease.lease(order, 2, wait=True, folder=tmp_path) as held:
                turns.append({gpu.uuid for gpu in held})

    orders = (FOUR[:2], FOUR[1::-1], FOUR[:3], FOUR[2::-1])
    threads = [threading.Thread(target=run, args=(order,), daemon=True) for order in orders]
    for thread in threads:
        thread.start()
    end_s = time.monotonic() + 30
    for thread in threads:
        thread.join(timeout=max(0.0, end_s - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)
    assert len(turns) == 80 and all(len(held) == 2 for held in turns)


def test_a_model_is_sharded_over_gpus_of_one_kind():
    mixed = [lease.Gpu("1", "A"), lease.Gpu("2", "B"), lease.Gpu("3", "B")]
    assert lease.alike(mixed, 1) == mixed
    assert [gpu.uuid for gpu in lease.alike(mixed, 2)] == ["2", "3"]
    with pytest.raises(ParamsError, match=r"devices: 3 needs .* 3 can be seen here .A, B, B"):
        lease.alike(mixed, 3)
    with pytest.raises(ParamsError, match=r"0 can be seen here .none.; use DEVICES=1"):
        lease.alike([], 2)


def sharded(bench, devices) -> None:
    """A profile with the machine, and a model on each of these numbers of GPUs."""
    cell = "import os\nos.environ['CUDA_VISIBLE_DEVICES']"
    head = 'records_path = "x"\ndevice = "auto"'
    make_notebook(bench.source("machine"), head, cell)
    make_notebook(bench.source("latency"), f'model = "x"\nstack = ""\ndevices = 1\n{head}', cell)
    profile = {
        "defaults": {"device": "auto", "stack": "vllm"},
        "notebooks": {"machine": {}, "latency": {}},
        "models": [{"name": "a/one", "devices": devices}],
    }
    (bench.folder / "params" / "tiny.yaml").write_text(json.dumps(profile))


def test_a_job_sees_the_gpus_that_it_asks_for(bench, monkeypatch):
    """The machine is all that the run holds; run.json names them."""
    monkeypatch.setattr(lease, "gpus", lambda: FOUR[1:3])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    sharded(bench, [1, 2])
    assert bench.run(check=lambda arms, env: None) == 0
    seen, names = {}, {}
    for path in sorted(bench.out.rglob("run.json")):
        job = path.parent
        nb = nbformat.read(job / "notebook.ipynb", as_version=4)
        name = job.relative_to(bench.out).as_posix()
        seen[name] = nb.cells[-1].outputs[0]["data"]["text/plain"].strip("'")
        names[name] = json.loads(path.read_text())["env"]["gpu"]
    assert seen == {
        "_all/machine": "GPU-1,GPU-2",
        "a--one/random-vllm/latency": "GPU-1",
        "a--one/random-vllm-2gpus/latency": "GPU-1,GPU-2",
    }
    assert sorted(names.values()) == ["2 x A", "A", "A"]


def test_fewer_gpus_than_asked_for_is_one_line_before_any_work(bench, monkeypatch):
    monkeypatch.setattr(lease, "gpus", lambda: FOUR[1:3])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    sharded(bench, 3)
    with pytest.raises(ParamsError, match="devices: 3 needs so many GPUs") as error:
        bench.run(check=lambda arms, env: None)
    assert "\n" not in str(error.value) and not list(bench.out.rglob("run.json"))


def test_the_preflight_asks_for_each_number_of_gpus(bench):
    sharded(bench, [1, 2])
    head = 'model = "x"\nstack = ""\ndevices = 1\nrecords_path = "x"\ndevice = "auto"\ncontext = 8'
    make_notebook(bench.source("latency"), head)
    text = (bench.folder / "params" / "tiny.yaml").read_text()
    text = text.replace('"latency": {}', '"latency": {"context": 8}')
    (bench.folder / "params" / "tiny.yaml").write_text(text)
    arms = preflight.arms(lib_manifest.plan(bench.profile(), bench.out))
    assert [arm["devices"] for arm in arms] == [1, 2]


def test_cuda_visible_devices_is_obeyed():
    three = [lease.Gpu(f"GPU-{i}", "A") for i in range(3)]
    assert lease.visible(three, {}) == three
    assert lease.visible(three, {"CUDA_VISIBLE_DEVICES": "2,0"}) == [three[2], three[0]]
    assert lease.visible(three, {"CUDA_VISIBLE_DEVICES": "GPU-1"}) == [three[1]]
    assert lease.visible(three, {"CUDA_VISIBLE_DEVICES": "0,9,1"}) == [three[0]]
    assert lease.visible(three, {"CUDA_VISIBLE_DEVICES": ""}) == []
    assert lease.visible(three, {"CUDA_VISIBLE_DEVICES": "-1"}) == []


H100 = lease.Gpu(
    "GPU-a1",
    "H100",
    slices=(lease.Gpu("MIG-b1", "H100 MIG 1g.10gb"), lease.Gpu("MIG-b2", "H100 MIG 1g.10gb")),
)
L4 = lease.Gpu("GPU-a2", "L4")


@pytest.mark.parametrize(
    ("text", "uuids"),
    [
        ("MIG-b2", ["MIG-b2"]),
        ("MIG-b2,MIG-b1", ["MIG-b2", "MIG-b1"]),
        ("MIG-GPU-a1/3/0", ["MIG-b1", "MIG-b2"]),  # as drivers before R470 wrote it
        ("GPU-a1", ["MIG-b1", "MIG-b2"]),
        ("0", ["MIG-b1", "MIG-b2"]),
        ("1", ["GPU-a2"]),
        ("GPU-a2", ["GPU-a2"]),
        (None, ["MIG-b1", "MIG-b2", "GPU-a2"]),
    ],
)
def test_slices_are_named_by_uuid_and_stand_for_a_gpu_that_is_split(text, uuids):
    env = {} if text is None else {"CUDA_VISIBLE_DEVICES": text}
    assert [gpu.uuid for gpu in lease.visible([H100, L4], env)] == uuids


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        (
            {"CUDA_VISIBLE_DEVICES": "MIG-zz"},
            "names a MIG slice that the driver does not list .*",
        ),
        ({"CUDA_VISIBLE_DEVICES": "GPU-zz"}, "names a GPU that the driver does not list"),
        ({"CUDA_VISIBLE_DEVICES": "7"}, "names a GPU that the driver does not list"),
        ({"CUDA_VISIBLE_DEVICES": "--1"}, "names a GPU that the driver does not list"),
        ({"CUDA_VISIBLE_DEVICES": "²"}, "names a GPU that the driver does not list"),
        ({"CUDA_VISIBLE_DEVICES": "1,1"}, "names GPU-a2 twice, and CUDA then shows no GPU"),
        ({"CUDA_VISIBLE_DEVICES": "1,GPU-a2"}, "names GPU-a2 twice"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-b1,MIG-b1"}, "names MIG-b1 twice"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a"}, "fits GPU-a1, GPU-a2; give one UUID in full"),
        (
            {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"},
            "by its speed, and which one that is only CUDA knows; name it by its UUID .GPU-a1, GPU",
        ),
    ],
)
def test_names_that_lead_to_no_gpu_are_refused_with_those_that_do(env, reason):
    with pytest.raises(ParamsError, match=reason):
        lease.visible([H100, L4], env)


def test_equal_gpus_are_counted_alike_whichever_comes_first():
    two = [lease.Gpu("GPU-1", "A"), lease.Gpu("GPU-2", "A")]
    env = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert lease.visible(two, env) == [two[1]]


def fake_nvml(*, mig):
    """A driver with one board, which has two of seven slices where `mig` is on."""

    class NVMLError(Exception):
        pass

    def slice_of(handle, index):
        if index > 1:
            raise NVMLError("Not Found")
        return f"MIG-{index}"

    def mode(handle):
        if mig is None:
            raise NVMLError("Not Supported")
        return [int(mig), int(mig)]

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: "GPU-1",
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetName=lambda handle: f"name of {handle}",
        nvmlDeviceGetMigMode=mode,
        nvmlDeviceGetMaxMigDeviceCount=lambda handle: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=slice_of,
    )


@pytest.mark.parametrize(("mig", "slices"), [(None, []), (False, []), (True, ["MIG-0", "MIG-1"])])
def test_the_driver_lists_slices_where_mig_is_on(monkeypatch, mig, slices):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(mig=mig))
    (gpu,) = lease.gpus()
    assert gpu.uuid == "GPU-1" and [one.uuid for one in gpu.slices] == slices


@pytest.mark.parametrize("listed", [None, "0,1", "1,0", "GPU-1,GPU-2", "GPU-2"])
def test_the_kernel_sees_the_gpu_that_is_held_and_no_other(bench, monkeypatch, listed):
    """Another run holds the first GPU; a list that is set already names both."""
    held = []

    def leased(candidates, count, *, wait):
        held.append(next(gpu for gpu in candidates if gpu.uuid == "GPU-2"))
        return contextlib.nullcontext(held[:count])

    monkeypatch.setattr(lease, "gpus", lambda: [lease.Gpu(f"GPU-{i}", "A") for i in (1, 2)])
    monkeypatch.setattr(lease, "lease", leased)
    if listed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    cell = "import os\nos.environ['CUDA_VISIBLE_DEVICES']"
    head = 'model = "x"\nrecords_path = "x"\ndevice = "auto"'
    make_notebook(bench.source("first"), head, cell)
    profile = {"defaults": {"device": "auto"}, "notebooks": {"first": {}}, "models": ["a/one"]}
    (bench.folder / "params" / "tiny.yaml").write_text(json.dumps(profile))
    envs = []
    assert bench.run(check=lambda arms, env: envs.append(env["CUDA_VISIBLE_DEVICES"])) == 0
    nb = nbformat.read(bench.job("first") / "notebook.ipynb", as_version=4)
    assert nb.cells[-1].outputs[0]["data"]["text/plain"] == "'GPU-2'" and envs == ["GPU-2"]


def test_slugs_are_different_for_different_models(tmp_path):
    names = ["a/b", "a--b", "a-/b", "a/-b", "a-b", "_all", "a/b/c", "a.b", str(tmp_path), "ä b"]
    slugs = [store.model_folder(name) for name in names]
    assert slugs[0] == "a--b"
    assert len(set(slugs)) == len(names)
    assert all("/" not in slug and not slug.startswith(".") for slug in slugs)
    assert "_all" not in slugs


@pytest.mark.parametrize("name", ["GLM-4.5-Air", "Llama-3.1-8B", "model-q4_1.gguf"])
def test_the_slug_of_a_path_holds_its_whole_name(tmp_path, name):
    assert store.model_folder(str(tmp_path / name)).startswith(
        name.removesuffix(".gguf").replace("_", "-") + "-"
    )


class NoGpuModels:
    """Stands in for lib.models: a model of 100 positions that needs 1 byte per token."""

    @staticmethod
    def card(name, dtype):
        if name == "missing/model":
            raise ValueError("the hub has no missing/model")
        return name

    @staticmethod
    def require_decoder(card):
        if card == "encoder":
            raise ValueError("it reads both ways")

    @staticmethod
    def require_context(card, context, new_tokens):
        if context + new_tokens > 100:
            raise ValueError(f"context {context} + {new_tokens} new tokens exceeds 100")

    @staticmethod
    def require_fits(card, device, tokens):
        if tokens > device:
            raise ValueError(f"needs {tokens} bytes, there are {device}")


def test_the_preflight_names_every_model_that_cannot_run():
    def arm(model, context, new_tokens=8):
        return {
            "model": model,
            "weights": "random",
            "dtype": "float32",
            "device": "cpu",
            "context": context,
            "new_tokens": new_tokens,
        }

    arms = [arm("good", 16), arm("long", 96), arm("big", 60), arm("missing/model", 1)]
    arms += [arm("encoder", 1)]
    assert preflight.check(arms, models=NoGpuModels, device=50) == [
        "long: context 96 + 8 new tokens exceeds 100",
        "big: needs 68 bytes, there are 50",
        "the hub has no missing/model",
        "encoder: it reads both ways",
    ]


@pytest.mark.parametrize("name", ["paper", "demo"])
def test_every_arm_of_a_profile_fits_the_positions_of_its_model(name, tmp_path):
    profile = profiles.profile(name, {"weights": "random"})
    arms = preflight.arms(lib_manifest.plan(profile, tmp_path))
    assert arms and preflight.check(arms, device=SimpleNamespace(free_bytes=lambda: None)) == []


def test_the_preflight_asks_for_the_largest_base_arm(bench):
    head = 'model = ""\nrecords_path = ""\ncontexts = [1]\nnew_tokens = [1]'
    make_notebook(bench.source("latency"), head)
    head = 'model = ""\nrecords_path = ""\ncontext = 1\ncontexts = [1]\nnew_tokens = [1]'
    make_notebook(bench.source("ablations"), head)
    profile = {
        "defaults": {"contexts": [16, 64], "new_tokens": [4, 8]},
        "notebooks": {"latency": {}, "ablations": {"context": 32, "contexts": [4096]}},
        "models": ["a/one"],
    }
    (bench.folder / "params" / "tiny.yaml").write_text(json.dumps(profile))
    (arm,) = preflight.arms(lib_manifest.plan(bench.profile(), bench.out))
    assert (arm["context"], arm["new_tokens"]) == (64, 8)


def test_the_preflight_asks_nothing_for_a_notebook_that_only_reads(bench):
    head = 'model = ""\nweights = ""\nresults_dir = ""\ncontext = 1'
    make_notebook(bench.source("ape"), head)
    profile = {"defaults": {"context": 2048}, "notebooks": {"ape": {}}, "models": ["a/one"]}
    (bench.folder / "params" / "tiny.yaml").write_text(json.dumps(profile))
    assert preflight.arms(lib_manifest.plan(bench.profile(), bench.out)) == []


def test_without_a_gpu_the_error_names_profile_and_fix(bench, monkeypatch):
    make_notebook(bench.source("latency"), 'model = ""\nrecords_path = ""\ndevice = "auto"')
    profile = {"defaults": {"device": "cuda"}, "notebooks": {"latency": {}}, "models": ["a/one"]}
    (bench.folder / "params" / "tiny.yaml").write_text(json.dumps(profile))
    monkeypatch.setattr(lease, "gpus", list)
    with pytest.raises(preflight.PreflightError, match="'tiny' .* NVIDIA GPU.*`make report`"):
        bench.run()
    assert not bench.out.exists()


def test_the_gpu_is_part_of_a_jobs_identity(bench):
    bench.write(ok="ok")
    (job,) = lib_manifest.plan(bench.profile(), bench.out)
    shas = {lib_manifest.job_sha(job, gpu, Path("none")) for gpu in ("cpu", "H100", "H100")}
    assert len(shas) == 2
    moved = dataclasses.replace(
        job, parameters={**job.parameters, "records_path": "elsewhere/records.jsonl"}
    )
    assert lib_manifest.job_sha(moved, "cpu", Path("none")) in shas
    more = dataclasses.replace(job, parameters={**job.parameters, "number": 2})
    assert lib_manifest.job_sha(more, "cpu", Path("none")) not in shas


def test_data_of_packages_outside_the_environment_is_found(tmp_path):
    (tmp_path / "site" / "share" / "jupyter").mkdir(parents=True)
    path = files.jupyter_path([str(tmp_path / "site"), str(tmp_path)], "/already/there")
    assert path.split(os.pathsep) == ["/already/there", str(tmp_path / "site/share/jupyter")]
    assert files.jupyter_path([str(tmp_path)], "") == ""


def test_a_job_s_folder_on_another_disk_is_refused_before_work(bench, monkeypatch):
    """One step puts a run in place, and no step leads from one disk to another."""
    bench.write(ok="ok")
    assert bench.run() == 0
    (folder,) = (path.parent for path in bench.out.rglob("run.json"))
    before = (folder / "run.json").read_bytes()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == folder)
    with pytest.raises(ParamsError, match=f"{folder.name} is a disk of its own; .* unmount it"):
        bench.run(force=True)
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY])
def test_a_fault_between_disks_is_one_line(number):
    text = files.disk_fault(OSError(number, "fault", "/a/b"))
    assert text.startswith("'/a/b': fault; ") and "disk" in text


def test_a_broken_report_is_told_and_costs_no_measurement(bench, capsys):
    bench.write(ok="ok")

    def write(path: Path) -> None:
        raise OSError("disk full\nsecond line")

    files.write_text(bench.out / "report.html", "of another run")
    assert bench.run(write_report=write) == 1
    assert bench.manifest("ok")["status"] == "ok"
    err = capsys.readouterr().err
    assert "error: report of" in err and "second line" not in err
    assert "report.html" not in err  # which is older, or another's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "dmo"], "unknown profile 'dmo'; did you mean 'demo'"),
        (["--profile", "models"], "unknown profile 'models'"),
        (["--from", "outputs/nowhere"], "no folder outputs/nowhere"),
        (["--from", "tests"], "no run.json below tests"),
        (["--from", "tests", "--out", "outputs/released/x"], "is released and never written"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys):
    assert main(["report", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_hash_of_the_library_sees_its_packages(tmp_path):
    """A change in a sub-folder, or a file that moves, makes finished jobs stale."""
    (tmp_path / "stats").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "stats" / "b.py").write_text("y = 1\n")
    first = lib_manifest.lib_sha(tmp_path)
    (tmp_path / "stats" / "b.py").write_text("y = 2\n")
    second = lib_manifest.lib_sha(tmp_path)
    (tmp_path / "stats" / "b.py").rename(tmp_path / "b.py")
    assert len({first, second, lib_manifest.lib_sha(tmp_path)}) == 3


def test_one_job_runs_beside_others_and_is_named_by_its_folder(bench):
    """Nothing else is run, the plan names all, and two jobs lock their own folders only."""
    bench.write(ok="ok", **{"raise": "raise"})
    name = "a--one/random-hf-eager/ok"
    whole = hashlib.sha256(str(bench.out.resolve()).encode()).hexdigest()[:12]
    with lease.lock(f"out-{whole}", what="another job's folder"):
        assert bench.run(only=[name]) == 0
    assert bench.manifest("ok")["status"] == "ok" and not bench.job("raise").exists()
    assert len(json.loads((bench.out / "plan.json").read_text())["jobs"]) == 2
    with pytest.raises(ParamsError, match="unknown job .*did you mean 'a--one/"):
        bench.run(only=["a--one/random-hf-eager/okk"])
