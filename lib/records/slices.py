"""Slices add up: what an earlier run of a job measured stays.

A row is told from another by `record.identity` and its visit: the same arm in another visit is kept
beside it, since choosing would select. Two runs of a job add up where GPU and revision
of the model agree; model, weights, stack and notebook are the job's folder.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib import files
from lib.files import ParamsError
from lib.records import cut_off, loose, record, store
from lib.records.jobs import ADDS_UP, Job
from lib.records.record import NO_ARM, Record

FIELDS = (  # of a manifest that a later one repeats about an earlier run
    "status",
    "start",
    "end",
    "attempt",
    "git",
    "lib_sha",
    "notebook_sha",
    "job_sha",
    "parameters",
    "env",
)


def read(folder: Path, path: str = "") -> Job | None:
    """The run that a job's folder holds, with its rows; None where it holds none.

    Raises ValueError where its rows are not those that the run has written.
    """
    manifest, records = store.read(folder), folder / "records.jsonl"
    rows = tuple(store.load(records)) if manifest and records.exists() else ()
    if manifest and (damage := store.damage(folder, manifest, ("records.jsonl",))):
        raise ValueError(f"{files.short(folder)}: {damage}")
    return Job(path, folder, manifest, rows) if manifest else None


def differences(one: Job, other: Job) -> list[str]:
    """Why rows of two runs of a job must not stand in one folder; empty where they may."""
    gpus = [(job.run.get("env") or {}).get("gpu") for job in (one, other)]
    reasons = [f"GPU {gpus[0]} and {gpus[1]}"] if gpus[0] != gpus[1] else []
    mine, theirs = (_revisions(job.records) for job in (one, other))
    for model in sorted(mine.keys() & theirs.keys()):
        if mine[model] != theirs[model]:
            sources = " and ".join(" or ".join(sorted(x[model])) for x in (mine, theirs))
            reasons.append(f"{model} from {sources}")
    return reasons


def _revisions(rows: Iterable[Record]) -> dict[str, set[str]]:
    """Where the weights of each model came from."""
    sources: dict[str, set[str]] = {}
    for row in rows:
        if row.key.get("model") and row.value("model_source"):
            parts = filter(None, (row.value("model_source"), row.value("model_revision")))
            sources.setdefault(str(row.key["model"]), set()).add(", ".join(map(str, parts)))
    return sources


def add(new: Job, runs: Sequence[Job]) -> list[dict[str, Any]]:
    """Add to a folder's records the rows that other `runs` measured alone or later, with traces.

    `runs` are all in the order of time, with `new`. Returns what the `earlier` of its run.json
    shall be: the runs whose rows the folder now holds, each with the ids of their environments,
    and whether all its arms are there.
    """
    envs = record.environments(row for run in runs for row in run.records)
    arms = [
        (_place(row, envs.get(row.env_id, {})), row, run) for run in runs for row in run.records
    ]
    last = {arm: (row, run) for arm, row, run in arms}
    lost = {row.env_id for arm, row, _ in arms if row.kind not in NO_ARM and last[arm][0] != row}
    others = [(row, run) for row, run in last.values() if run is not new]
    kept = {row.env_id for row, _ in others if row.kind not in NO_ARM}
    rows = [_with_trace(row, run.folder, new.folder) for row, run in others if row.env_id in kept]
    own = [last[arm][1] is new for arm, _, run in arms if run is new]
    if rows:
        _rewrite(new.folder / "records.jsonl", rows, own)
    rows += [row for row, stays in zip(new.records, own, strict=True) if stays]
    there = {row.env_id for row in rows if row.kind not in NO_ARM}
    return _earlier([*(run for run in runs if run is not new), new], there, lost)


def _place(row: Record, environment: dict[str, Any]) -> tuple:
    """Rows of one place replace each other: those of one arm in one visit."""
    return (*record.identity(row, environment), record.visit_of(environment))


def _with_trace(row: Record, source: Path, target: Path) -> Record:
    """Copy the file that the row names; under another name where that one is another's."""
    name = row.value("trace")
    if not store.is_inside(name) or not (source / name).is_file():
        return row
    other = target / name
    if other.exists() and files.file_sha(other) != files.file_sha(source / name):
        stem, dot, ending = name.partition(".")
        name = f"{stem}-{files.file_sha(source / name)[:8]}{dot}{ending}"
    shutil.copy2(source / row.values["trace"], target / name)
    return replace(row, values=row.values | {"trace": name})


