"""What there is to run, what identifies a job, and run.json, the only truth about one.

A job is one notebook for one model, source of weights and stack. Its folder is
`<out>/<model>/<weights>-<stack>/<notebook>/`, the second part ending in `-2gpus` where a model is
sharded over two, or `<out>/_all/<notebook>/` over all models.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.files import ROOT, ParamsError, file_sha, resolve, short, write_json
from lib.models.entries import models
from lib.records import store
from lib.records.jobs import BEFORE_MODELS, CROSS_MODEL, OWN_STACK, SECOND_PASS
from lib.records.store import ACROSS, PARTIAL, sha
from lib.run import scrub
from lib.run.console import say
from lib.run.profiles import Choice, Profile
from lib.stacks.registry import STACKS

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "numpy",
    "pandas",
    "matplotlib",
    "seaborn",
    "papermill",
    "nbclient",
    "nbconvert",
    "ipykernel",
    "nvidia-ml-py",
)
WHOLE, BLOCK, BLOCKS = 2**28, 2**16, 1024  # bytes of files that are hashed whole, and samples


@dataclass(frozen=True)
class Task:
    """One notebook to execute; `reads` is the folder whose records it reads, if it does."""

    notebook: str
    model: str | None
    weights: str
    stack: str
    source: Path
    folder: Path
    parameters: dict[str, Any]
    reads: Path | None = None

    @property
    def devices(self) -> int:
        """The GPUs that it computes on together."""
        return self.parameters.get("devices", 1)

    @property
    def title(self) -> str:
        """Short name for people: model, weights-stack, notebook."""
        if self.notebook in BEFORE_MODELS:
            return f"this {self.notebook}"
        setup = _setup(self.weights, self.stack, self.devices)
        where = f"{self.model} {setup}" if self.model else "all models"
        return f"{where} {self.notebook}"

    @property
    def name(self) -> str:
        """Its folder below all results, in posix form: what one job is called by."""
        return self.folder.relative_to(self.out).as_posix()

    @property
    def out(self) -> Path:
        """The folder of all results."""
        return self.folder.parents[1 if self.folder.parent.name == ACROSS else 2]


def plan(profile: Profile, out_dir: Path) -> list[Task]:
    """All jobs of a profile: the machine's, the models' in turn, those of a second pass from the
    last model to the first, then those over all models.

    Notebooks of one kind keep the profile's order.
    """
    once = {
        n: _task(profile, n, None, out_dir / ACROSS / n, out_dir)
        for n in profile.notebooks
        if n in CROSS_MODEL
    }
    tasks = [task for notebook, task in once.items() if notebook in BEFORE_MODELS]
    again = [n for n in profile.notebooks if n in SECOND_PASS]
    first = [n for n in profile.notebooks if n not in (*CROSS_MODEL, *SECOND_PASS)]
    for notebooks, choices in ((first, profile.choices), (again, profile.choices[::-1])):
        for choice in choices:
            for notebook in (n for n in notebooks if n in choice.notebooks):
                own = replace(choice, stack=OWN_STACK.get(notebook, choice.stack))
                setup = _setup(own.weights, own.stack, own.devices)
                folder = out_dir / store.model_folder(choice.model) / setup
                if all(task.folder != folder / notebook for task in tasks):
                    tasks.append(_task(profile, notebook, own, folder / notebook, folder))
    return tasks + [task for notebook, task in once.items() if notebook not in BEFORE_MODELS]


def _setup(weights: str, stack: str, devices: int) -> str:
    return f"{weights}-{stack}" + (f"-{devices}gpus" if devices > 1 else "")


def _task(
    profile: Profile, notebook: str, choice: Choice | None, folder: Path, reads: Path
) -> Task:
    values = profile.parameters(notebook, choice)
    signature = profile.signatures[notebook]
    reading = "results_dir" in signature or "published" in signature
    name = choice.model if choice else ACROSS
    filled = {
        "model": name_in_rows(name) if reading else name,
        "records_path": short(folder / PARTIAL / "records.jsonl"),
        "results_dir": short(reads),
    }
    return Task(
        notebook=notebook,
        model=choice.model if choice else None,
        weights=choice.weights if choice else values.get("weights", ""),
        stack=choice.stack if choice else values.get("stack", ""),
        source=profile.sources[notebook],
        folder=folder,
        parameters={name: filled.get(name, values.get(name)) for name in signature},
        reads=reads if reading else None,
    )


def name_in_rows(model: str) -> str:
    """What the records of a model call it: a folder's name, a file's without its ending."""
    path = resolve(model)
    if model.endswith(".gguf"):
        return path.stem
    return path.name if path.is_dir() else model


def record_plan(
    tasks: Sequence[Task], out_dir: Path, profile: str, stale: Mapping[str, str]
) -> None:
    """Add the jobs to plan.json, so that a report can tell which are missing, and how to run them.

    `stale` says by name why a finished job is not what it would be today, or nothing.
    """
    before = {}
    try:
        before = store.read_plan(out_dir)
    except ParamsError as error:
        say(f"warning: {error}")
    texts = before.get("stale", {}) | stale
    plan = {
        "jobs": sorted({*before.get("jobs", ()), *(task.name for task in tasks)}),
        "commands": before.get("commands", {}) | {t.name: command(t, profile) for t in tasks},
        "stale": {name: text for name, text in texts.items() if text},
    }
    if plan != before:
        write_json(out_dir / "plan.json", plan)


def command(task: Task, profile: str) -> dict[str, str]:
    """The variables of make that run one job; paths without the names of this machine."""
    values = {"PROFILE": profile}
    if task.model is not None:
        model = str(resolve(task.model)) if resolve(task.model).exists() else task.model
        values["MODELS"] = scrub.text(model, scrub.names())
    values["NOTEBOOKS"] = task.notebook
    if server := task.parameters.get("server"):  # which says itself what it serves
        values["SERVER"] = server
    else:
        values |= {"WEIGHTS": task.weights, "STACK": task.stack}
    values["DTYPE"] = str(task.parameters.get("form") or task.parameters.get("dtype") or "")
    if task.stack in STACKS and STACKS[task.stack].shards:
        values["DEVICES"] = str(task.devices)
    return {name: value for name, value in values.items() if value}


def job_sha(task: Task, gpu: str, models_path: Path) -> str:
    """Identity of what a job measures: two jobs of the same hash would repeat each other."""
    paths, study = ("records_path", "results_dir"), task.parameters.get("published")
    alone = ("devices", 1)  # jobs from before models were sharded do not say it
    return sha(
        {
            "notebook": task.notebook,
            "model": identity_of_model(task.model, models_path) if task.model else None,
            "parameters": {
                k: v for k, v in task.parameters.items() if k not in paths and (k, v) != alone
            },
            "weights": task.weights,
            "stack": task.stack,
            "gpu": gpu,
            "records": store.records_sha(task.reads, task.folder) if task.reads else None,
            **({"published": file_sha(resolve(study))} if study else {}),
        }
    )


def identity_of_model(name: str, models_path: Path) -> dict[str, Any]:
    """What a model's name stands for: its entry and revision, or the files of a folder."""
    entry = models(models_path).get(name)
    if entry is not None:
        fields = ("hub", "revision", "config", "wheel")
        return {"name": name, **{key: entry.get(key) for key in fields}}
    path = resolve(name)
    if path.exists():
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return {"name": path.name, "files": [[f.name, f.stat().st_size] for f in files]}
    return {"name": name, "revision": cached_revision(name)}


