"""Rows in files, one JSON object a line, and the folders of the jobs that wrote them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from lib.files import ROOT, ParamsError, file_sha, parse_json, resolve, short
from lib.records.record import (
    SCHEMA,
    Record,
    environments,
    fault_of,
    identity,
    of_visits,
    visit_of,
)

PARTIAL, PREVIOUS, ACROSS = ".partial", ".previous", "_all"
RELEASED = ROOT / "outputs" / "released"
VISITS = "visits"  # the folder beside a result set that holds further visits of its arms
PAGES = (".html", ".htm", ".xhtml", ".svg")  # what a browser shows; no run has one among its files
STATUSES = ("ok", "failed", "timeout", "dead-kernel", "interrupted")
FIELDS: dict[str, tuple[type, ...]] = {  # of run.json, as far as anything here reads them
    "status": (str,),
    "error": (dict, str, NoneType),
    "parameters": (dict, NoneType),
    "job_sha": (str, NoneType),
    "notebook_sha": (str, NoneType),
    "lib_sha": (str, NoneType),
    "git": (dict, str, NoneType),
    "env": (dict, NoneType),
    "attempt": (int, NoneType),
    "start": (str, NoneType),
    "end": (str, NoneType),
    "earlier": (list, NoneType),
    "artefacts": (list, NoneType),
}
NESTED: dict[str, dict[str, tuple[type, ...]]] = {  # within these fields
    "parameters": {n: (str, NoneType) for n in ("model", "weights", "stack", "server", "dtype")}
    | {"devices": (int, NoneType), "results_dir": (str, NoneType)},
    "env": {n: (str, NoneType) for n in ("gpu", "python", "platform", "lock", "lock_sha")}
    | {"packages": (dict, NoneType)},
    "error": {"log": (list, NoneType)},
    "git": {"commit": (str, NoneType), "dirty": (bool, NoneType)},
}
# The variables of make that a command of plan.json may have.
TOLD = {"PROFILE", "MODELS", "NOTEBOOKS", "SERVER", "WEIGHTS", "STACK", "DTYPE", "DEVICES"}
EARLIER = {  # what an entry of `earlier` must have
    **{name: FIELDS[name] for name in ("start", "end", "job_sha")},
    "env_ids": (list,),
    "complete": (bool,),
}


def append(path: str | Path, record: Record) -> Record:
    """Write one line at once, so that a later failure cannot lose it; returns the record."""
    path, text = Path(path), line(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="replace") as file:
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
    for number, line in enumerate(lines(path), start=1):
        try:
            data = parse_json(line)
            if data.get("schema") != SCHEMA:
                raise ValueError(f"schema {data.get('schema')!r:.80}, this version reads {SCHEMA}")
            row = Record(**{**data, "warnings": tuple(data["warnings"])})
            if odd := fault_of(row):
                raise ValueError(odd)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a record: {error}") from None
        rows.append(row)
    return rows


def lines(path: str | Path) -> list[str]:
    """The lines of a file of records. A text in a row may hold other ends of a line than \\n."""
    try:
        text = Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder is where a file should be") from None
    return text.split("\n") if text else []


def manifests(root: str | Path) -> list[Path]:
    """Every run.json below `root`, less those in hidden folders: what a job keeps for itself.

    Raises ParamsError where a folder cannot be read, for its jobs would be missing.
    """
    paths = []
    for folder, inner, names in os.walk(root, onerror=_refuse_unreadable):
        paths += [Path(folder, "run.json")] if "run.json" in (*names, *inner) else []
        inner[:] = [name for name in inner if name[0] != "." and name != "lost+found"]
    return sorted(paths)


def _refuse_unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise ParamsError(
            f"{short(Path(error.filename))} cannot be read: {error.strerror}; change who may read "
            "it, or move it out of the results"
        )


def read_plan(root: Path) -> dict[str, Any]:
    """plan.json: the folders below `root` of the `jobs`, and by them the `commands` that run each
    and why it is `stale`; all empty where there is no plan.

    A command is {make's variable: value}. Raises ParamsError where the file is damaged, or names
    a folder outside `root`.
    """
    path = root / "plan.json"
    plan: dict[str, Any] = {"jobs": [], "commands": {}, "stale": {}}
    if not path.exists():
        return plan
    try:
        plan |= {**parse_json(path.read_text(encoding="utf-8"))}
        names = [*plan["jobs"], *plan["commands"], *plan["stale"]]
        if odd := [name for name in names if not is_inside(name)]:
            raise ValueError(f"it names {odd[0]!r}, which is no folder below it")
        for values in plan["commands"].values():  # people copy them into a shell
            if not {"PROFILE"} <= values.keys() <= TOLD or not all(map(_is_line, values.values())):
                raise ValueError(f"it has a command that no run has written: {values!r:.100}")
        {name: "" + text for name, text in plan["stale"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ParamsError(
            f"{short(path)} is damaged ({error}); delete it, the next run writes it again"
        ) from None
    return plan


def _is_line(text: Any) -> bool:
    return isinstance(text, str) and text.isprintable()


def is_inside(name: Any) -> bool:
    """Whether a name from a file means something below the folder that the file describes."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    plain = bool(parts) and "\\" not in name and "\0" not in name
    return plain and not name.startswith("/") and ".." not in parts


def refuse_links(root: Path) -> None:
    """Raise where a link below a folder of results leads out of it, whoever put it there, or where
    something is neither file nor folder, such as a pipe, which would be read for ever."""
    home = root.resolve()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not name.isprintable():
            raise ParamsError(f"{short(root)}: {name!r} is no name for a file; rename it")
        if not (path.is_symlink() or path.is_file() or path.is_dir()):
            raise ParamsError(f"{short(path)} is neither a file nor a folder; remove it")
        if path.is_symlink() and not _leads_within(path, home):
            raise ParamsError(
                f"{short(root)} is not closed: {name} is a link that leads out of it; remove the "
                "link, or put what it names in its place"
            )


def _leads_within(link: Path, home: Path) -> bool:
    try:
        return link.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # it leads in a circle
        return False


def precedence(manifest: dict[str, Any]) -> tuple[bool, bool, datetime]:
    """Sorts runs in the order in which their rows replace each other: finished wins, then later."""
    return manifest.get("status") == "ok", *moment(manifest)


def moment(manifest: dict[str, Any]) -> tuple[bool, datetime]:
    """Sorts runs by their end. One whose end is to come was dated by a clock that is ahead, so it
    is before all others; so is, of the others, one without."""
    end = instant(manifest.get("end") or "0001-01-01")
    return end <= datetime.now(UTC), end


def instant(text: str) -> datetime:
    """A time as ISO 8601 writes it, in UTC where it names no zone; raises ValueError for others."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def load_tree(root: str | Path) -> list[Record]:
    """Records of every job below `root`, merged: of one arm in one visit, the job that ended later.

    Jobs that did not end well give what they measured before they ended; a finished job of the
    same key replaces it.
    """
    runs = []
    for path in manifests(root):
        if (records := path.with_name("records.jsonl")).exists():
            manifest, fault = manifest_of(path.parent)
            if fault := fault or damage(path.parent, manifest, ("records.jsonl",)):
                raise ValueError(f"{short(path.parent)}: {fault}")
            runs.append((precedence(manifest), records))
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
    return of_visits(named)


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
    last = Path(name).name.removesuffix(".gguf")  # the name of a folder may hold dots
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-.") or "model"
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
    """run.json of a job's folder; None where it is absent or not what a run writes."""
    return manifest_of(folder)[0]


def manifest_of(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """run.json of a job's folder, or None and what is wrong with it."""
    try:
        manifest = parse_json((folder / "run.json").read_text(encoding="utf-8"))
        fault = _fault(manifest)
    except OSError as error:
        fault = error.strerror
    except ValueError as error:
        fault = f"it is no JSON ({error})"
    return (None, f"run.json is damaged: {fault}") if fault else (manifest, "")


def _fault(manifest: Any) -> str:
    """The first field of a manifest that no run has written so; empty where all are sound."""
    if not isinstance(manifest, dict):
        return f"it holds {type(manifest).__name__}, needs a mapping"
    if manifest.get("status") not in STATUSES:
        return f"status is {manifest.get('status')!r:.80}, needs {', '.join(STATUSES)}"
    if "end" not in manifest:
        return "it lacks end"
    for name, kinds in FIELDS.items():
        if name in manifest and not isinstance(manifest[name], kinds):
            return f"{name} is {manifest[name]!r:.80}"
    for field, types in NESTED.items():
        inner = manifest.get(field)
        for name in inner.keys() & types.keys() if isinstance(inner, dict) else ():
            if not isinstance(inner[name], types[name]):
                return f"{field}, {name} is {inner[name]!r:.80}"
    for name in ("start", "end"):
        try:
            datetime.fromisoformat(manifest.get(name) or "2000-01-01")
        except ValueError:
            return f"{name} is {manifest[name]!r:.80}, no time"
    for item in manifest.get("artefacts") or ():
        if not isinstance(item, dict) or not is_inside(item.get("path")):
            return f"artefacts lists {item!r:.80}, no file of this folder"
        if PurePosixPath(item["path"]).suffix.lower() in PAGES:
            return f"artefacts lists {item['path']}, which no run has written"
    for entry in manifest.get("earlier") or ():
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name, ...), kinds) for name, kinds in EARLIER.items()
        ):
            return f"earlier lists {entry!r:.80}"
        if inner := _fault({"status": "ok", **entry, "earlier": None, "artefacts": None}):
            return f"earlier lists a run in which {inner}"
        if not all(isinstance(env_id, (str, NoneType)) for env_id in entry["env_ids"]):
            return f"earlier lists {entry['env_ids']!r:.80}"
    return ""


