"""Jobs below a results folder, by their run.json files: what ran, what failed, what is missing."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib import files
from lib.records import kinds, store
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record
from lib.records.store import ACROSS, load, manifest_of, manifests

ADDS_UP = ("ok", "interrupted")  # what a run measured before it failed waits for its repetition
BEFORE_MODELS = ("machine",)  # notebooks that run once, before the models
CROSS_MODEL = (*BEFORE_MODELS, "summary", "audit")  # the others run once, over all models
SECOND_PASS = {"energy_again": "energy"}  # run when all models are through, the last model first
COMPARED = ("latency", "energy", "stacks", "batch", "serving")  # of models, in time or joules
OWN_STACK = {"serving": "server"}  # notebooks that measure a stack of their own, whatever is asked
ON_REQUEST = ("serving",)  # run where a profile lists them for a model, or NOTEBOOKS= names them
ORDER = (
    "machine",
    "latency",
    "memory",
    "energy",
    "energy_again",
    "energy_checks",
    "stacks",
    "batch",
    "serving",
    "ablations",
    "ape",
    "summary",
    "audit",
)


@dataclass(frozen=True)
class Job:
    """One notebook for one model, and the run of it that its folder holds.

    `path` is that folder below the results, in posix form; `run` is its run.json. `command` and
    `stale` are what plan.json says of it; `out` is what a command calls the results.
    """

    path: str
    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    records: tuple[Record, ...] = ()
    profile: str = ""
    id: str = ""
    damage: str = ""
    command: dict[str, str] = field(default_factory=dict)
    stale: str = ""
    out: str = ""

    @property
    def parts(self) -> list[str]:
        """model folder, setup folders, notebook."""
        return self.path.split("/")

    @property
    def model(self) -> str:
        """The model by name where the manifest has it, else its folder."""
        if self.parts[0] == ACROSS:
            return "all models"
        return str(self._parameter("model") or self.parts[0])

    def _parameter(self, name: str) -> Any:
        return (self.run.get("parameters") or {}).get(name)

    @property
    def notebook(self) -> str:
        return self.parts[-1]

    @property
    def setup(self) -> str:
        """weights and stack, as the folder names them."""
        return "/".join(self.parts[1:-1])

    @property
    def title(self) -> str:
        """The notebook, and the stack if it is not the one that a study is about."""
        if self.by_script:
            return f"Rows of {self.run['by']}, {self.notebook}"
        name = "APE" if self.notebook == "ape" else self.notebook.replace("_", " ").capitalize()
        stack, devices = self._parameter("stack"), self._parameter("devices") or 1
        several = f", {devices} GPUs" if devices > 1 else ""
        return name if stack in (None, STUDY_STACK) else f"{name} ({stack}{several})"

    @property
    def status(self) -> str:
        """The manifest's word; without a manifest "missing"; ok without a notebook is not ok."""
        if not self.run:
            return "missing"
        if self.damage:
            return "damaged"
        status = str(self.run.get("status", "failed"))
        if status == "ok" and not self.by_script and not (self.folder / "notebook.ipynb").exists():
            return "notebook missing"
        return status

    @property
    def by_script(self) -> bool:
        """Whether its rows were written without a notebook."""
        return "by" in self.run

    @property
    def end(self) -> str:
        """When it ended, to the minute, as the manifest says."""
        return readable(self.run.get("end"))

    @property
    def earlier(self) -> list[dict[str, Any]]:
        """Earlier runs of which the job still holds rows, as the manifest lists them."""
        return self.run.get("earlier") or []

    @property
    def adds_up(self) -> bool:
        """Its rows may stand beside those of a later run."""
        return bool(self.records) and self.run.get("status") in ADDS_UP

    def run_of(self, env_id: str | None) -> dict[str, Any]:
        """The run that has measured in this environment."""
        return next((e for e in self.earlier if env_id in e["env_ids"]), self.run)

    @property
    def own(self) -> tuple[Record, ...]:
        """The rows of the run that the manifest is about, without those of earlier ones."""
        return tuple(row for row in self.records if self.run_of(row.env_id) is self.run)

    @property
    def attempt(self) -> Any:
        return self.run.get("attempt")

    @property
    def error(self) -> str:
        """What the manifest says about the failure, else the notebook's own error."""
        error = self.run.get("error") or ""
        if isinstance(error, dict):
            cell = f" in cell [{error['cell']}]" if error.get("cell") else ""
            log = "".join(f"\n{line}" for line in (error.get("log") or ())[-12:])
            error = f"{error.get('name')}{cell}: {error.get('value')}{log}"
        return _last_lines(self.damage or error or _notebook_error(self.notebook_path))

    @property
    def notebook_path(self) -> Path | None:
        """The executed notebook, also that of a job that did not end well."""
        path = self.folder / "notebook.ipynb"
        return path if path.exists() and not self.damage else None

    @property
    def rerun(self) -> str:
        """The command that runs this job again: as its run noted it, else as its folders say. A
        profile that is no longer there gives way to the study's."""
        values = dict(self.command or self._guess())
        if not has_profile(values["PROFILE"]):
            values["PROFILE"] = "paper"
        values |= {"OUT": self.out} if self.out not in ("", f"outputs/{values['PROFILE']}") else {}
        values |= {"FORCE": "1"} if self.status == "ok" else {}
        return "make report " + " ".join(f"{k}={shlex.quote(str(v))}" for k, v in values.items())

    def _guess(self) -> dict[str, Any]:
        values: dict[str, Any] = {"PROFILE": self.profile}
        if self.parts[0] != ACROSS:
            values["MODELS"] = self._parameter("model") or self.parts[0]
        values["NOTEBOOKS"] = self.notebook
        names = ("server",) if self._parameter("server") else ("weights", "stack", "devices")
        return values | {n.upper(): v for n in names if (v := self._parameter(n))}