def _in_time(runs: Iterable[Job]) -> list[Job]:
    """Runs in the order in which they measured: by their clocks, but one that another has taken
    up among its `earlier` before that one."""
    order: list[Job] = []
    for job in sorted(runs, key=lambda job: store.moment(job.run)):
        itself = _id(job.run)
        places = [i for i, other in enumerate(order) if itself in map(_id, other.earlier)]
        order.insert(min(places, default=len(order)), job)
    return order


def _id(run: dict[str, Any]) -> tuple:
    return run.get("job_sha"), run.get("start")


def doubts(sources: Iterable[Path]) -> list[str]:
    """A line for each run below some folders whose date cannot be right: what `merge` makes of it.

    Within one folder each run counts one up; a clock may have been set back between two.
    """
    lines = []
    for folder in (path.parent for source in sources for path in store.manifests(source)):
        run = store.read(folder) or {}
        is_past, end = store.moment(run)
        if not is_past:
            lines.append(
                f"{files.short(folder)}: ended at {run['end']}, which is to come; it counts as "
                "measured before the runs that are dated in the past"
            )
        for entry in run.get("earlier") or ():
            attempts = [x.get("attempt") or 0 for x in (entry, run)]
            # Of two folders a finished run counts, though another that is not ended later.
            is_chosen = run.get("status") == "ok" != entry.get("status")
            if attempts[0] < attempts[1] and store.moment(entry)[1] > end and not is_chosen:
                lines.append(
                    f"{files.short(folder)}: attempt {attempts[1]} ended at {run['end']}, before "
                    f"attempt {attempts[0]} at {entry['end']}; the later attempt counts"
                )
    return lines


def _rewrite(path: Path, rows: Sequence[Record], own: Sequence[bool]) -> None:
    """Rows of other runs before those of the file's `own` that stay, whose lines do not change."""
    lines = [store.line(row) for row in rows]
    lines += [line for line, stays in zip(store.lines(path), own, strict=True) if stays]
    files.write_text(path, "\n".join(lines) + "\n")


def _earlier(runs: Sequence[Job], there: set, lost: set) -> list[dict[str, Any]]:
    """Every run but the last that still has rows `there`; complete if it has lost none."""
    entries: dict[tuple, dict[str, Any]] = {}
    for job in runs:
        others = {env_id for entry in job.earlier for env_id in entry["env_ids"]}
        own = sorted({row.env_id for row in job.records} - others, key=str)
        itself = {name: job.run.get(name) for name in FIELDS}
        itself |= {"complete": job.run.get("status") == "ok", "env_ids": own}
        for entry in job.earlier if job is runs[-1] else (*job.earlier, itself):
            ids = sorted(there & {*entry["env_ids"]}, key=str)
            whole = entry["complete"] and not lost & {*entry["env_ids"]}
            if ids:
                changed = {"env_ids": ids, "complete": whole}
                entries[entry["job_sha"], entry["start"]] = entry | changed
    return sorted(entries.values(), key=lambda entry: str(entry["end"]))


@dataclass(frozen=True)
class Added:
    """What a job's folder gave to the run that replaces it.

    `aside` says why its rows cannot stand beside the new ones; `spent`, that what `.previous`
    holds is not needed any more.
    """

    earlier: tuple[dict[str, Any], ...] = ()
    aside: str = ""
    spent: bool = True


def add_earlier(staged: Path, folder: Path, manifest: dict[str, Any]) -> Added:
    """Add to the run that has just ended in `staged` what the job's folder holds of earlier ones.

    That is the run in its place, and a finished one that a failed repetition has put into
    `.previous`.
    """
    is_ok = manifest["status"] == "ok"
    if not (staged / "records.jsonl").exists() or manifest["status"] not in ADDS_UP:
        return Added(spent=is_ok)
    new = Job("", staged, manifest, tuple(store.load(staged / "records.jsonl")))
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
    # Each attempt counts one up, whatever the clock has done since.
    older.sort(key=lambda job: (job.attempt or 0, store.moment(job.run)))
    earlier = add(new, [*older, new])
    spent = is_ok and not why.get(folder / store.PREVIOUS)
    return Added(tuple(earlier), why.get(folder, ""), spent)