def notebook_fault(path: Path) -> str:
    """Why a file is no executed notebook; empty where it is one."""
    texts, kinds = (str, list), ("code", "markdown", "raw")
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if notebook["nbformat"] != 4 or not isinstance(notebook["metadata"], dict):
            return "its format is another"
        for name, value in notebook["metadata"].get("language_info", {}).items():
            if name in ("pygments_lexer", "name") and not isinstance(value, str):
                return f"its {name} is {value!r:.60}"
        for cell in notebook["cells"]:
            outputs = cell.get("outputs", [])
            if cell["cell_type"] not in kinds or not isinstance(cell["source"], texts):
                return f"it has a cell {cell!r:.60}"
            cell["metadata"].get("papermill", {}).get("duration")
            for output in outputs:
                output["output_type"], output.get("data", {}).items()
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    except (TypeError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fault(folder: Path) -> str:
    """What is wrong with the results of a job; empty where they are sound, or where none are."""
    manifest, damaged = manifest_of(folder)
    if manifest:
        return damage(folder, manifest)
    return damaged if (folder / "run.json").exists() else ""


def damage(folder: Path, manifest: dict[str, Any], names: Sequence[str] = ()) -> str:
    """The first file that is not the one that the run has written, or is gone; else empty.

    `names` are those to look at, by default all that run.json lists.
    """
    for item in manifest.get("artefacts") or ():
        path = folder / item["path"]
        if names and item["path"] not in names:
            continue
        try:
            if not path.is_file():
                return f"{item['path']} is gone"
            same, size = file_sha(path) == item.get("sha256"), path.stat().st_size
        except OSError as error:
            return f"{item['path']} cannot be read: {error.strerror}"
        if not same:
            return f"{item['path']} ({size:,} bytes) is not the file that run.json lists by sha256"
    return ""


def is_finished(folder: Path, manifest: dict[str, Any] | None, sha: str) -> bool:
    """The folder holds this very job, ended well, and all its files as the run wrote them.

    It may be an earlier slice: a later one has added its rows and replaced none.
    """
    if manifest is None or manifest["status"] != "ok":
        return False
    runs = (manifest, *(manifest.get("earlier") or ()))
    same = sha in {run.get("job_sha") for run in runs if run.get("complete", True)}
    return same and not damage(folder, manifest)


def artefacts(folder: Path) -> list[dict[str, str]]:
    """Files below a folder with their hashes, less the run.json that will hold them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path != folder / "run.json"]
    return [{"path": p.relative_to(folder).as_posix(), "sha256": file_sha(p)} for p in files]


def refuse_released(out_dir: Path) -> None:
    """Raise where a command would write into a released set."""
    if resolve(out_dir).is_relative_to(RELEASED):
        raise ParamsError(f"{short(out_dir)} is released and never written; choose another --out")
