"""How many small faults in the arithmetic the nearest tests notice.

    make mutants [ARGS="--sample 150 --seed 1"] [ARGS="lib/stats.py"]

tools/mutants.yaml says which modules are meant, which tests are the nearest, and which mutants are
equivalent and why. Cosmic Ray, in an environment of its own (.venv-mutants), makes the mutants: one
comparison, operator or constant changed. Each is tried in a forked process, which imports it in
place of the module and runs the tests until one fails; no file is changed. A mutant that takes ten
times as long as the tests, and 20 s, counts as killed. Exits with 1 where less than 85 % of those
that are not equivalent were killed, and with 2 where the tests fail without a mutant or one that is
listed does not exist.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "tools" / "mutants.yaml"
VENV = ROOT / ".venv-mutants"
LEAST = 0.85
MEMORY_BYTES = 16 * 2**30  # of address space, for mutants that count to no end
# Of Cosmic Ray's operators those whose faults are near: a bound, a sign, the opposite. Not
# BitOr: nearly all of it joins types, which nothing evaluates.
COMPARISONS = (
    "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_GtE LtE_Gt Gt_LtE GtE_Lt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
)
ARITHMETIC = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Div Mod_Div Pow_Mul BitAnd_BitOr"
OPERATORS = (
    *(f"ReplaceComparisonOperator_{pair}" for pair in COMPARISONS.split()),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ARITHMETIC.split()),
    *("ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_Not"),
    *("ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
)
# What the tests import of other packages, before the fork and so once.
PACKAGES = ("pytest", "scipy.stats", "pandas", "matplotlib.pyplot", "torch")
Faults = dict[str, list[dict[str, Any]]]  # by module: line, text of the line was and now, source


# --- in the environment of Cosmic Ray ----------------------------------------------------------


def faults(module: str) -> list[dict[str, Any]]:
    """Every mutant of a module: its line, that line was and now, and the whole source."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    operators = [get_operator(f"core/{name}")() for name in OPERATORS]
    source, mutants, before = (ROOT / module).read_text(encoding="utf-8"), [], ""
    for part in (child.get_code() for child in get_ast(source).children):
        nodes, after = list(ast_nodes(get_ast(part))), source[len(before) + len(part) :]
        for operator in operators:
            places = [(n, start) for n in nodes for start, _ in operator.mutation_positions(n)]
            for occurrence, (node, (line, _)) in enumerate(places):
                if node.parent and node.parent.type == "parameters":
                    continue  # the star of a signature, which is no product
                text = mutate_code(part, operator, occurrence)
                was, now = (lines.splitlines()[line - 1].strip() for lines in (part, text))
                place = {"line": before.count("\n") + line, "was": was, "now": now}
                mutants.append(place | {"text": before + text + after})
        before += part
    return mutants


def all_faults(modules: list[str]) -> Faults:
    """`faults` of modules, by Cosmic Ray's own environment, which is made where there is none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["optional-dependencies"]["mutants"]
    python = str(VENV / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    for command in ([sys.executable, "-m", "venv", str(VENV)], pip):
        if subprocess.run(command).returncode != 0:
            fail(f"{' '.join(wanted)} was not installed in {VENV}: see above, then run it again")
    command = [python, str(Path(__file__)), "--make", *modules]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def fail(why: str) -> NoReturn:
    """End with status 2 and one line."""
    print(f"mutants: {why}", file=sys.stderr)
    raise SystemExit(2)


# --- in the environment of the tests -----------------------------------------------------------


class Mutant(importlib.machinery.SourceFileLoader):
    """Finds and loads one module, from other text than its file's."""

    def __init__(self, module: str, text: str) -> None:
        super().__init__(module.removesuffix(".py").replace("/", "."), str(ROOT / module))
        self.text = text

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return importlib.util.spec_from_file_location(name, self.path, loader=self)
        return None

    def get_code(self, fullname):
        return compile(self.text, self.path, "exec")


