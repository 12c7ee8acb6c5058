"""What the source must look like: who imports whom, how long, and what no file may say."""

from __future__ import annotations

import ast
import graphlib
import gzip
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "lib").rglob("*.py"))
}
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}

# What a package may import of lib, besides itself.
MEASURED = {"files", "stats", "records", "hardware", "models", "stacks"}
READ = {"files", "stats", "records", "show", "analysis"}
ALLOWED = {
    "files": set(),
    "stats": set(),
    "records": {"files"},
    "hardware": {"files", "stats"},
    "models": {"files", "records"},
    "stacks": {"models", "records"},
    "measure": MEASURED,
    "show": {"files", "stats", "records"},
    "analysis": READ,
    "studies": READ | {"studies"},
    "report": READ | {"studies"},
    "run": {"files", "records", "models", "hardware", "stacks"},
}
# Plain data of the measuring side, without torch, that the reading side reads as well.
PLAIN = {
    "lib.hardware.datasheets",
    "lib.hardware.joules",
    "lib.hardware.readouts",
    "lib.hardware.validity",
    "lib.measure.serving.arrivals",
    "lib.measure.serving.window",
    "lib.models.card",
    "lib.models.entries",
    "lib.models.formats",
    "lib.stacks.registry",
    "lib.stacks.stack",
}
READING = ("analysis", "show", "studies", "report", "records")
CUDA = {"lib.hardware.device", "lib.stacks.graph"}
NVML = {"lib.hardware.board", "lib.hardware.power_sampler", "lib.run.lease"}
TRITON = {"lib.stacks.triton_kernels"}
HEAVY = {"torch", "transformers", "accelerate", "gguf"}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imported(module: ast.Module, *, lazy: bool) -> set[str]:
    """Dotted names that a module imports, with those inside functions where `lazy`."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(module.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not typing_only and (lazy or not function):
            waiting += ast.iter_child_nodes(node)
    return found


def packages(module: ast.Module, *, lazy: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imported(module, lazy=lazy)}


def lib_imports(module: ast.Module, *, lazy: bool = True) -> set[str]:
    """The modules of lib that a module imports, by their dotted names."""
    names = {n for n in imported(module, lazy=lazy) if n == "lib" or n.startswith("lib.")}
    return {n if n in MODULES else n.rpartition(".")[0] for n in names} & MODULES.keys()


def used_by(notebook: Path) -> set[str]:
    """The modules that a notebook names: `analysis.latency.table` is of lib.analysis.latency."""
    chains = {
        f"lib.{ast.unparse(n)}" for n in ast.walk(code_of(notebook)) if isinstance(n, ast.Attribute)
    }
    return {c.rpartition(".")[0] for c in chains} & MODULES.keys()


def package(name: str) -> str:
    return (name.split(".") + [""])[1]


def closure(names: set[str], *, lazy: bool = False) -> set[str]:
    """The modules and all that they import of lib when they are imported."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += lib_imports(tree(name), lazy=lazy)
    return found


