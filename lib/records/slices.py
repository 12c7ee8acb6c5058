"""Slices add up: what an earlier run of a job measured stays until the same arm is measured again.

A row is told from another by `records.identity`. Two runs of a job add up where GPU and revision
of the model agree; model, weights, stack and notebook are the job's folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lib import files
from lib.files import ParamsError
from lib.records import record, store
from lib.records.record import Record

ADDS_UP = ("ok", "interrupted")  # what a run measured before it failed waits for its repetition
TOLD = (
    "status",
    "start",
    "end",
    "attempt",
    "git",
    "lib_sha",
    "notebook_sha",
    "job_sha",
    "parameters",
)
NO_ARM = ("environment", "card")


@dataclass(frozen=True)
class Run:
    """One ended run of a job: its folder, its run.json and its rows."""

    folder: Path
    told: dict[str, Any]
    rows: tuple[Record, ...]

    @property
    def adds_up(self) -> bool:
        """Its rows may stand beside those of a later run."""
        return bool(self.rows) and self.told.get("status") in ADDS_UP


def read(folder: Path) -> Run | None:
    """The run that a job's folder holds; None where it holds none."""
    told = store.read(folder)
    path = folder / "records.jsonl"
    return told and Run(folder, told, tuple(store.load(path) if path.exists() else ()))


def differences(one: Run, other: Run) -> list[str]:
    """Why rows of two runs of a job must not stand in one folder; empty where they may."""
    found = []
    gpus = [(run.told.get("env") or {}).get("gpu") for run in (one, other)]
    if gpus[0] != gpus[1]:
        found.append(f"GPU {gpus[0]} and {gpus[1]}")
    known = [_revisions(run.rows) for run in (one, other)]
    for model in sorted(known[0].keys() & known[1].keys()):
        if known[0][model] != known[1][model]:
            shown = " and ".join(" or ".join(sorted(k[model])) for k in known)
            found.append(f"{model} from {shown}")
    return found


def _revisions(rows: Iterable[Record]) -> dict[str, set[str]]:
    """Where the weights of each model came from."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.key.get("model") and row.value("model_source"):
            parts = filter(None, (row.value("model_source"), row.value("model_revision")))
            found.setdefault(str(row.key["model"]), set()).add(", ".join(map(str, parts)))
    return found


def add(folder: Path, told: dict[str, Any], older: Sequence[Run]) -> list[dict[str, Any]]:
    """Add to a folder's records the rows that `older` runs measured alone or later, with traces.

    `told` is the folder's run.json. Returns what its `earlier` shall say: the runs whose rows the
    folder now holds, each with the ids of their environments, and whether all its arms are there.
    """
    new = Run(folder, told, tuple(store.load(folder / "records.jsonl")))
    runs = [*sorted(older, key=_end), new]
    gpus = _gpus(row for run in runs for row in run.rows)
    named = [
        (record.identity(row, gpus.get(row.env_id)), row, run)
        for run in sorted(runs, key=_end)
        for row in run.rows
    ]
    last = {name: (row, run) for name, row, run in named}
    lost = {row.env_id for name, row, _ in named if row.kind not in NO_ARM and last[name][0] != row}
    kept = [(row, run) for row, run in last.values() if run is not new]
    arms = {row.env_id for row, _ in kept if row.kind not in NO_ARM}
    rows = [_with_trace(row, run.folder, folder) for row, run in kept if row.env_id in arms]
    own = [last[name][1] is new for name, _, run in named if run is new]
    if rows:
        _rewrite(folder / "records.jsonl", rows, own)
    left = [row for row, stays in zip(new.rows, own, strict=True) if stays]
    there = {row.env_id for row in (*rows, *left) if row.kind not in NO_ARM}
    return _earlier(runs, there, lost)


def _gpus(rows: Iterable[Record]) -> dict[str | None, str | None]:
    return {name: env.get("gpu") for name, env in record.environments(rows).items()}


def _with_trace(row: Record, source: Path, target: Path) -> Record:
    """Copy the file that the row names; under another name where that one is another's."""
    name = row.value("trace")
    if not name or not (source / name).exists():
        return row
    taken = target / name
    if taken.exists() and files.file_sha(taken) != files.file_sha(source / name):
        stem, dot, ending = name.partition(".")
        name = f"{stem}-{files.file_sha(source / name)[:8]}{dot}{ending}"
    shutil.copy2(source / row.values["trace"], target / name)
    return replace(row, values=row.values | {"trace": name})


def _end(run: Run) -> str:
    return str(run.told.get("end"))


def _rewrite(path: Path, rows: Sequence[Record], own: Sequence[bool]) -> None:
    """Rows of other runs before those of the file's `own` that stay, whose lines do not change."""
    lines = [
        json.dumps(asdict(row), sort_keys=True, allow_nan=False, ensure_ascii=False) for row in rows
    ]
    there = path.read_text(encoding="utf-8").splitlines()
    lines += [line for line, stays in zip(there, own, strict=True) if stays]
    whole = path.with_name(path.name + ".partial")
    whole.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    whole.replace(path)


