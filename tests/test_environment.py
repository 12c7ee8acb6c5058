"""The declared ranges, the lock and environment.yml agree; make finds or builds an environment."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from lib.measure.serving import kinds
from tests.browser import chromium
from tools import bootstrap, lock

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = dict(map(bootstrap.parse, bootstrap.needs(PROJECT, "test")))
LOCKS = {
    name: (ROOT / f"{name}.lock").read_text()
    for name in ("requirements", "requirements-torch", "requirements-vllm")
}
PINS = lock.pins(LOCKS["requirements"])
TORCH = lock.pins(LOCKS["requirements-torch"])
PYPI_NAME = {"pytorch": "torch"}  # conda's name -> the index's


# --- three files, one truth ------------------------------------------------------------------


def conda_ranges() -> dict[str, list[tuple[str, str]]]:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    names = [item for item in listed if isinstance(item, str)]
    names += next(item["pip"] for item in listed if isinstance(item, dict))
    ranges = dict(bootstrap.parse(item) for item in names if item != "pip")
    return {lock.canonical(PYPI_NAME.get(name, name)): bounds for name, bounds in ranges.items()}


def test_environment_yml_repeats_the_declared_ranges():
    ranges = conda_ranges()
    assert ranges.pop("python") == [(">=", PROJECT["requires-python"].removeprefix(">="))]
    assert ranges == DIRECT


def test_conda_uses_conda_forge_alone():
    channels = yaml.safe_load((ROOT / "environment.yml").read_text())["channels"]
    assert channels == ["conda-forge", "nodefaults"]


def test_every_direct_dependency_is_locked_inside_its_range():
    every = PINS | TORCH
    assert not DIRECT.keys() - every.keys()
    outside = [name for name, bounds in DIRECT.items() if not bootstrap.inside(every[name], bounds)]
    assert outside == []


def test_locks_hold_public_versions_and_torch_with_its_cuda_stands_apart():
    every = PINS | TORCH
    assert [name for name, version in every.items() if not re.fullmatch(r"[\d.]+", version)] == []
    assert [name for name in PINS if lock.BROUGHT_BY_TORCH.match(name)] == ["nvidia-ml-py"]
    assert {"torch", "triton", "nvidia-cublas"} <= TORCH.keys()
    assert [name for name in TORCH if not lock.BROUGHT_BY_TORCH.match(name)] == []


@pytest.mark.parametrize("name", sorted(LOCKS))
def test_every_file_of_a_lock_is_held_by_its_hash(name):
    found = lock.entries(LOCKS[name])
    hashed = re.compile(r"[\w.-]+==[^\\]+( \\\n    --hash=sha256:[0-9a-f]{64})+")
    assert [entry for entry in found if not hashed.fullmatch(entry)] == []
    names = list(lock.pins(LOCKS[name]))
    assert names == sorted({lock.canonical(name) for name in names})
    assert len(names) == len(found)


def test_vllm_reads_configurations_with_the_same_transformers():
    engine = lock.pins(LOCKS["requirements-vllm"])
    assert engine["transformers"] == PINS["transformers"]
    assert f"vllm=={engine['vllm']}" == lock.VLLM


def test_pins_installed_here_suit_the_first_release_of_the_oldest_python():
    too_new = {}
    for name, version in PINS.items():
        try:
            found = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        oldest = re.search(r">=\s*([\d.]+)", found["Requires-Python"] or "")
        here = found["Version"].partition("+")[0] == version
        if here and oldest and bootstrap.release(oldest[1]) > (*bootstrap.OLDEST, 0):
            too_new[name] = oldest[1]
    assert too_new == {}


def test_a_resolved_lock_is_parted_into_torch_and_all_else():
    both = (
        "jinja2==3.1.6 \\\n    --hash=sha256:aa \\\n    --hash=sha256:ab\n"
        "nvidia-cublas==13.1 ; sys_platform == 'linux' \\\n    --hash=sha256:bb\n"
        "nvidia-ml-py==13.6 \\\n    --hash=sha256:cc\n"
        "torch==2.13.0 \\\n    --hash=sha256:dd\ntorchinfo==1 \\\n    --hash=sha256:ee\n"
    )
    rest, torch = lock.apart(both, ["torch", "nvidia-ml-py"])
    assert lock.pins(rest) == {"jinja2": "3.1.6", "nvidia-ml-py": "13.6", "torchinfo": "1"}
    assert lock.pins(torch) == {"nvidia-cublas": "13.1", "torch": "2.13.0"}
    assert sorted((rest + torch).splitlines()) == sorted(both.splitlines())


def test_oldest_python_is_the_same_everywhere():
    oldest = "{}.{}".format(*bootstrap.OLDEST)
    assert PROJECT["requires-python"] == f">={oldest}"
    assert lock.OLDEST == bootstrap.OLDEST


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def sources(folder: str) -> Iterator[str]:
    yield from (path.read_text() for path in sorted((ROOT / folder).rglob("*.py")))
    for path in sorted((ROOT / folder).glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        yield "\n".join(re.sub(r"(?m)^%.*$", "", text) for text in code)


def brought(names: set[str]) -> set[str]:
    """Distributions that some distributions require outright, as far as they are installed."""
    here = {lock.canonical(x.name) for x in metadata.distributions()}
    lines = [line for name in names & here for line in metadata.requires(name) or ()]
    found = [re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]
    return {lock.canonical(name) for name in found}


@pytest.mark.parametrize("folder", ["lib", "notebooks", "tests", "tools"])
def test_every_import_is_declared(folder):
    """Declared itself, or required by what is (tokenizers by transformers)."""
    own = {"lib", "tests", "tools"}
    declared = {bootstrap.parse(item)[0] for item in PROJECT["dependencies"]}
    if folder in ("tests", "tools"):  # tools of developers run where the tests do
        declared |= DIRECT.keys()
    allowed = declared | brought(declared)
    modules = declared | {  # a distribution that is not installed here by its own name
        module
        for module, names in metadata.packages_distributions().items()
        if any(lock.canonical(name) in allowed for name in names)
    }
    used = {name for source in sources(folder) for name in imports(source)}
    # A torch for GPUs brings triton, and no other; the others run in environments of their own.
    elsewhere = {"triton", "vllm", "cosmic_ray"}
    assert used - sys.stdlib_module_names - own - modules - elsewhere == set()


# --- ranges ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.11", True),
        ("2.11.0+cu130", True),
        ("2.11.0a0+git1", True),  # vendors' containers carry such builds
        ("2.13.0", True),
        ("2.10.9", False),
        ("2.9", False),
        ("3.0", False),
        ("3", False),
    ],
)
def test_inside_compares_numbers_not_text(version, fits):
    assert bootstrap.inside(version, bootstrap.parse("torch>=2.11,<3")[1]) is fits


@pytest.mark.parametrize("text", ["torch", "torch~=2.1", "torch>=2,!=2.5", "torch[x]>=2"])
def test_a_range_that_cannot_be_compared_is_an_error(text):
    with pytest.raises(ValueError, match="not of the form"):
        bootstrap.parse(text)


def test_only_tests_need_the_extras_and_a_report_needs_no_jupyterlab():
    names = {
        purpose: {bootstrap.parse(item)[0] for item in bootstrap.needs(PROJECT, purpose)}
        for purpose in ("report", "lab", "test")
    }
    assert names["lab"] - names["report"] == {"jupyterlab", "itables"}
    assert names["test"] - names["lab"] == {
        "pytest",
        "pytest-xdist",
        "ruff",
        "playwright",
        "axe-playwright-python",
        "fastapi",
        "uvicorn",
        "openai",
    }


def test_tests_have_what_transformers_serve_needs():
    """Its tests then run wherever tests do, instead of being skipped."""
    needed = set(kinds.KINDS["transformers"].needs) - {"transformers"}
    extra = PROJECT["optional-dependencies"]["serve"]
    assert needed == {bootstrap.parse(item)[0] for item in extra} <= DIRECT.keys()


def test_problems_name_what_is_missing_and_what_is_too_old(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["pytest>=1,<999", "pytest>=999", "no-such-thing>=1"]\n'
    )
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    version = metadata.version("pytest")
    assert bootstrap.problems("lab") == [f"pytest>=999 (has {version})", "no-such-thing>=1"]


def test_the_finder_can_be_read_by_an_old_python():
    ast.parse((ROOT / "tools/bootstrap.py").read_text(), feature_version=(3, 8))


# --- choosing and building, with fake interpreters ---------------------------------------------

FAKE = """#!/bin/sh
# Answers like a Python {version}; what it lacks and how pip ends are in files beside the project.
echo "$0 $*" >> {root}/calls
case "$1" in
    -c) echo '{{"version": {numbers}, "venv": {venv}, "executable": "'$0'"}}' ;;
    -m) case "$2" in
        venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
        pip) sh {root}/pip "$@" ;;
        esac ;;
    *) cat "$0.lacks" 2>/dev/null || echo '[]' ;;