def code_of(notebook: Path) -> ast.Module:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ast.parse("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_follow_the_directions_of_the_house(name):
    own = package(name)
    if own not in ALLOWED:
        pytest.skip("the command line may import all")
    others = {x for x in lib_imports(tree(name)) if package(x) not in ("", own)}
    plain = PLAIN if own in READING else set()
    assert {x for x in others - plain if package(x) not in ALLOWED[own]} == set()


def reading() -> set[str]:
    return {name for name in MODULES if package(name) in READING}


def test_the_reading_side_needs_no_torch_and_starts_without_it():
    assert len(reading()) > 4
    for name in closure(reading()):
        assert not packages(tree(name), lazy=False) & HEAVY, name
    names = sorted(reading() | {"lib.__main__"})
    run_without(HEAVY, f"import importlib\nfor name in {names}: importlib.import_module(name)")


def run_without(names: set[str], code: str) -> None:
    """Code in an interpreter of its own that cannot import these packages."""
    start = f"""if True:
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {names}:
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
    """
    command = [sys.executable, "-c", f"{start}\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_measuring_needs_no_pydantic(tmp_path):
    """A model is loaded, timed, and its row written and read, on a machine that lacks it."""
    code = f"""if True:
        import lib.measure.latency, lib.models.load
        from lib.hardware.device import open_device
        from lib.records import store

        model = lib.models.load.load("tiny-qwen3", dtype="float32", device=open_device("cpu"))
        arm = dict(stack="hf-eager", context=4, new_tokens=2, repeats=1, seed=0, env_id=None)
        row = lib.measure.latency.arm(model, **arm)
        store.append("{tmp_path}/records.jsonl", row)
        assert len(store.load("{tmp_path}/records.jsonl")[0].samples["e2e_s"]) == 1
    """
    run_without({"pydantic"}, code)


@pytest.mark.parametrize("name", ["ape", "audit", "start", "summary"])
def test_a_notebook_that_reads_starts_without_torch(name):
    assert len(used_by(NOTEBOOKS[name])) > 3
    for module in closure(used_by(NOTEBOOKS[name])):
        assert not packages(tree(module), lazy=False) & HEAVY, f"{name} starts {module}"


def test_no_module_imports_itself_by_a_detour():
    graph = {name: lib_imports(tree(name)) - {name} for name in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("lib.records.record") < order.index("lib.records.store")


def touches_cuda(module: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"
        for node in ast.walk(module)
    ) or any(name.startswith("torch.cuda") for name in imported(module, lazy=True))


def test_one_seam_to_the_hardware():
    """The exceptions: the runner's lease lists GPUs by NVML before any kernel exists, and `capture`
    is the one function that records a CUDA graph."""
    assert {name for name in MODULES if touches_cuda(tree(name))} == CUDA
    with_nvml = {name for name in MODULES if "pynvml" in packages(tree(name))}
    assert with_nvml == NVML
    assert {name for name in MODULES if "triton" in packages(tree(name))} == TRITON
    for path in NOTEBOOKS.values():
        code = code_of(path)
        assert not touches_cuda(code) and not packages(code) & {"pynvml", *HEAVY}, path.name


def test_the_sampler_needs_nothing_of_lib():
    """It runs as a script, so that its folder comes first: no module may hide a standard one."""
    sampler = next(name for name in MODULES if name.endswith(".power_sampler"))
    assert not lib_imports(tree(sampler))
    beside = {path.stem for path in MODULES[sampler].parent.glob("*.py")}
    assert not beside & sys.stdlib_module_names


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_is_silent_and_says_what_it_is(name):
    assert ast.get_docstring(tree(name))
    calls = [n.func for n in ast.walk(tree(name)) if isinstance(n, ast.Call)]
    assert "print" not in {f.id for f in calls if isinstance(f, ast.Name)}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_public_functions_have_types(name):
    scopes = [tree(name), *(n for n in tree(name).body if isinstance(n, ast.ClassDef))]
    for scope in scopes:
        for function in scope.body:
            if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
                continue
            arguments = function.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            untyped = [a.arg for a in named if not a.annotation and a.arg not in ("self", "cls")]
            assert function.returns and not untyped, f"{function.name}: {untyped or 'no result'}"


MOST_BYTES = 24e6  # of the tracked files together: a result set is kept below 20 MB
SOURCE = ("lib", "notebooks", "params", "tests", "tools", ".ci")
# A letter in brackets, so that this file does not find itself.
UNFINISHED = re.compile(
    r"\b(T[O]DO|F[I]XME|X[X]X|H[A]CK|T[B]D|W[I]P)\b"
    r"|lorem i[p]sum|NotImplemented[E]rror|coming s[o]on"
)
# A slash inside base64 is no path: there, a letter, digit, + or / comes before it.
HOME_PATH = re.compile(r"(?<![\w+/=.~-])/(home|root|work|Users)/\w[^\s\"'<]*")
MACHINE_PATH = re.compile(r"(?<![\w+/=.~-])/(home|root|tmp|work|Users|mnt|scratch)/\w[^\s\"'<]*")


def texts(*folders: str) -> dict[str, str]:
    """Every text file of these folders and of the root, by its path."""
    paths = [p for p in ROOT.iterdir() if p.is_file()]
    paths += [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file()]
    found = {}
    for path in paths:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.name.endswith(".log.gz") else data
        if b"\0" not in data[:8000] and not {"__pycache__", ".ipynb_checkpoints"} & {*path.parts}:
            found[path.relative_to(ROOT).as_posix()] = data.decode("utf-8")
    return found


def test_nothing_is_left_unfinished():
    """The paper is quoted as it is, with a "to be determined" of its own."""
    read = {name: text for name, text in texts(*SOURCE).items() if "/published/" not in name}
    found = {name: m.group() for name, text in read.items() if (m := UNFINISHED.search(text))}
    assert found == {}


def test_no_file_names_a_folder_of_one_machine():
    read = texts(*SOURCE)
    assert "lib/files.py" in read and "Makefile" in read
    found = {name: m.group() for name, text in read.items() if (m := MACHINE_PATH.search(text))}
    assert found == {}


def test_released_results_name_no_home_folder():
    """They tell where they were measured, which may be a temporary folder, but not whose."""
    read = texts("outputs/released")
    assert "outputs/released/h100-sxm/report.html" in read
    found = {name: m.group() for name, text in read.items() if (m := HOME_PATH.search(text))}
    assert found == {}


def test_the_tracked_tree_stays_small():
    """Who clones it waits for every byte; what a release carries twice is where they hide."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True
    ).stdout.split("\0")
    sizes = {name: (ROOT / name).lstat().st_size for name in names if (ROOT / name).is_file()}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:5]
    assert sum(sizes.values()) < MOST_BYTES, {name: sizes[name] for name in largest}