def _earlier(runs: Sequence[Run], there: set, lost: set) -> list[dict[str, Any]]:
    """Every run but the last that still has rows `there`; complete if it has lost none."""
    found: dict[tuple, dict[str, Any]] = {}
    for run in runs:
        before = run.told.get("earlier") or []
        known = {env_id for entry in before for env_id in entry["env_ids"]}
        own = sorted({row.env_id for row in run.rows} - known, key=str)
        itself = {name: run.told.get(name) for name in TOLD}
        itself |= {"complete": run.told.get("status") == "ok", "env_ids": own}
        for entry in before if run is runs[-1] else (*before, itself):
            ids = sorted(there & {*entry["env_ids"]}, key=str)
            whole = entry["complete"] and not lost & {*entry["env_ids"]}
            if ids:
                told = entry | {"env_ids": ids, "complete": whole}
                found[entry["job_sha"], entry["start"]] = told
    return sorted(found.values(), key=lambda entry: str(entry["end"]))


@dataclass(frozen=True)
class Added:
    """What a job's folder gave to the run that replaces it.

    `aside` says why its rows cannot stand beside the new ones; `spent`, that what `.previous`
    holds is not needed any more.
    """

    earlier: tuple[dict[str, Any], ...] = ()
    aside: str = ""
    spent: bool = True


def add_earlier(staged: Path, folder: Path, told: dict[str, Any]) -> Added:
    """Add to the run that has just ended in `staged` what the job's folder holds of earlier ones.

    That is the run in its place, and a finished one that a failed repetition has put into
    `.previous`.
    """
    if not (staged / "records.jsonl").exists() or told["status"] not in ADDS_UP:
        return Added(spent=told["status"] == "ok")
    new = Run(staged, told, tuple(store.load(staged / "records.jsonl")))
    older, why = [], {}
    for place in (folder / store.PREVIOUS, folder):
        try:
            run = read(place)
        except ValueError as error:  # the old file is damaged; the new one must not suffer
            why[place] = str(error)
            continue
        if run is not None and run.adds_up:
            why[place] = "; ".join(differences(run, new))
            older += [] if why[place] else [run]
    earlier = add(staged, told, older)
    spent = not why.get(folder / store.PREVIOUS) and told["status"] == "ok"
    return Added(tuple(earlier), why.get(folder, ""), spent)


def merge(sources: Sequence[Path], out_dir: Path) -> list[str]:
    """Write the jobs of several result folders into a new one; returns what was left out, and why.

    Of two runs of a job the finished one counts, then the later one; of two rows of one arm it is
    the row that was measured later, and rows of one run alone are added. A notebook that reads is
    left out where rows beside it have changed.
    """
    store.refuse_released(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ParamsError(f"{files.short(out_dir)} is not empty; choose a new OUT")
    for source in sources:
        if not any(store.manifests(source)):
            raise ParamsError(f"no run.json below {files.short(source)}; FROM takes results")
    jobs: dict[str, list[Run]] = {}
    for source in sources:
        for path in store.manifests(source):
            name = path.parent.relative_to(source).as_posix()
            jobs.setdefault(name, []).append(read(path.parent) or _unreadable(path))
    for runs in jobs.values():
        runs.sort(key=lambda run: (run.told.get("status") == "ok", str(run.told.get("end"))))
    _refuse_mixed(jobs)
    for name, runs in jobs.items():
        _write(runs, out_dir / name)
    planned = [p for s in sources if (s / "plan.json").exists() for p in _plan(s)]
    files.write_json(out_dir / "plan.json", {"jobs": sorted({*jobs, *planned})})
    return _drop_stale({name: runs[-1].folder for name, runs in jobs.items()}, out_dir)


def _unreadable(path: Path) -> Run:
    raise ParamsError(f"{files.short(path)} cannot be read; mend or remove that job first")


def _plan(source: Path) -> list[str]:
    return json.loads((source / "plan.json").read_text(encoding="utf-8"))["jobs"]


def _refuse_mixed(jobs: dict[str, list[Run]]) -> None:
    """Raise where two runs of a job must not stand in one folder, before anything is written."""
    refused = []
    for name, runs in jobs.items():
        measured = [run for run in runs if run.adds_up]
        for run in measured[:-1]:
            refused += [f"{name}: {why}" for why in differences(run, measured[-1])]
    if refused:
        listed = "; ".join(dict.fromkeys(refused))
        raise ParamsError(
            f"not merged, for these rows must not be mixed: {listed}. Keep them in "
            "folders of their own; make compare sets them side by side"
        )


def _write(runs: Sequence[Run], target: Path) -> None:
    """One job: the files of the run that counts, and what others add."""
    last, told = runs[-1], dict(runs[-1].told)
    ignored = shutil.ignore_patterns(".*", "notebook.html")
    shutil.copytree(last.folder, target, ignore=ignored)
    if last.adds_up:
        told["earlier"] = add(target, told, [run for run in runs[:-1] if run.adds_up])
    (target / "run.json").unlink()
    told["artefacts"] = store.artefacts(target)
    files.write_json(target / "run.json", told)


def _drop_stale(folders: dict[str, Path], out_dir: Path) -> list[str]:
    """Remove notebooks that have read other rows than those that are now there; say which."""
    stale = []
    for name, source in folders.items():
        told = store.read(out_dir / name) or {}
        if "results_dir" in (told.get("parameters") or {}):
            up = 1 if name.startswith(f"{store.ALL}/") else 0
            shas = [store.records_sha(f.parents[up], f) for f in (out_dir / name, source)]
            stale += [name] if shas[0] != shas[1] else []
    for name in stale:
        shutil.rmtree(out_dir / name)
    return stale
