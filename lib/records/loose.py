"""Rows that a script wrote, a folder an engine without run.json, as the jobs that they would be.

No value is edited. Keys are completed from what the rows of the same folder say of themselves: the
field `engine`, which is newer than some rows, is the `engine_id` that they hold.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib import files
from lib.files import ParamsError
from lib.records import store
from lib.records.record import Record, environments

WORD = re.compile(r"[A-Za-z0-9][\w.+-]*")  # a folder's name that means no other place
SCRIPT = "a script"  # the `by` of a run.json that no runner wrote


def folders(source: Path) -> list[Path]:
    """The folders of rows directly below one that holds no run.json; none where it holds one."""
    if any(store.manifests(source)):
        return []
    return sorted(path.parent for path in source.glob("*/records.jsonl"))


def take_in(source: Path, target: Path) -> Path:
    """Write each folder of loose rows below `source` as a job below `target`, which is returned."""
    for folder in folders(source):
        _write(folder, target)
    return target


def completed(rows: Sequence[Record], where: str) -> list[Record]:
    """The rows with the field `engine` in the keys that lack it."""
    engines = {row.value("engine_id") for row in rows} - {None}
    if len(engines) > 1:
        names = ", ".join(sorted(map(str, engines)))
        raise ParamsError(f"{where} holds rows of several engines ({names}): a folder each, please")
    engine = next(iter(engines), None)
    return [
        replace(row, key=row.key | {"engine": engine})
        if row.key and engine and row.key.get("engine") is None
        else row
        for row in rows
    ]


def _write(folder: Path, target: Path) -> None:
    rows = completed(store.load(folder / "records.jsonl"), files.short(folder))
    setups = {tuple(row.key.get(n) for n in ("model", "weights", "stack")) for row in rows}
    setups -= {(None, None, None)}
    if len(setups) != 1:
        raise ParamsError(f"{files.short(folder)} holds {len(setups)} setups, not one: split it")
    ((model, weights, stack),) = setups
    name = folder.name.removeprefix(f"{model}-")
    if odd := [x for x in (f"{weights}-{stack}", name) if not WORD.fullmatch(x)] or not model:
        raise ParamsError(
            f"{files.short(folder)}: {odd or model!r} cannot name a folder; rename it"
        )
    job = target / store.model_folder(model) / f"{weights}-{stack}" / name
    job.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.name != "records.jsonl":
            shutil.copy2(path, job)
    for row in rows:
        store.append(job / "records.jsonl", row)
    files.write_json(job / "run.json", _manifest(rows, folder, job, (model, weights, stack)))


def _manifest(
    rows: Sequence[Record], folder: Path, job: Path, setup: tuple[Any, Any, Any]
) -> dict[str, Any]:
    """What a runner would have written, as far as the rows tell; the rest is None."""
    env = next(iter(environments(rows).values()), {})
    model, weights, stack = setup
    unknown = dict.fromkeys(("notebook_sha", "lib_sha"))
    return {
        "status": "ok",
        "error": None,
        "by": SCRIPT,
        "parameters": {"model": model, "weights": weights, "stack": stack},
        "job_sha": files.file_sha(folder / "records.jsonl"),
        **unknown,
        "git": {"commit": None, "dirty": None, "reason": f"rows of {SCRIPT}"},
        "env": {name: env.get(name) for name in ("python", "platform", "gpu", "packages")},
        "attempt": 1,
        "start": env.get("date"),
        "end": env.get("date"),
        "earlier": [],
        "artefacts": store.artefacts(job),
    }