def merge(sources: Sequence[Path], out_dir: Path) -> list[str]:
    """Write the jobs of several result folders into a new one; returns what was left out, and why.

    Of two runs of a job the finished one counts, then the later one; of two rows of one arm in one
    visit it is the row that was measured later, and rows of other visits or arms are added. What is
    later the clocks say, unless one run has taken up the other, or is dated in the future. A
    notebook that reads is left out where rows beside it have changed. A folder of rows that a
    script wrote, without run.json, is taken in as it is (`loose`), and so is a run whose machine
    went away (`cut_off`).
    """
    store.refuse_released(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ParamsError(f"{files.short(out_dir)} is not empty; choose a new OUT")
    with tempfile.TemporaryDirectory() as taken_in:
        every: list[Path] = []
        for place, source in enumerate(sources):
            store.refuse_links(source)
            if loose.folders(source):
                every.append(loose.take_in(source, Path(taken_in, str(place))))
                continue
            cut = cut_off.take_in(source, Path(taken_in, str(place)))
            every += [cut] if cut else []
            # Of a machine that went away in its first job there is nothing else.
            every += [source] if store.manifests(source) or not cut else []
        return _merge(every, out_dir)


def _merge(sources: Sequence[Path], out_dir: Path) -> list[str]:
    for source in sources:
        if not any(store.manifests(source)):
            raise ParamsError(f"no run.json below {files.short(source)}; FROM takes results")
        if out_dir.is_relative_to(source) or source.is_relative_to(out_dir):
            raise ParamsError(
                f"{files.short(out_dir)} and {files.short(source)} lie in each other; choose an "
                "OUT beside the folders of FROM"
            )
    jobs: dict[str, list[Job]] = {}
    for source in sources:
        for path in store.manifests(source):
            name = path.parent.relative_to(source).as_posix()
            jobs.setdefault(name, []).append(read(path.parent, name) or _unreadable(path))
    for name, runs in jobs.items():  # the last one counts
        jobs[name] = sorted(_in_time(runs), key=lambda job: job.run.get("status") == "ok")
    _refuse_mixed(jobs)
    partial = out_dir.with_name(f".{out_dir.name}.partial")  # a killed merge leaves no half set
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, runs in jobs.items():
            _write(runs, partial / name)
        _write_plan(sources, [*jobs], partial)
        stale = _drop_stale({name: runs[-1].folder for name, runs in jobs.items()}, partial)
        if out_dir.exists():
            out_dir.rmdir()  # it is empty
        partial.rename(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return stale


def _write_plan(sources: Sequence[Path], jobs: Sequence[str], target: Path) -> None:
    """The plan of all, with the jobs that none of them has run."""
    plans = [store.read_plan(source) for source in sources]
    plan = {key: {k: v for p in plans for k, v in p[key].items()} for key in ("commands", "stale")}
    names = sorted({*jobs, *(name for p in plans for name in p["jobs"])})
    files.write_json(target / "plan.json", {"jobs": names} | {k: v for k, v in plan.items() if v})


def _unreadable(path: Path) -> Job:
    fault = store.manifest_of(path.parent)[1]
    raise ParamsError(
        f"{files.short(path.parent)}: {fault}; mend it, measure it again or remove that job first"
    )


def _refuse_mixed(jobs: dict[str, list[Job]]) -> None:
    """Raise where two runs of a job must not stand in one folder, before anything is written."""
    reasons: dict[str, None] = {}  # each once, in order
    for name, runs in jobs.items():
        measured = [job for job in runs if job.adds_up]
        for job in measured[:-1]:
            reasons |= dict.fromkeys(f"{name}: {why}" for why in differences(job, measured[-1]))
    if reasons:
        raise ParamsError(
            f"not merged, for these rows must not be mixed: {'; '.join(reasons)}. Keep them in "
            "folders of their own; make compare sets them side by side"
        )


def _write(runs: Sequence[Job], target: Path) -> None:
    """One job: the files of the run that counts, and what others add."""
    last, manifest = runs[-1], dict(runs[-1].run)
    ignored = shutil.ignore_patterns(".*", *(f"*{suffix}" for suffix in store.PAGES))
    shutil.copytree(last.folder, target, ignore=ignored)
    if last.adds_up:
        copy = replace(last, folder=target)
        others = [run for run in runs[:-1] if run.adds_up]
        manifest["earlier"] = add(copy, _in_time([*others, copy]))
    manifest["artefacts"] = store.artefacts(target)
    files.write_json(target / "run.json", manifest)


def _drop_stale(folders: dict[str, Path], out_dir: Path) -> list[str]:
    """Remove notebooks that have read other rows than those that are now there; say which."""
    stale = []
    for name, source in folders.items():
        manifest = store.read(out_dir / name) or {}
        if "results_dir" in (manifest.get("parameters") or {}):
            up = 1 if name.startswith(f"{store.ACROSS}/") else 0
            shas = [store.records_sha(f.parents[up], f) for f in (out_dir / name, source)]
            stale += [name] if shas[0] != shas[1] else []
    for name in stale:
        shutil.rmtree(out_dir / name)
    return stale