esac
"""


class Sandbox:
    """A copy of the finder in an empty project, and a PATH that holds only fakes."""

    def __init__(self, root: Path):
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        (root / "tools").mkdir()
        shutil.copy(ROOT / "tools/bootstrap.py", root / "tools/bootstrap.py")
        (root / "requirements.lock").write_text("jinja2==3.1.6\n")
        (root / "requirements-torch.lock").write_text("torch==2.13.0\n")
        self.torch = "2.13.0"
        self.pip("exit 0")
        self.venv_python = str(root / ".venv/bin/python")

    def python(self, name="python3", *, version="3.12.1", lacks=(), venv=True) -> str:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = [int(part) for part in version.split(".")]
        path.write_text(
            FAKE.format(version=version, root=self.root, numbers=numbers, venv=json.dumps(venv))
        )
        path.chmod(0o755)
        Path(f"{path}.lacks").write_text(json.dumps(list(lacks)))
        return str(path)

    def pip(self, script: str) -> None:
        """What the fakes' pip does, as shell. Asked for torch, it finds `self.torch` first."""
        found = json.dumps({"install": [{"metadata": {"version": self.torch}}]})
        answer = f"""case "$*" in *--dry-run*) while [ "$1" != --report ]; do shift; done
            echo '{found}' > "$2"; exit ;; esac\n"""
        (self.root / "pip").write_text(answer + script)

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen:
        # The tools of the fakes' own scripts come last, and no real Python is among them.
        tools = self.root / "sh"
        tools.mkdir(exist_ok=True)
        for name in ("sh", "mkdir", "cp", "cat", "sleep"):
            if not (tools / name).exists():
                (tools / name).symlink_to(shutil.which(name))
        return subprocess.Popen(
            [sys.executable, "tools/bootstrap.py", *arguments],
            cwd=self.root,
            env={"PATH": f"{self.bin}:{tools}", **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def find(self, *arguments: str, **environ: str) -> tuple[int, str, str]:
        process = self.start(*(arguments or ("report",)), **environ)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        return process.returncode, out.strip(), " ".join(err.split())

    def installs(self) -> int:
        return (self.root / "calls").read_text().count("/requirements.lock")


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def test_the_active_environment_is_used_where_it_will_do(sandbox):
    python = sandbox.python()
    assert sandbox.find()[:2] == (0, python)
    assert not (sandbox.root / ".venv").exists()


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_activated_environment_comes_before_python3(sandbox, variable):
    sandbox.python()
    python = sandbox.python("own/bin/python")
    assert sandbox.find(**{variable: str(sandbox.bin / "own")})[:2] == (0, python)


def test_otherwise_the_lock_is_installed_once(sandbox):
    sandbox.python(lacks=["torch>=2.11,<3"])
    status, python, said = sandbox.find()
    assert (status, python) == (0, sandbox.venv_python)
    assert "(Python 3.12.1) lacks torch>=2.11,<3 building .venv" in said
    assert sandbox.find()[:2] == (0, python)
    assert sandbox.find("test")[:2] == (0, python)
    assert sandbox.installs() == 1


def test_the_environment_finds_lib_without_being_installed(sandbox):
    sandbox.python(lacks=["torch"])
    sandbox.find()
    (added,) = (sandbox.root / ".venv/lib/python3.12/site-packages").glob("*.pth")
    assert added.read_text().strip() == str(sandbox.root)


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-torch.lock"])
def test_a_changed_lock_builds_anew(sandbox, name):
    sandbox.python(lacks=["torch"])
    sandbox.find()
    (sandbox.root / ".venv/leftover").touch()
    (sandbox.root / name).write_text("torch==2.14.0\n")
    assert sandbox.find()[0] == 0
    assert sandbox.installs() == 2
    assert not (sandbox.root / ".venv/leftover").exists()
    assert not (sandbox.root / ".venv.old").exists()


def test_a_failed_rebuild_keeps_the_environment_before_it(sandbox):
    sandbox.python(lacks=["torch"])
    sandbox.find()
    (sandbox.root / ".venv/leftover").touch()
    (sandbox.root / "requirements.lock").write_text("torch==2.14.0\n")
    sandbox.pip("echo 'ERROR: disk full'; exit 1")
    status, out, said = sandbox.find()
    assert (status, out) == (1, "")
    assert "ERROR: disk full" in said
    assert "PYTHON=.venv/bin/python uses it" in said
    assert (sandbox.root / ".venv/leftover").exists()
    # Its stamp is that of the old lock, so that it does not count as ready for the new one.
    sandbox.pip("exit 0")
    assert sandbox.find()[0] == 0
    assert sandbox.installs() == 3


def test_an_environment_that_was_moved_is_built_anew(sandbox, tmp_path_factory):
    sandbox.python(lacks=["torch"])
    sandbox.find()
    stamp = sandbox.root / ".venv" / bootstrap.STAMP
    stamp.write_text(stamp.read_text().replace(str(sandbox.root), "/elsewhere"))
    assert sandbox.find()[0] == 0
    assert sandbox.installs() == 2


def test_no_file_is_taken_that_a_lock_does_not_name(sandbox):
    sandbox.python(lacks=["torch"])
    assert sandbox.find()[0] == 0
    calls = (sandbox.root / "calls").read_text().splitlines()
    installs = [line for line in calls if "pip install" in line and "--dry-run" not in line]
    assert [line.rpartition("/")[2] for line in installs] == [
        "requirements.lock", "requirements-torch.lock",
    ]  # fmt: skip
    assert [line for line in installs if "--require-hashes --no-deps" not in line] == []


def test_a_build_of_torch_from_an_index_that_the_user_named_is_taken_and_said(sandbox):
    sandbox.python(lacks=["torch"])
    sandbox.torch = "2.13.0+cpu"
    sandbox.pip("exit 0")
    status, _, said = sandbox.find()
    assert (status, "torch 2.13.0+cpu is of another index than PyPI" in said) == (0, True)
    calls = (sandbox.root / "calls").read_text()
    assert "requirements-torch.lock" not in calls
    assert "--progress-bar off torch==2.13.0+cpu\n" in calls


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE FILE",
            "the index gave another file than the lock names",
        ),
        (
            "WARNING: Retrying: Temporary failure in name resolution",
            "could not reach a package index",
        ),
    ],
)
def test_what_kept_pip_from_its_files_is_said_in_one_paragraph(sandbox, line, says):
    sandbox.python(lacks=["torch"])
    sandbox.pip(f"echo '{line}'; exit 1")
    status, out, said = sandbox.find()
    assert (status, out) == (1, "")
    assert says in said
    assert not (sandbox.root / ".venv").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_does_not_count_as_ready(sandbox, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    sandbox.python(lacks=["torch"])
    sandbox.pip(
        "echo x > $(dirname $0)/started; sleep 60".replace("$(dirname $0)", str(sandbox.root))
    )
    process = sandbox.start("report")
    for _ in range(200):
        if (sandbox.root / "started").exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert out == ""
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert "interrupted" in err
        assert not (sandbox.root / ".venv").exists()
    sandbox.pip("exit 0")
    assert sandbox.find()[:2] == (0, sandbox.venv_python)
    assert sandbox.installs() == 2


STEERING = {
    "PIP_TARGET": "/elsewhere",
    "PIP_PREFIX": "/elsewhere",
    "PIP_ROOT": "/elsewhere",
    "PIP_PYTHON": "/elsewhere/python",
    "PIP_CONSTRAINT": "/elsewhere/constraints.txt",
    "PIP_REQUIREMENT": "/elsewhere/more.txt",
    "PIP_EDITABLE": "/elsewhere",
    "PIP_NO_BINARY": ":all:",
    "PIP_PLATFORM": "win32",
    "PIP_PYTHON_VERSION": "3.8",
    "PIP_REPORT": "/elsewhere/report",
    "PIP_QUIET": "3",
    "PIP_UPGRADE": "1",
    "PIP_IGNORE_INSTALLED": "1",
}


def test_no_setting_of_pip_says_what_is_installed_or_where_to(sandbox):
    sandbox.python(lacks=["torch"])
    sandbox.pip(f"set >> {sandbox.root}/variables")
    named = {"PIP_INDEX_URL": "a", "PIP_FIND_LINKS": "b", "PIP_CONFIG_FILE": "c"}
    off = dict.fromkeys(f"PIP_{name}" for name in bootstrap.OVERRULED)
    assert sandbox.find(**STEERING, **named, **dict.fromkeys(off, "1"))[0] == 0
    lines = (sandbox.root / "variables").read_text().splitlines()
    seen = {line.partition("=")[0]: line.partition("=")[2].strip("'") for line in lines}
    assert not seen.keys() & STEERING.keys()
    assert {name: seen[name] for name in named} == named
    assert {seen[name] for name in off} == {"0"}


def test_an_environment_that_lacks_packages_after_pip_is_not_ready(sandbox):
    """Such as one whose packages went to the `target` of a configuration file."""
    sandbox.python(lacks=["torch"])
    sandbox.pip(f"echo '[\"torch>=2.11,<3\"]' > {sandbox.root}/.venv/bin/python.lacks")
    status, out, said = sandbox.find()
    assert (status, out) == (1, "")
    assert "yet .venv lacks torch>=2.11,<3. A setting of pip sends packages elsewhere" in said
    assert not (sandbox.root / ".venv").exists()


HALF = {  # what may stand in place of .venv, and whether it is ours to replace
    "an empty folder": (lambda path: path.mkdir(), True),
    "a folder whose build was killed": (
        lambda path: stamped(path, '{"lock": null, "path": "x"}'),
        True,
    ),
    "a stamp that is a list": (lambda path: stamped(path, "[]"), False),
    "a stamp without sense": (lambda path: stamped(path, "{}"), False),
    "half a stamp": (lambda path: stamped(path, '{"lock'), False),
    "a file": (lambda path: path.write_text("x"), False),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), False),
}


