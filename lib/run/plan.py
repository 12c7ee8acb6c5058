"""What there is to run, what identifies a job, and run.json, the only truth about one.

A job is one notebook for one model, source of weights and stack. Its folder is
`<out>/<model>/<weights>-<stack>/<notebook>/`, or `<out>/_all/<notebook>/` over all models.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.files import ROOT, file_sha, resolve, short, write_json
from lib.models.entries import models
from lib.records import store
from lib.records.jobs import BEFORE_MODELS, CROSS_MODEL, OWN_STACK, SECOND_PASS
from lib.records.store import ACROSS, PARTIAL, sha
from lib.run.profiles import Choice, Profile

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
    def title(self) -> str:
        """Short name for people: model, weights-stack, notebook."""
        if self.notebook in BEFORE_MODELS:
            return f"this {self.notebook}"
        where = f"{self.model} {self.weights}-{self.stack}" if self.model else "all models"
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
                setup = f"{own.weights}-{own.stack}"
                folder = out_dir / store.model_folder(choice.model) / setup
                if all(task.folder != folder / notebook for task in tasks):
                    tasks.append(_task(profile, notebook, own, folder / notebook, folder))
    return tasks + [task for notebook, task in once.items() if notebook not in BEFORE_MODELS]


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


def record_plan(tasks: Iterable[Task], out_dir: Path) -> None:
    """Add the jobs to plan.json, so that a report can tell which are missing."""
    names = {*store.planned(out_dir), *(task.name for task in tasks)}
    write_json(out_dir / "plan.json", {"jobs": sorted(names)})


def job_sha(task: Task, gpu: str, models_path: Path) -> str:
    """Identity of what a job measures: two jobs of the same hash would repeat each other."""
    paths, study = ("records_path", "results_dir"), task.parameters.get("published")
    return sha(
        {
            "notebook": task.notebook,
            "model": identity_of_model(task.model, models_path) if task.model else None,
            "parameters": {k: v for k, v in task.parameters.items() if k not in paths},
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


def environment(gpu: str) -> dict[str, Any]:
    """Python, platform, GPU ("cpu" without one) and installed versions; nothing is imported."""
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
    }
