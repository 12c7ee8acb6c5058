"""Rows in files, one JSON object a line, and the folders of the jobs that wrote them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lib.files import ROOT, ParamsError, file_sha, resolve, short
from lib.records.record import SCHEMA, Record, environments, identity, visit_of

PARTIAL, PREVIOUS, ACROSS = ".partial", ".previous", "_all"
RELEASED = ROOT / "outputs" / "released"
VISITS = "visits"  # the folder beside a result set that holds further visits of its arms


def append(path: str | Path, record: Record) -> Record:
    """Write one line at once, so that a later failure cannot lose it; returns the record."""
    path, text = Path(path), line(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    return record


def line(record: Record) -> str:
    """A record as a line of its file."""
    data = asdict(replace(record, others=()))
    del data["visit"], data["others"]
    return json.dumps(data, sort_keys=True, allow_nan=False, ensure_ascii=False)


def write_trace(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Raw readings as compressed JSON lines; the same rows give the same bytes."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    Path(path).write_bytes(gzip.compress(text.encode(), mtime=0))


def read_trace(path: str | Path) -> list[dict[str, Any]]:
    """What `write_trace` wrote."""
    return [json.loads(line) for line in gzip.decompress(Path(path).read_bytes()).splitlines()]


def load(path: str | Path) -> list[Record]:
    """All records of one file. A line that is not a record of this schema is an error."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            data = json.loads(line)
            if data.get("schema") != SCHEMA:
                raise ValueError(f"schema {data.get('schema')}, this version reads {SCHEMA}")
            rows.append(Record(**{**data, "warnings": tuple(data["warnings"])}))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a record: {error}") from None
    return rows


def manifests(root: str | Path) -> list[Path]:
    """Every run.json below `root`, less those in hidden folders: what a job keeps for itself."""
    root = Path(root)
    paths = sorted(root.rglob("run.json"))
    return [p for p in paths if not any(x[0] == "." for x in p.relative_to(root).parts)]


def planned(root: Path) -> list[str]:
    """The folders below `root` of the jobs that plan.json lists; none where there is no plan.

    plan.json is {"jobs": ["<model>/<weights>-<stack>/<notebook>", ...]}.
    """
    path = root / "plan.json"
    return json.loads(path.read_text(encoding="utf-8"))["jobs"] if path.exists() else []


def precedence(manifest: dict[str, Any]) -> tuple[bool, str]:
    """Sorts runs in the order in which their rows replace each other: finished wins, then later."""
    return manifest.get("status") == "ok", str(manifest.get("end") or "")


def load_tree(root: str | Path) -> list[Record]:
    """Records of every job below `root`, merged: of one arm in one visit, the job that ended later.

    Jobs that did not end well give what they measured before they ended; a finished job of the
    same key replaces it.
    """
    runs = []
    for path in manifests(root):
        if (records := path.with_name("records.jsonl")).exists():
            runs.append((precedence(json.loads(path.read_text(encoding="utf-8"))), records))
    return merge([row for _, records in sorted(runs) for row in load(records)], root)


def merge(records: Sequence[Record], root: str | Path | None = None) -> list[Record]:
    """One record for each identity, in the order in which identities first appear.

    Of one visit it is the last one. Of several visits it is that of the last, which carries those
    of the `others`, so that none is lost; what failed gives way to what did not. With `root`,
    visits recorded beside that result set are further visits of its arms.
    """
    envs = environments(records)
    arms: dict[tuple, dict[str, Record]] = {}
    for row in records:
        env = envs.get(row.env_id, {})
        visit, arm = visit_of(env), arms.setdefault(identity(row, env), {})
        before = arm.pop(visit, None)
        arm[visit] = before if before and row.error and not before.error else row
    used = []
    for row, env in recorded_visits(root) if root is not None else ():
        place = identity(row, env.values)
        if place in arms:
            arms[place] = {visit_of(env.values): row, **arms[place]}
            used.append(env)
    return [_of_visits(arm) for arm in arms.values()] + list(
        {env.env_id: env for env in used}.values()
    )


def _of_visits(arm: dict[str, Record]) -> Record:
    """The last row, with those of other visits; rows that failed or hold no samples are none."""
    sound = {visit: row for visit, row in arm.items() if row.samples and not row.error}
    if not sound:
        return next(reversed(arm.values()))
    named = [replace(row, visit=visit) for visit, row in sound.items()]
    return replace(named[-1], others=tuple(named[:-1]))


def recorded_visits(root: str | Path) -> list[tuple[Record, Record]]:
    """Rows of the visits recorded beside a result set, each with its environment's row.

    One for each arm of a visit: what was measured on the way there and on the way back is one
    sample. Calls that the end of a visit cut off are left out, and so is what holds no samples.
    """
    pairs: dict[tuple, tuple[Record, Record]] = {}
    for path in sorted((Path(root).resolve().parent / VISITS).glob("**/*.jsonl")):
        rows = load(path)
        envs = {row.env_id: row for row in rows if row.kind == "environment"}
        for row in rows:
            if row.error or not row.samples or any(w["code"] == "cut_off" for w in row.warnings):
                continue
            place = (row.env_id, *identity(row))
            before = pairs.get(place)
            pairs[place] = (_pooled(before[0], row) if before else row, envs[row.env_id])
    return list(pairs.values())


def _pooled(one: Record, other: Record) -> Record:
    names = one.samples.keys() & other.samples.keys()
    return replace(one, samples={name: one.samples[name] + other.samples[name] for name in names})


def model_folder(model: str) -> str:
    """A folder name for a model, different for different models.

    "/" becomes "--" where that can be undone; other names, and paths, get a hash appended.
    """
    path = resolve(model)
    is_path = model.startswith((".", "/", "~")) or path.exists()
    simple = model.replace("/", "--")
    undone = simple.replace("--", "/") == model and re.fullmatch(r"[A-Za-z0-9][\w.-]*", simple)
    if undone and not is_path:
        return simple
    name = str(path) if is_path else model
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).stem).strip("-.") or "model"
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def records_sha(root: Path, without: Path) -> str:
    """Hash of every job's records below `root`, less the job's own."""
    shas = []
    for path in manifests(root):
        records = path.with_name("records.jsonl")
        if path.parent != without and records.exists():
            shas.append([path.parent.relative_to(root).as_posix(), file_sha(records)])
    return sha(shas)


def sha(data: Any) -> str:
    """Hash of what JSON can hold, whatever the order of its keys."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read(folder: Path) -> dict[str, Any] | None:
    """run.json of a job's folder; None where it is absent or unreadable."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_finished(folder: Path, manifest: dict[str, Any] | None, sha: str) -> bool:
    """The folder holds this very job, ended well, with all its files and rows.

    It may be an earlier slice: a later one has added its rows and replaced none.
    """
    if manifest is None or manifest["status"] != "ok":
        return False
    runs = (manifest, *manifest.get("earlier", ()))
    return sha in {run["job_sha"] for run in runs if run.get("complete", True)} and all(
        (folder / item["path"]).exists() for item in manifest["artefacts"]
    )


def artefacts(folder: Path) -> list[dict[str, str]]:
    """Files below a folder with their hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [{"path": p.relative_to(folder).as_posix(), "sha256": file_sha(p)} for p in files]


def refuse_released(out_dir: Path) -> None:
    """Raise where a command would write into a released set."""
    if resolve(out_dir).is_relative_to(RELEASED):
        raise ParamsError(f"{short(out_dir)} is released and never written; choose another --out")