def stamped(path: Path, text: str) -> None:
    path.mkdir()
    (path / bootstrap.STAMP).write_text(text)


@pytest.mark.parametrize("case", HALF)
def test_what_is_no_whole_environment_is_built_anew_or_told(sandbox, case):
    sandbox.python(lacks=["torch"])
    make_it, ours = HALF[case]
    make_it(sandbox.root / ".venv")
    status, _, said = sandbox.find()
    assert status == (0 if ours else 1)
    assert ours or "was not made by make" in said
    assert ours or os.path.lexists(sandbox.root / ".venv")


def test_a_finished_environment_needs_nothing_written(sandbox):
    sandbox.python(lacks=["torch"])
    assert sandbox.find()[0] == 0
    (sandbox.root / ".venv.lock").unlink()
    (sandbox.root / ".venv.lock").mkdir()  # cannot be opened, whoever the user
    assert sandbox.find()[0] == 0


def test_a_folder_that_cannot_be_written_is_one_paragraph(sandbox):
    sandbox.python(lacks=["torch"])
    (sandbox.root / ".venv.lock").mkdir()
    status, out, said = sandbox.find()
    assert (status, out) == (1, "") and ".venv.lock: Is a directory" in said


def test_an_interpreter_that_talks_at_its_start_is_asked_all_the_same(sandbox):
    path = Path(sandbox.python())
    path.with_name("python3.lacks").write_text("sitecustomize says hello\n[]")
    assert sandbox.find()[:2] == (0, str(path))
    path.with_name("python3.lacks").write_text("no JSON")
    assert "lacks an interpreter that works (no JSON)" in sandbox.find()[2]