def has_profile(name: str) -> bool:
    """Whether there is a profile of the name, here and now."""
    return (files.ROOT / "params" / f"{name}.yaml").exists()


def readable(end: str | None) -> str:
    """2026-11-24T10:31:02+00:00 as 2026-11-24 10:31."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*$", r"\1 \2", str(end or ""))


def slug(text: str) -> str:
    """Text as an id: letters, digits, dot and dash."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower() or "x"


def find(source: str | Path, out: str | None = None, *, only: str | None = None) -> list[Job]:
    """Every job below the folder: those with a run.json, and those of plan.json that have none.

    Files are read of the job whose path is `only`, by default of all. `out` is what the commands of
    the jobs call the folder: by default its path, and nothing for a released set, which is never
    written.
    """
    source = Path(source)
    store.refuse_links(source)
    released = files.resolve(source).is_relative_to(store.RELEASED)
    out = out or ("" if released else files.short(source))
    plan = store.read_plan(source)
    paths = {p.parent.relative_to(source).as_posix() for p in manifests(source)} | {*plan["jobs"]}
    found = [
        _read(source, path) if only in (None, path) else Job(path, source / path)
        for path in sorted(paths, key=_order)
    ]
    notes = ((plan["commands"].get(job.path, {}), plan["stale"].get(job.path, "")) for job in found)
    return _with_ids(
        [
            replace(job, command={**command}, stale=stale, out=out)
            for job, (command, stale) in zip(found, notes, strict=True)
        ]
    )


def _read(source: Path, path: str) -> Job:
    """One job; what cannot be read is kept as its damage, so that the report can say so."""
    folder, run, records, damage = source / path, {}, (), ""
    if (folder / "run.json").exists():
        manifest, damage = manifest_of(folder)
        run = manifest or {"status": "damaged"}
    try:
        if run and not damage and (folder / "records.jsonl").exists():
            records = tuple(load(folder / "records.jsonl"))
    except (OSError, ValueError) as error:
        damage = str(error).replace(str(folder), path)
    if run and (folder / "notebook.ipynb").exists():
        why = store.notebook_fault(folder / "notebook.ipynb")
        damage = damage or (f"notebook.ipynb is no notebook: {why}" if why else "")
    if store.damage(folder, run, ("records.jsonl",)):
        records = ()  # not those that were measured
    damage = damage or store.damage(folder, run)
    return Job(path, folder, run, records, source.name, damage=damage)


def _order(path: str) -> tuple:
    """Models in the order of params/models.yaml, the study's stack first; notebooks as run."""
    parts = path.split("/")
    at = ORDER.index(parts[-1]) if parts[-1] in ORDER else len(ORDER)
    place = 0 if parts[-1] in BEFORE_MODELS else 1 + (parts[0] == ACROSS)
    setup = parts[1] if len(parts) == 3 else ""
    stack = bool(setup) and not setup.endswith(f"-{STUDY_STACK}")
    return (place, kinds.model_order(parts[0]), stack, setup, at, parts[-1])


def _with_ids(jobs: Sequence[Job]) -> list[Job]:
    """Ids `model--notebook`; where a model has several setups, the setup stands between."""
    short = Counter((job.parts[0], job.notebook) for job in jobs)
    copies, uses = [], Counter()
    for job in jobs:
        model = "all" if job.parts[0] == ACROSS else slug(job.parts[0])
        names = [model, slug(job.notebook)]
        if short[job.parts[0], job.notebook] > 1:
            names.insert(1, slug(job.setup))
        name = "--".join(names)
        uses[name] += 1
        name += f"-{uses[name]}" if uses[name] > 1 else ""
        copies.append(replace(job, id=name))
    return copies


def _notebook_error(path: Path | None) -> str:
    """The last error output of a notebook."""
    if path is None:
        return ""
    cells = json.loads(path.read_text(encoding="utf-8")).get("cells", [])
    outputs = [out for cell in cells for out in cell.get("outputs", ())]
    errors = [out for out in outputs if out.get("output_type") == "error"]
    return f"{errors[-1]['ename']}: {errors[-1]['evalue']}" if errors else ""


def _last_lines(text: str, count: int = 20) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return "\n".join(plain.strip().splitlines()[-count:])
