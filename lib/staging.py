"""A job's folder: what a running notebook writes appears there in one step when it has ended."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lib.files import write_json
from lib.records.store import PARTIAL, PREVIOUS


def begin(folder: Path) -> Path:
    """An empty folder in the job's folder; what a notebook writes into it appears when it ends."""
    discard(folder)
    (folder / PARTIAL).mkdir(parents=True)
    return folder / PARTIAL


def discard(folder: Path) -> None:
    """Drop what an unfinished run has left."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def promote(folder: Path, old: dict[str, Any] | None, *, keep_old: bool, spent: bool) -> None:
    """Put the files of the run that just ended in place, each by one atomic replacement.

    `old` is the run.json of the one that they replace. With `keep_old` its files are kept in
    `.previous/`; what that held before goes then, or where it is `spent`.
    """
    if keep_old or spent:
        shutil.rmtree(folder / PREVIOUS, ignore_errors=True)
    staged = folder / PARTIAL
    new = [path.relative_to(staged) for path in staged.rglob("*") if path.is_file()]
    names = [item["path"] for item in (old or {}).get("artefacts", ())]
    for name in [name for name in map(Path, [*names, "notebook.html"]) if (folder / name).exists()]:
        if keep_old:
            (folder / PREVIOUS / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, folder / PREVIOUS / name)
        if name not in new:
            (folder / name).unlink()
    if keep_old:
        write_json(folder / PREVIOUS / "run.json", old)
    for name in new:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(folder / name)
    shutil.rmtree(staged)