def test_a_venv_made_by_somebody_else_is_never_deleted(sandbox):
    sandbox.python(lacks=["torch"])
    sandbox.python("../.venv/bin/python", lacks=["scipy>=1.11,<2"])
    status, _, said = sandbox.find()
    assert status == 1
    assert "was not made by make, and lacks scipy" in said
    assert Path(sandbox.venv_python).exists()
    sandbox.python("../.venv/bin/python")
    assert sandbox.find()[0] == 0
    assert sandbox.installs() == 0


def test_python_given_is_used_or_refused_but_never_replaced(sandbox):
    sandbox.python()
    own = sandbox.python("own", lacks=["pandas>=2.2,<4 (has 1.5)"])
    status, _, said = sandbox.find("report", "--python", own)
    assert status == 1
    assert "lacks pandas>=2.2,<4 (has 1.5)" in said
    own = sandbox.python("own")
    assert sandbox.find("report", "--python", own)[:2] == (0, own)
    status, _, said = sandbox.find("report", "--python", "/no/such/python")
    assert status == 1
    assert "PYTHON=/no/such/python does not start" in said
    old = sandbox.python("old", version="3.9.2")
    status, _, said = sandbox.find("report", "--python", old)
    assert status == 1
    assert "Python 3.9.2" in said
    assert "3.11 or newer" in said