def cached_revision(hub_id: str) -> str | None:
    """Commit of the hub's main branch as this machine's cache holds it, or None."""
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "refs" / "main"
    return ref.read_text().strip() if ref.is_file() else None


def notebook_sha(path: Path) -> str:
    """Hash of a notebook's cells: kinds, tags and sources, not outputs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return sha(
        [[c["cell_type"], c["metadata"].get("tags", []), "".join(c["source"])] for c in cells]
    )


def lib_sha(folder: Path = ROOT / "lib") -> str:
    """Hash of the library's modules, those of its packages included."""
    paths = sorted(folder.rglob("*.py"))
    return sha([[path.relative_to(folder).as_posix(), file_sha(path)] for path in paths])


def git_state(folder: Path = ROOT) -> dict[str, Any]:
    """Commit and whether tracked files differ from it, or None with the reason.

    WORKBOOK_COMMIT names the commit where the files travel without their history.
    """
    if commit := os.environ.get("WORKBOOK_COMMIT"):
        return {"commit": commit, "dirty": None, "reason": "told by WORKBOOK_COMMIT"}
    git = ["git", "-C", str(folder)]
    try:
        commit = _output([*git, "rev-parse", "HEAD"])
        changes = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    except FileNotFoundError:
        return {"commit": None, "dirty": None, "reason": "git is not installed"}
    except subprocess.SubprocessError:
        return {"commit": None, "dirty": None, "reason": "not a git repository with a commit"}
    return {"commit": commit, "dirty": bool(changes)}


