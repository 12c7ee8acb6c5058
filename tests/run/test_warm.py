"""Kernels that are forks: what is imported once, and what each still has for itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lib.files import ROOT
from lib.run import processes, warm
from tests.run.test_loop import Bench, make_notebook, needs_linux

pytestmark = needs_linux
HEAD = 'model = "x"\nrecords_path = "x"\nmark = ""\nnumber = 1'
COUNTED = "import os\nwith open(os.environ['COUNT'], 'a') as file:\n    file.write('imported\\n')\n"


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A package that notes each of its imports, notebooks that import it, and the notes."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "costly.py").write_text(COUNTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    bench = Bench(tmp_path)

    def write(*names: str, cell: str = "") -> tuple[Bench, Path]:
        bench.write(**dict.fromkeys(names, "ok"))
        for name in names:
            make_notebook(bench.source(name), HEAD, "import costly", cell or "pass")
        return bench, tmp_path / "count"

    return write


def outputs(bench: Bench, name: str) -> str:
    cells = json.loads((bench.job(name) / "notebook.ipynb").read_text())["cells"]
    return "".join("".join(o.get("text", ())) for c in cells for o in c.get("outputs", ()))


def test_four_notebooks_import_once(counted):
    bench, count = counted("one", "two", "three", "four")
    assert bench.run() == 0
    assert count.read_text().count("imported") == 1


def test_one_notebook_needs_no_process_to_fork(counted, monkeypatch):
    bench, count = counted("one")
    monkeypatch.setattr(warm, "Worker", None)
    assert bench.run() == 0
    assert count.read_text().count("imported") == 1


def test_a_notebook_finds_nothing_of_the_one_before(counted):
    """Neither its variables nor what it did to modules, environment, folder or warnings."""
    cell = (
        "import warnings\n"
        "print('left' in globals(), hasattr(costly, 'left'), os.environ.get('LEFT'), os.getcwd(),"
        " warnings.filters[0][1] is None, get_ipython().execution_count)\n"
        "left = costly.left = 1\nos.environ['LEFT'] = '1'\nwarnings.simplefilter('error')\n"
        "os.chdir('/')"
    )
    bench, _ = counted("one", "two", cell="import os\n" + cell)
    assert bench.run() == 0
    assert outputs(bench, "one") == outputs(bench, "two")
    assert outputs(bench, "one").startswith(f"False False None {ROOT}")


def test_a_dead_kernel_costs_the_next_one_nothing(counted):
    bench, count = counted("one", "two", "three")
    make_notebook(bench.source("two"), HEAD, "import costly, os\nos.abort()")
    assert bench.run() == 1
    statuses = [bench.manifest(name)["status"] for name in ("one", "two", "three")]
    assert statuses == ["ok", "dead-kernel", "ok"]
    assert count.read_text().count("imported") == 1


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_without_the_process_kernels_start_as_ever(counted, monkeypatch, how):
    def broken(worker, *_):
        if how == "killed":
            worker.process.kill()
            worker.process.wait()
            return fork(worker, *_)
        return None

    fork = warm.Worker.fork
    monkeypatch.setattr(warm.Worker, "fork", broken)
    bench, _ = counted("one", "two")
    assert bench.run() == 0
    assert bench.left() == []


def test_other_code_or_another_environment_is_imported_anew(monkeypatch, tmp_path):
    path = make_notebook(tmp_path / "a.ipynb", "x = 1", "import json")
    code = ["before"]
    monkeypatch.setattr(warm.plan, "lib_sha", lambda: code[0])
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with warm.Warm([path, path]) as workers:
        first = workers.ready(env)
        assert workers.ready(env | {"CUDA_VISIBLE_DEVICES": "GPU-1"}) is first  # read by a fork
        offline = workers.ready(env | {"HF_HUB_OFFLINE": "2"})
        assert offline is not first
        assert first.process.poll() is not None
        code[0] = "after"
        assert (last := workers.ready(env | {"HF_HUB_OFFLINE": "2"})) is not offline
        last.process.kill()
        last.process.wait()
        assert workers.ready(env | {"HF_HUB_OFFLINE": "2"}) is not last
        assert len(processes.marked(workers.worker.mark)) == 1
        mark = workers.worker.mark
    assert processes.marked(mark) == set()


def test_a_process_that_holds_a_gpu_is_not_forked(monkeypatch):
    assert not warm.holds_gpu()
    monkeypatch.setattr(Path, "readlink", lambda path: Path("/dev/nvidiactl"))
    assert warm.holds_gpu()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(warm.serve(theirs)))
    thread.start()
    with Path(os.devnull).open() as log:
        socket.send_fds(ours, [b"{}"], [log.fileno()])
    assert json.loads(ours.recv(64)) is None
    ours.close()
    thread.join(10)
    theirs.close()
    assert ended == [None]


ASKS = """
import sys, torch
from pathlib import Path
from lib.run import warm
asked = []
for name in ("is_available", "device_count", "_lazy_init", "get_device_properties"):
    def ask(*args, name=name, real=getattr(torch.cuda, name), **options):
        asked.append(name)
        return real(*args, **options)
    setattr(torch.cuda, name, ask)
names = warm.imports(sorted(Path("notebooks").glob("*.ipynb")))
warm.load(names)
print(asked, "lib.measure.latency" in sys.modules, "lib.stacks.graph" in sys.modules)
"""


def test_importing_all_that_notebooks_import_asks_for_no_gpu():
    """Asking how many there are opens the driver, and forks could not use them."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", ASKS], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert process.stdout.split("\n")[0] == "[] True True"
