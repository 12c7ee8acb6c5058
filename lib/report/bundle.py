"""A zip of results to send: report, rendered notebooks, tables, records, provenance, checksums.

Nothing personal may be inside, see `leaks`: it is refused, with file and line. The same results
give the same bytes.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lib.files import ParamsError, file_sha, require_room, short, write_json
from lib.records import store
from lib.records.jobs import find
from lib.records.record import environments
from lib.report import document, leaks
from lib.report.leaks import Leak

COPIED = ("run.json", "notebook.ipynb", "records.jsonl", "*.jsonl.gz")
SUMS, PROVENANCE = "SHA256SUMS", "provenance.json"
STAMP = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can carry


def stage(source: Path, folder: Path) -> None:
    """Copy what is shared into an empty folder, and write report, tables and pages beside it."""
    for job in find(source):
        listed = [str(item["path"]) for item in job.run.get("artefacts") or ()]
        for name in {p.name for pattern in COPIED for p in job.folder.glob(pattern)} | {*listed}:
            file, copy = job.folder / name, folder / job.path / name
            if file.is_file() and file.resolve().is_relative_to(source.resolve()):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    if (source / "plan.json").exists():
        shutil.copyfile(source / "plan.json", folder / "plan.json")
    document.write(folder, called=f"outputs/{source.name}")
    write_json(folder / PROVENANCE, provenance(folder))
    lines = [
        f"{file_sha(path)}  {path.relative_to(folder).as_posix()}\n" for path in leaks.files(folder)
    ]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def provenance(folder: Path) -> dict[str, Any]:
    """How each job ended and with which code, and every environment once."""
    fields = (
        "status",
        "start",
        "end",
        "attempt",
        "git",
        "lib_sha",
        "notebook_sha",
        "job_sha",
        "earlier",
        "env",
    )
    jobs = find(folder)
    envs = environments(row for job in jobs for row in job.records)
    runs = {job.path: {n: job.run[n] for n in fields if n in job.run} for job in jobs}
    return {"jobs": runs, "environments": dict(sorted(envs.items()))}


def pack(folder: Path, target: Path) -> None:
    """Zip a folder under its own name: sorted, one time stamp, one mode, so the same bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)  # a link there would lead the archive elsewhere
    try:
        with zipfile.ZipFile(partial, "x") as archive:
            for path in leaks.files(folder):
                name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
                info = zipfile.ZipInfo(name, STAMP)
                info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
                info.external_attr = 0o644 << 16
                archive.writestr(info, path.read_bytes(), compresslevel=9)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write(source: Path, target: Path, names: Iterable[tuple[str, str]]) -> Path:
    """The bundle of a folder of results. Raises where something personal is inside, naming it.

    `names` are words that must not be inside, each with what it is: see `leaks.here`.
    """
    store.refuse_released(target)
    if target.is_dir():
        raise ParamsError(f"{short(target)} is a folder; OUT takes a file, such as results.zip")
    if target.exists() and not target.is_file():  # a device, which the zip would replace
        raise ParamsError(f"{short(target)} is no file; OUT takes a file, such as results.zip")
    require_room(target.parent)
    if not source.is_dir() or not find(source):
        raise ParamsError(f"no results in {short(source)}; FROM takes a folder of run.json files")
    if damaged := [f"{job.path}: {job.damage}" for job in find(source) if job.damage]:
        raise ParamsError(f"not bundled, {damaged[0]}; measure it again first, or remove the job")
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / source.name
        folder.mkdir()
        stage(source, folder)
        if matches := leaks.find(folder, leaks.secrets(names)):
            raise ParamsError(_refusal(matches, source))
        pack(folder, target)
    return target


def _refusal(matches: Sequence[Leak], source: Path, limit: int = 20) -> str:
    """The leaks for people, without showing a secret whole."""
    lines = [f"not bundled, {len(matches)} personal texts in {short(source)}:"]
    for leak in matches[:limit]:
        text = f"{leak.text[:6]}..." if leak.what in leaks.TOKENS else leak.text
        where = f"{leak.file}, line {leak.line}" if leak.line else f"the name of {leak.file}"
        lines.append(f"  {where}: {leak.what} {text!r}")
    more = len(matches) - limit
    lines += [f"  and {more} more"] if more > 0 else []
    lines.append(
        "Remove them from notebooks and records, or measure again with FORCE=1; a word "
        "that is not personal is let through by --allow WORD (make: ARGS=)"
    )
    return "\n".join(lines)