def test_an_old_python3_gives_way_to_a_newer_one_on_path(sandbox):
    sandbox.python(version="3.9.2")
    sandbox.python("python3.12", version="3.12.4")
    assert sandbox.find()[:2] == (0, sandbox.venv_python)
    assert f"{sandbox.bin}/python3.12 -m venv" in (sandbox.root / "calls").read_text()


def test_no_python_new_enough_is_one_paragraph(sandbox):
    sandbox.python(version="3.9.2")
    status, _, said = sandbox.find()
    assert status == 1
    assert "Python 3.11 or newer is needed" in said
    assert "(Python 3.9.2)" in said


def test_a_python_without_venv_names_the_package_to_install(sandbox):
    sandbox.python(version="3.11.2", venv=False)
    Path(f"{sandbox.bin}/python3.lacks").write_text('["torch"]')
    status, _, said = sandbox.find()
    assert status == 1
    assert "apt-get install python3.11-venv" in said
    sandbox.python("python3.13", version="3.13.0")
    assert sandbox.find()[0] == 0


# --- make, git, CI, browser --------------------------------------------------------------------


FIT = {"MODEL", "GPU_GB", "DTYPE", "BANDWIDTH_GB_S", "CONTEXT"}


def make(*arguments: str) -> subprocess.CompletedProcess:
    # The tests may run under make themselves; its flags and variables are not for this one.
    variables = {"PROFILE", "MODELS", "NOTEBOOKS", "WEIGHTS", "STACK", "FROM", "FORCE", "PYTHON"}
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in variables | FIT | {"ARGS"} and not name.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env=inherited,
        capture_output=True,
        text=True,
    )


