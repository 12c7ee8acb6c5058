"""The names of vLLM's that lib uses, read from its source without running it: what a test compares
our calls with. `tools/vllm_names.py FOLDER` (with `vllm` in it) writes tests/data/vllm-names.json.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "tests" / "data" / "vllm-names.json"
FIELDS = {  # what a class can be given or asked for: its fields
    "EngineArgs": "engine/arg_utils.py",
    "SamplingParams": "sampling_params.py",
    "BaseFrontendArgs": "entrypoints/openai/cli_args.py",
    "FrontendArgs": "entrypoints/openai/cli_args.py",
    "SchedulerConfig": "config/scheduler.py",
    "CacheConfig": "config/cache.py",
    "ModelConfig": "config/model.py",
    "CompilationConfig": "config/compilation.py",
    "ParallelConfig": "config/parallel.py",
    "LoadConfig": "config/load.py",
    "SchedulerStats": "v1/metrics/stats.py",
    "BaseCacheStats": "v1/metrics/stats.py",
    "CompilationCounter": "compilation/counter.py",
    "RequestOutputKind": "sampling_params.py",
}
METHODS = {  # what is called or overridden: its parameters
    "LLMEngine": "v1/engine/llm_engine.py",
    "SyncMPClient": "v1/engine/core_client.py",
    "EngineCore": "v1/engine/core.py",
    "StatLoggerManager": "v1/metrics/loggers.py",
    "BaseModelLoader": "model_executor/model_loader/base_loader.py",
    "DefaultModelLoader": "model_executor/model_loader/default_loader.py",
    "Worker": "v1/worker/gpu_worker.py",
    "WorkerBase": "v1/worker/worker_base.py",
}
RUNNERS = ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py")
LITERALS = {
    "MoEBackend": "config/kernel.py",
    "QuantizationMethods": "model_executor/layers/quantization/__init__.py",
}
SAID = (  # where what the log tells comes from
    *RUNNERS,
    "v1/engine/core.py",
    "compilation/monitor.py",
    "compilation/decorators.py",
)


def names(folder: Path) -> dict:
    """Everything that the test asks for, sorted, so that versions can be compared."""
    tree = {path: ast.parse((folder / path).read_text()) for path in _paths()}
    told = {
        "version": _version(folder),
        "fields": {name: _fields(_class(tree[path], name)) for name, path in FIELDS.items()},
        "methods": {name: _methods(_class(tree[path], name)) for name, path in METHODS.items()},
        "runners": [sorted(_methods(_class(tree[path], "GPUModelRunner"))) for path in RUNNERS],
        "worker": sorted({x for n in ("Worker", "WorkerBase") for x in _own(tree[METHODS[n]], n)}),
        "literals": {name: _literal(tree[path], name) for name, path in LITERALS.items()},
        "environment": _keys(tree["envs.py"], "environment_variables"),
        "jit_monitor": _functions(tree["utils/jit_monitor.py"]),
        "most_logprob_ids": _value(tree["sampling_params.py"], "MAX_LOGPROB_TOKEN_IDS"),
        "plugins": _value(tree["plugins/__init__.py"], "DEFAULT_PLUGINS_GROUP"),
        "said": sorted({text for path in SAID for text in _messages(tree[path])}),
    }
    return told


def _paths() -> set[str]:
    more = {"envs.py", "utils/jit_monitor.py", "plugins/__init__.py"}
    return {*FIELDS.values(), *METHODS.values(), *LITERALS.values(), *SAID, *more}


def _version(folder: Path) -> str:
    (line,) = [x for x in (folder / "_version.py").read_text().splitlines() if "version = '" in x]
    return line.rpartition("'")[0].rpartition("'")[2]


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)


def _fields(cls: ast.ClassDef) -> list[str]:
    """Fields, enumerated values and properties."""
    found = [n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)]
    found += [t.id for n in cls.body if isinstance(n, ast.Assign) for t in n.targets]
    found += [n.name for n in cls.body if isinstance(n, ast.FunctionDef) and n.decorator_list]
    return sorted(found)


def _methods(cls: ast.ClassDef) -> dict[str, list[str]]:
    """Parameters of each method, `self` left out."""
    functions = [n for n in cls.body if isinstance(n, ast.FunctionDef)]
    return {f.name: [a.arg for a in (*f.args.args[1:], *f.args.kwonlyargs)] for f in functions}


def _own(tree: ast.Module, name: str) -> set[str]:
    cls = _class(tree, name)
    found = {
        n.attr
        for n in ast.walk(cls)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    }
    return found | set(_methods(cls)) | set(_fields(cls))


def _assigned(tree: ast.Module, name: str) -> ast.expr:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return node.value
    raise SystemExit(f"this vLLM has no {name}")


def _literal(tree: ast.Module, name: str) -> list[str]:
    return sorted(ast.literal_eval(_assigned(tree, name).slice))


def _keys(tree: ast.Module, name: str) -> list[str]:
    return sorted(k.value for k in _assigned(tree, name).keys if isinstance(k, ast.Constant))


def _value(tree: ast.Module, name: str) -> object:
    return ast.literal_eval(_assigned(tree, name))


def _functions(tree: ast.Module) -> dict[str, list[str]]:
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    return {f.name: [a.arg for a in (*f.args.args, *f.args.kwonlyargs)] for f in found}


def _messages(tree: ast.Module) -> set[str]:
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    return {t for t in texts if isinstance(t, str) and " took " in t and "%" in t}


if __name__ == "__main__":
    told = names(Path(sys.argv[1]) / "vllm")
    OUT.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    print(f"{OUT.name}: vLLM {told['version']}")