def _output(command: list[str]) -> str:
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return process.stdout.strip()


def environment(gpu: str, task: Task | None = None) -> dict[str, Any]:
    """What a run depends on beside its code: Python, platform, GPU ("cpu" without one), installed
    versions, threads, and a task's weights where they are files here; nothing is imported."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    system = f"{platform.system()} {platform.machine()}"
    lock = ROOT / "requirements.lock"
    return {
        "python": platform.python_version(),
        "platform": system,
        "gpu": gpu,
        "packages": versions,
        "lock_sha": file_sha(lock) if lock.exists() else None,
        "threads": threads(),
        "weights_sha": weights_sha(task) if task else None,
    }


def threads() -> int:
    """How many threads a kernel computes with on the CPU, as its variables or its cores say."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if (text := os.environ.get(name, "").split(",")[0].strip()).isdigit() and int(text):
            return int(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def weights_sha(task: Task) -> str | None:
    """Hash of the real weights of a model that is a folder or file here, with its configuration.

    A file above `WHOLE` bytes is sampled: its size, and evenly spaced blocks of it.
    """
    reads = task.model and task.weights != "random" and not task.reads
    path = resolve(task.model) if reads else None
    if path is None or not path.exists():
        return None
    listed = sorted(path.iterdir()) if path.is_dir() else [path]
    kinds = (".safetensors", ".gguf", ".json", ".model", ".txt")
    kept = [f for f in listed if f.is_file() and f.suffix in kinds]
    return sha([[f.name, _content_sha(f, f.stat().st_size, f.stat().st_mtime_ns)] for f in kept])


@functools.cache  # every job of a model asks
def _content_sha(path: Path, size: int, _mtime_ns: int) -> str:
    if size <= WHOLE:
        return file_sha(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(BLOCKS):
            file.seek((size - BLOCK) * i // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def stale(task: Task, manifest: dict[str, Any], today: dict[str, Any]) -> list[str]:
    """In what the runs of a finished job differ from one that would begin now: what they were
    measured with, in words; empty where in nothing. `today` is the task's `environment`."""
    runs = (manifest, *(manifest.get("earlier") or ()))
    code = (notebook_sha(task.source), lib_sha())
    reasons = []
    if {(run.get("notebook_sha"), run.get("lib_sha")) for run in runs} != {code}:
        reasons.append("other code than today's")
    for env in (run.get("env") or {} for run in runs):
        reasons += _differences(env, today, reads=task.reads is not None)
    return list(dict.fromkeys(reasons))


def _differences(env: dict[str, Any], today: dict[str, Any], *, reads: bool) -> list[str]:
    """The same for one environment; what it does not tell is no difference."""
    reasons = []
    if env.get("lock_sha") and env["lock_sha"] != today["lock_sha"]:
        reasons.append("another requirements.lock than today's")
    here = {"Python": today["python"], **today["packages"]}
    there = {"Python": env.get("python"), **(env.get("packages") or {})}
    reasons += [
        f"{name} {there[name]}, not {version} as here"
        for name, version in here.items()
        if there.get(name) and there[name] != version
    ]
    if not reads and env.get("threads") and env["threads"] != today["threads"]:
        reasons.append(f"{env['threads']} threads, not {today['threads']} as now")
    if env.get("weights_sha") and env["weights_sha"] != today["weights_sha"]:
        reasons.append("other weights than those that its model's files hold now")
    return reasons