def test_help_is_the_default_and_lists_every_target():
    said = make().stdout
    assert said == make("help").stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert re.findall(r"^  make (\S+) +\S", said, re.M) == phony


def recipe(*arguments: str) -> str:
    return " ".join(make("-n", *arguments).stdout.replace("\\\n", " ").split())


def test_report_passes_its_variables_on():
    assert 'lib report --profile "demo"' in recipe("report")
    sliced = recipe("report", "PROFILE=gpu", "MODELS=Qwen/Qwen3-8B", "STACK=graph", "FORCE=1")
    assert '--profile "gpu" --models "Qwen/Qwen3-8B" --stack "graph" --force' in sliced
    assert "--force" not in recipe("report", "FORCE=0")


def test_jobs_pass_their_variables_on():
    assert '--jobs "2"' in recipe("report", "JOBS=2") and "--jobs" not in recipe("report")
    full = recipe("jobs", "PROFILE=gpu", "FORMAT=k8s", "IMAGE=a/b:1", "GPU=H100", "OUT=x")
    assert 'lib jobs --profile "gpu" ' in full
    assert '--out "x" --format "k8s" --gpu "H100" --image "a/b:1"' in full
    engine = recipe("jobs", "ENGINE=slurm", "ARGS=--dry-run -n")
    assert engine.endswith('--engine "slurm" -- --dry-run -n')