def in_fork(module: str, text: str, tests: list[str]) -> None:
    """Run tests with the module from this text, and end the process with their status."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # half of the start
    sys.meta_path.insert(0, Mutant(module, text))
    import pytest

    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def passes(module: str, text: str, tests: list[str], limit_s: float) -> bool:
    """Whether tests pass, and in time, with the module from this text."""
    process = multiprocessing.get_context("fork").Process(
        target=in_fork, args=(module, text, tests)
    )
    process.start()
    process.join(limit_s)
    process.kill()
    process.join()
    return process.exitcode == 0


def survivors(module: str, mutants: list[dict[str, Any]], tests: list[str]) -> list[dict[str, Any]]:
    """Mutants that the tests pass with. Raises SystemExit where they fail without any."""
    start_s = time.monotonic()
    if not passes(module, (ROOT / module).read_text(encoding="utf-8"), tests, 600):
        fail(f"{module}: {' '.join(tests)} fail without a mutant; mend them first")
    limit_s, alive = max(20.0, 10 * (time.monotonic() - start_s)), []
    for mutant in mutants:
        if passes(module, mutant["text"], tests, limit_s):
            alive.append(mutant)
            print(f"{module}:{mutant['line']}: {mutant['was']}  ->  {mutant['now']}", flush=True)
    return alive


def split(module: str, mutants: list[dict], listed: list[dict[str, str]]) -> tuple[list, list]:
    """Mutants to try, and those that are listed as equivalent. Raises SystemExit where one that is
    listed is none."""
    lines = {(mutant["was"], mutant["now"]) for mutant in mutants}
    equivalent = {(entry["was"], entry["now"]) for entry in listed}
    for was, now in equivalent - lines:
        fail(f"{module} has no mutant {was!r} -> {now!r}: take it out of {SETTINGS.name}")
    same = [mutant for mutant in mutants if (mutant["was"], mutant["now"]) in equivalent]
    return [mutant for mutant in mutants if mutant not in same], same


def summary(counts: dict[str, tuple[int, int, int]]) -> tuple[list[str], float]:
    """Lines of a table, and the share killed, from tried, survived and equivalent by module."""
    total = tuple(map(sum, zip(*counts.values(), strict=True)))
    lines = [f"{'module':28}{'killed':>8}{'survived':>10}{'killed %':>10}{'equivalent':>12}"]
    for module, (tried, survived, same) in {**counts, "all": total}.items():
        share = 1 - survived / tried if tried else 1.0
        killed = tried - survived
        lines.append(f"{module:28}{killed:8}{survived:10}{100 * share:10.1f}{same:12}")
    return lines, share


def main() -> int:
    import yaml

    settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="only these; default: all of mutants.yaml")
    parser.add_argument("--sample", type=int, help="try so many, drawn from all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args()
    modules = options.modules or list(settings)
    if unknown := [name for name in modules if name not in settings]:
        fail(f"{unknown[0]} is not in {SETTINGS.name}, which has {', '.join(settings)}")
    for name in PACKAGES:
        importlib.import_module(name)
    gc.freeze()  # or each process would walk, and so copy, all that these hold
    parts = {
        module: split(module, mutants, settings[module].get("equivalent", []))
        for module, mutants in all_faults(modules).items()
    }
    pool = [(module, mutant) for module, (mutants, _) in parts.items() for mutant in mutants]
    if options.sample:
        pool = random.Random(options.seed).sample(pool, min(options.sample, len(pool)))
    counts = {}
    for module, (_, same) in parts.items():
        mutants = [mutant for name, mutant in pool if name == module]
        print(f"{module}: {len(mutants)} mutants", file=sys.stderr)
        alive = survivors(module, mutants, settings[module]["tests"])
        counts[module] = len(mutants), len(alive), len(same)
    lines, share = summary(counts)
    print("\n".join(["", *lines]))
    if options.sample:
        binomtest = importlib.import_module("scipy.stats").binomtest
        low, high = binomtest(round(share * len(pool)), len(pool)).proportion_ci()
        print(f"a sample of {len(pool)}: {share:.1%}, 95 % interval [{low:.1%}, {high:.1%}]")
    return 0 if share >= LEAST else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        json.dump({module: faults(module) for module in sys.argv[2:]}, sys.stdout)
    else:
        sys.exit(main())
