"""A zip of results to send: report, rendered notebooks, tables, records, provenance, checksums.

Nothing personal may be inside: text with a user name, a home folder, the name of this host or a
token is refused, with file and line. The same results give the same bytes.
"""

from __future__ import annotations

import contextlib
import getpass
import gzip
import re
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.files import ParamsError, file_sha, short, write_json
from lib.records import store
from lib.records.jobs import find
from lib.records.record import environments
from lib.report import document

COPIED = ("run.json", "notebook.ipynb", "records.jsonl", "*.jsonl.gz")
SUMS, PROVENANCE = "SHA256SUMS", "provenance.json"
STAMP = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can carry
# Names that are no one's: accounts of containers and images, and words of every text.
COMMON = {
    "root",
    "user",
    "users",
    "admin",
    "ubuntu",
    "debian",
    "jovyan",
    "runner",
    "docker",
    "nobody",
    "guest",
    "default",
    "home",
    "host",
    "local",
    "localhost",
    "server",
    "linux",
    "test",
    "python",
    "model",
    "models",
}
TOKENS = {
    "Hugging Face token": r"hf_[A-Za-z0-9]{20,}",
    "GitHub token": r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}",
    "GitLab token": r"glpat-[\w-]{20,}",
    "API key": r"sk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}",
    "AWS key": r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    "Google key": r"AIza[\w-]{35}",
    "Slack token": r"xox[abprs]-[\w-]{10,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "signed web token": r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "password in an address": r"[a-z]+://[^\s/:@\"'<>]+:[^\s/:@\"'<>]+@",
}
HOMES = r"/(?:home|Users|root)/[\w.-]+|[A-Za-z]:\\+Users\\+[\w.-]+"
ALONE = r"(?<![\w+/.~])"  # not inside a longer word, a relative path or base64
BASE64 = re.compile(r"[A-Za-z0-9+/]{120,}={0,2}")


@dataclass(frozen=True)
class Leak:
    """Something personal in a file: where, which kind, and the text itself."""

    file: str
    line: int
    what: str
    text: str


def secrets(names: Iterable[tuple[str, str]] = ()) -> list[tuple[str, re.Pattern[str]]]:
    """What must not be inside: a pattern, and what it finds; `names` are words such as a user's."""
    patterns = [(what, re.compile(f"{ALONE}(?:{pattern})")) for what, pattern in TOKENS.items()]
    patterns.append(("home folder", re.compile(rf"(?:file://|{ALONE})(?:{HOMES})")))
    for what, name in names:
        if len(name) > 2 and name.lower() not in COMMON:
            patterns.append((what, re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")))
    return patterns


def here() -> list[tuple[str, str]]:
    """Names of this machine and its user; a host counts with and without its domain."""
    host, home = socket.gethostname(), Path.home()
    names = [("host name", host), ("host name", host.split(".")[0])]
    with contextlib.suppress(KeyError, OSError):  # a user id may have no account
        names.append(("user name", getpass.getuser()))
    if len(home.parts) > 2:
        names += [("user name", home.name), ("home folder", str(home))]
    return list(dict.fromkeys(names))


def leaks(folder: Path, patterns: Sequence[tuple[str, re.Pattern[str]]]) -> list[Leak]:
    """Every match in the names and the texts of a folder's files, compressed ones too."""
    matches = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        for number, line in enumerate([name, *_text(path).splitlines()]):
            for what, pattern in patterns:
                text = line if what in TOKENS else BASE64.sub("", line)
                if match := pattern.search(text):
                    matches.append(Leak(name, number, what, match.group()))
    return matches


def _text(path: Path) -> str:
    """The text of a file; empty where it is no text."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return "" if b"\0" in data[:8000] else data.decode("utf-8", errors="replace")


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
        f"{file_sha(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder)
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


def _files(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def pack(folder: Path, target: Path) -> None:
    """Zip a folder under its own name: sorted, one time stamp, one mode, so the same bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for path in _files(folder):
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            info = zipfile.ZipInfo(name, STAMP)
            info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, path.read_bytes(), compresslevel=9)
    partial.replace(target)


def write(source: Path, target: Path, names: Iterable[tuple[str, str]]) -> Path:
    """The bundle of a folder of results. Raises where something personal is inside, naming it.

    `names` are words that must not be inside, each with what it is: see `here`.
    """
    store.refuse_released(target)
    if not source.is_dir() or not find(source):
        raise ParamsError(f"no results in {short(source)}; FROM takes a folder of run.json files")
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / source.name
        folder.mkdir()
        stage(source, folder)
        if matches := leaks(folder, secrets(names)):
            raise ParamsError(_refusal(matches, source))
        pack(folder, target)
    return target


def _refusal(matches: Sequence[Leak], source: Path, limit: int = 20) -> str:
    """The leaks for people, without showing a secret whole."""
    lines = [f"not bundled, {len(matches)} personal texts in {short(source)}:"]
    for leak in matches[:limit]:
        text = f"{leak.text[:6]}..." if leak.what in TOKENS else leak.text
        where = f"{leak.file}, line {leak.line}" if leak.line else f"the name of {leak.file}"
        lines.append(f"  {where}: {leak.what} {text!r}")
    more = len(matches) - limit
    lines += [f"  and {more} more"] if more > 0 else []
    lines.append(
        "Remove them from notebooks and records, or measure again with FORCE=1; a word "
        "that is not personal is let through by --allow WORD (make: ARGS=)"
    )
    return "\n".join(lines)