def test_fit_passes_its_variables_on():
    short = recipe("fit", "MODEL=Qwen/Qwen3-8B", "GPU_GB=24")
    assert short.endswith('lib fit --model "Qwen/Qwen3-8B" --gpu-gb "24"')
    values = {"DTYPE": "4-bit", "BANDWIDTH_GB_S": "3350", "CONTEXT": "512,1024"}
    full = recipe("fit", *(f"{name}={value}" for name, value in values.items()), "ARGS=--json")
    assert full.endswith(
        'lib fit --dtype "4-bit" --bandwidth-gb-s "3350" --context "512,1024" --json'
    )


def test_versus_passes_its_variables_on():
    short = recipe("versus", "A=python3", "B=new:other", "MODEL=Qwen3-32B")
    assert short.endswith('lib versus "python3" "new:other" --model "Qwen3-32B"')
    values = {"WEIGHTS": "checkpoint", "DTYPE": "float16", "CONTEXT": "512", "NEW_TOKENS": "32"}
    values |= {"CALLS": "6", "ROUNDS": "2", "EFFECT": "3", "TIMEOUT": "300", "OUT": "outputs/x"}
    full = recipe("versus", *(f"{name}={value}" for name, value in values.items()))
    assert full.endswith(
        'lib versus --weights "checkpoint" --dtype "float16" --context "512" --new-tokens "32" '
        '--calls "6" --rounds "2" --effect "3" --timeout "300" --out "outputs/x"'
    )
    assert recipe("versus", "FROM=outputs/x", "A=y").endswith('lib versus --from "outputs/x"')


def test_plan_and_score_pass_their_variables_on():
    said = recipe("plan", "GPU=NVIDIA H200", "CONTEXT=512")
    assert said.endswith('lib plan --gpu "NVIDIA H200" --context "512"')
    assert recipe("score").endswith("lib score")
    said = recipe("score", "FROM=outputs/a outputs/b", "OUT=outputs/c")
    assert said.endswith('lib score outputs/a outputs/b --out "outputs/c"')


def test_report_from_records_measures_nothing():
    command = recipe("report", "FROM=outputs/released/h100-sxm", "MODELS=x")
    assert command.endswith('lib report --from "outputs/released/h100-sxm"')


NASTY = [  # each would write a file `bad` if make or the shell evaluated it
    "$(touch bad)",
    "$(shell touch bad)",
    "$$(touch bad)",
    "${shell touch bad}",
    "`touch bad`",
    "; touch bad",
    "& touch bad",
    "| touch bad",
    "> bad",
    '"; touch bad; "',
    "'; touch bad; '",
    "''; touch bad",
    '"$(touch bad)"',
    "\\; touch bad",
    '\\"; touch bad; \\"',
    "x\ntouch bad",
    "# $(shell touch bad)",
]


def make_with(sandbox: Sandbox, target: str, value: str, *more: str, env: bool = False) -> None:
    """Run a target with the value in every variable, by a fake Python that does nothing."""
    names = re.search(
        r"^override VARIABLES := (.*?[^\\])$", (ROOT / "Makefile").read_text(), re.M | re.S
    )[1]
    pairs = {n: value for n in names.replace("\\", "").split() if n not in ("PYTHON", "FORCE")}
    environ = {"PATH": os.environ["PATH"]} | (pairs if env else {})
    others = ("X", "given", "VARIABLES", "PATH_", "a:b")  # of no target, or of the Makefile itself
    given = [] if env else [f"{n}={v}" for n, v in (pairs | dict.fromkeys(others, value)).items()]
    command = ["make", target, f"PYTHON={sandbox.bin / 'python3'}", *given, *more]
    subprocess.run(command, cwd=sandbox.root, env=environ, capture_output=True)
    assert not (sandbox.root / "bad").exists()


