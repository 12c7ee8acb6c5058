"""Runs that were cut off: the runner was killed or its machine went away, and nobody ended them.

While a notebook runs, the folder that it writes into holds the run.json of an interrupted run. The
runner that ends the run takes it away again; where it is still there, it is the truth.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import files
from lib.records import executed, store
from lib.records.record import NO_ARM

WHY = "the runner ended without a word: it was killed, or its machine went away"
OPEN = (
    "it had not ended when its folder was read: it ran still, was killed, or its machine went away"
)


def announce(staged: Path, manifest: dict[str, Any]) -> None:
    """Say in the folder of a run that begins that it was interrupted: true unless retracted."""
    error = {"name": "Interrupted", "value": WHY, "cell": None}
    run = {"status": "interrupted", "error": error, "end": manifest["start"]}
    files.write_json(staged / "run.json", manifest | run)


def retract(staged: Path) -> None:
    """The run has been ended: what its folder said of it no longer holds."""
    (staged / "run.json").unlink(missing_ok=True)


def take_up(staged: Path) -> dict[str, Any] | None:
    """Make what such a run left what a run leaves that was stopped; returns its manifest, which has
    no artefacts yet. None where the folder holds no such run, or nothing that it measured."""
    manifest, records = store.read(staged), staged / "records.jsonl"
    if manifest is None or not records.is_file():
        return None
    end = datetime.fromtimestamp(records.stat().st_mtime, UTC)
    try:
        whole = records.read_bytes().rpartition(b"\n")[0].decode()
        files.write_text(records, whole + "\n")  # a line that was being written has no end
        if all(row.kind in NO_ARM for row in store.load(records)):
            return None
    except ValueError:
        return None
    try:
        executed.shrink(staged / "notebook.ipynb")
    except (ValueError, KeyError, TypeError, AttributeError):  # half of one was written
        (staged / "notebook.ipynb").unlink()
    executed.pack_logs(staged)
    return manifest | {"end": end.isoformat(timespec="milliseconds")}


def folders(source: Path) -> list[Path]:
    """The folders of jobs below `source` that hold a run which nobody has ended."""
    return sorted(path.parent.parent for path in source.rglob(f"{store.PARTIAL}/run.json"))


def take_in(source: Path, target: Path) -> Path | None:
    """Write a copy of each run below `source` that nobody has ended as a job below `target`, which
    is returned; None where there is none. Such a run may go on meanwhile."""
    for folder in folders(source):
        copy = target / folder.relative_to(source)
        try:
            shutil.copytree(folder / store.PARTIAL, copy)
        except OSError:  # it has just ended, and its files are in place
            shutil.rmtree(copy, ignore_errors=True)
        manifest = take_up(copy)
        if manifest is None:
            shutil.rmtree(copy, ignore_errors=True)
            continue
        error = {"error": {"name": "Interrupted", "value": OPEN, "cell": None}}
        more = {"earlier": [], "artefacts": store.artefacts(copy)}
        files.write_json(copy / "run.json", manifest | error | more)
    return target if target.exists() and store.manifests(target) else None
