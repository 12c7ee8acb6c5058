"""What the source must look like: who imports whom, how long, and what no file may say."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: path for path in sorted((ROOT / "lib").glob("[!_]*.py"))}
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}

# What the reading side, from rows to a report, on any laptop, starts from; the rest it imports.
ROOTS = {
    "report",
    "tables",
    "plots",
    "claims",
    "ape",
    "roofline",
    "ablations",
    "manifest",
    "tally",
    "compare",
    "bundle",
    "money",
}
RUNNER = {"run", "kernels", "lease", "merge", "portable", "preflight", "processes", "staging"}
MEASURING = {
    "ceilings",
    "device",
    "models",
    "decode",
    "dryrun",
    "latency",
    "memory",
    "energy",
    "quantised",
    "rehearsal",
    "session",
    "state",
    "prompts",
    "tracing",
    "occupancy",
    "storages",
    "stretches",
    "forecast",
    "held",
    "board",
    "windows",
    "blocks",
    "instrument",
    "weightvalues",
    "peer_zeus",
    "batching",
}
PRIMITIVES = {"latency", "memory", "energy", "tracing"}

# Modules whose imports of lib the design settles; latency also loads the model of an arm.
ARROWS = {
    "records": set(),
    "stats": set(),
    "strict_yaml": set(),
    "signatures": {"strict_yaml"},
    "params": {"signatures", "strict_yaml"},
    "prompts": set(),
    "device": {"board", "host", "occupancy", "profiled"},
    "host": set(),
    "occupancy": {"storages"},
    "storages": set(),
    "profiled": set(),
    "board": set(),
    "joules": set(),
    "gates": {"joules", "stats"},
    "experts": set(),
    "forecast": {"experts", "storages"},
    "stretches": set(),
    "held": {"records"},
    "groups": {"params", "records"},
    "ledger": {"grid", "groups", "records", "shown"},
    "decoded": set(),
    "capture": set(),
    "dryrun": set(),
    "state": {"card", "dryrun"},
    "stored": {"card"},
    "quantised": {"card"},
    "rehearsal": {"decoded", "dryrun", "experts"},
    "generate": {"decoded", "dryrun"},
    "graphs": {"capture", "decoded", "dryrun", "experts", "rehearsal"},
    "fused": {"decoded", "tiles"},
    "tiles": set(),
    "decode": {"decoded", "experts", "fused", "generate", "graphs", "rehearsal"},
    "gate": {"decode", "experts", "records", "session"},
    "ceilings": {"device", "records"},
    "ablations": {"records"},
    "session": {"prompts", "records"},
    "memory": {"card", "decode", "device", "experts", "forecast", "held", "progress", "records",
               "session", "shown", "stretches"},
    "windows": {"device"},
    "readouts": {"joules"},
    "instrument": {"readouts", "records"},
    "blocks": {"gates", "records", "windows"},
    "energy": {"blocks", "decode", "gates", "joules", "progress", "records", "session", "stats",
               "windows"},
    "latency": {
        "card", "decode", "device", "experts", "forms", "gate", "models", "progress", "records",
        "session", "stats"
    },
    "stacks": {"decode", "gate", "latency", "progress", "records"},
    "batching": {"blocks", "decode", "energy", "gate", "latency", "models", "progress", "records",
                 "tracing"},
    "tracing": {"card", "counting", "decode", "experts", "progress", "records", "session"},
}  # fmt: skip
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
    return {name.split(".")[1] for name in imported(module, lazy=lazy) if name.startswith("lib.")}


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


READING = closure(ROOTS, lazy=True)


def test_the_reading_side_knows_no_measuring_module():
    assert {"records", "stats", "params", "strict_yaml", "findings", "papertables"} <= READING
    assert not READING & (MEASURING | RUNNER)


@pytest.mark.parametrize("name", sorted(READING))
def test_the_reading_side_needs_no_torch(name):
    assert not packages(tree(name)) & HEAVY


def test_the_reading_side_and_the_runner_start_where_torch_cannot_be_imported():
    names = sorted(READING | RUNNER)
    code = f"""if True:
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {HEAVY}:
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
        from lib import {", ".join(names)}
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["ape", "audit", "start", "summary"])
def test_a_notebook_that_reads_starts_without_torch(name):
    for module in closure(lib_imports(code_of(NOTEBOOKS[name]))):
        assert not packages(tree(module), lazy=False) & HEAVY, f"{name} starts lib.{module}"


def test_no_module_imports_itself_by_a_detour():
    graph = {name: lib_imports(tree(name)) for name in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("records") < order.index("tables") < order.index("report")


@pytest.mark.parametrize("name", sorted(ARROWS))
def test_the_arrows_of_the_design(name):
    assert lib_imports(tree(name)) <= ARROWS[name]


def test_no_primitive_knows_another_nor_the_reading_side():
    for name in PRIMITIVES:
        known = closure({name}, lazy=True)
        assert known & PRIMITIVES == {name}
        # A card is plain data that a record holds: both sides read it, and so are traces of power.
        shared = {
            "card",
            "forms",
            "records",
            "stats",
            "joules",
            "gates",
            "params",
            "shown",
            "signatures",
            "strict_yaml",
        }
        assert known & READING <= shared


def touches_cuda(module: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"
        for node in ast.walk(module)
    ) or any(name.startswith("torch.cuda") for name in imported(module, lazy=True))


def test_one_seam_to_the_hardware():
    """The exceptions: the runner's lease lists GPUs by NVML before any kernel exists, and `capture`
    is the one function that records a CUDA graph."""
    assert {name for name in MODULES if touches_cuda(tree(name))} == {"device", "capture"}
    with_nvml = {name for name in MODULES if "pynvml" in packages(tree(name))}
    assert with_nvml == {"board", "power_sampler", "lease"}
    assert {name for name in MODULES if "triton" in packages(tree(name))} == {"tiles"}
    for path in NOTEBOOKS.values():
        code = code_of(path)
        assert not touches_cuda(code) and not packages(code) & {"pynvml", *HEAVY}, path.name


def test_the_sampler_needs_nothing_of_lib():
    """It runs as a script, so that its folder comes first: no module may hide a standard one."""
    assert not lib_imports(tree("power_sampler"))
    assert not MODULES.keys() & sys.stdlib_module_names


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


SOURCE = ("lib", "notebooks", "params", "tests", "tools", ".ci")
UNFINISHED = re.compile(
    r"\b(" + "|".join(["TODO", "FIXME", "XXX", "HACK", "TBD", "WIP"]) + r")\b"
    r"|lorem ips"
    r"um|NotImplemented"
    r"Error|coming so"
    r"on"
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
    assert "lib/run.py" in read and "Makefile" in read
    found = {name: m.group() for name, text in read.items() if (m := MACHINE_PATH.search(text))}
    assert found == {}


def test_released_results_name_no_home_folder():
    """They tell where they were measured, which may be a temporary folder, but not whose."""
    read = texts("outputs/released")
    assert "outputs/released/h100-sxm/report.html" in read
    found = {name: m.group() for name, text in read.items() if (m := HOME_PATH.search(text))}
    assert found == {}