@pytest.fixture
def project(sandbox):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, sandbox.root / name)
    sandbox.python()
    return sandbox


@pytest.mark.parametrize("value", NASTY)
def test_what_a_variable_holds_is_text_and_arrives_as_it_is(project, value):
    make_with(project, "report", value, "FROM=")
    make_with(project, "bundle", value)
    if "\n" not in value:
        assert f"--models {value} --notebooks {value}" in (project.root / "calls").read_text()


@pytest.mark.parametrize("value", ["$(shell touch bad); touch bad", "'; touch bad; '"])
def test_no_target_evaluates_a_variable(project, value):
    for target in (
        "merge",
        "jobs",
        "compare",
        "fit",
        "audit",
        "clients",
        "test",
        "kill-tests",
        "mutants",
        "lock",
        "versus",
        "export",
        "plan",
        "score",
        "vllm",
        "sweep",
    ):
        make_with(project, target, value)
    make_with(project, "report", value, "FROM=", env=True)
    make_with(project, "fit", value, env=True)


def test_a_variable_of_no_target_goes_on_to_what_a_target_runs(project):
    python = project.bin / "python3"
    python.write_text(f'#!/bin/sh\necho "$CHROMIUM" >> "{project.root / "seen"}"\n')
    command = ["make", "test", f"PYTHON={python}", "CHROMIUM=/a b$(x)", "PATH=/usr/bin:/bin"]
    subprocess.run(command, cwd=project.root, capture_output=True)
    assert "/a b$(x)" in (project.root / "seen").read_text().splitlines()


def test_make_runs_in_the_interpreter_that_was_found(sandbox):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, sandbox.root / name)
    python = sandbox.python()
    run = subprocess.run(
        ["make", "report", f"PYTHON={python}"], cwd=sandbox.root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert f"{python} -m lib report --profile demo" in (sandbox.root / "calls").read_text()


def test_git_ignores_results_but_not_the_released_ones(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    ignored = [
        "outputs/demo/report.html",
        "outputs/rebuilt/report.html",
        "outputs/paper/m/random-hf-eager/latency/run.json",
        "outputs/released/h100-sxm/notebook.ipynb.partial",
        ".venv/bin/python",
        ".venv.old/bin/python",
        "lib/__pycache__/stats.pyc",
    ]
    kept = [
        "lib/stats.py",
        "lib/templates/report.html",
        "outputs/released/h100-sxm/x",
        "outputs/released/h100-sxm/traces/power.jsonl.gz",
        "requirements.lock",
        "requirements-torch.lock",
        ".ci/run",
    ]
    answer = subprocess.run(
        ["git", "-C", str(tmp_path), "check-ignore", *ignored, *kept],
        capture_output=True,
        text=True,
    )
    assert answer.stdout.split() == ignored


def test_ci_requires_a_browser_and_slurm_and_calls_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    required = "\nexport WORKBOOK_REQUIRE_BROWSER=1 WORKBOOK_REQUIRE_SLURM=1\n"
    steps = [required, "\nmake test\n", "\nmake lint\n"]
    assert sorted(map(text.index, steps)) == list(map(text.index, steps))


def outcome(**environ: str) -> str:
    # A skip that escaped would skip this test and so hide the error.
    try:
        return chromium(environ)
    except pytest.skip.Exception as raised:
        return f"skipped: {raised.msg}"
    except pytest.fail.Exception as raised:
        return f"failed: {raised.msg}"


def test_a_missing_browser_skips_here_and_fails_where_one_is_required(tmp_path):
    path = str(tmp_path)
    assert outcome(PATH=path).startswith("skipped: no chromium")
    assert outcome(PATH=path, WORKBOOK_REQUIRE_BROWSER="1").startswith("failed: a browser is")
    program = tmp_path / "chromium-browser"
    program.touch(mode=0o755)
    assert outcome(PATH=path) == str(program)
    assert outcome(PATH=path, CHROMIUM="/no/such").startswith("skipped: CHROMIUM=/no/such")
