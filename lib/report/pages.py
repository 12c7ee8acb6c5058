"""Which pages this program wrote here: only those are taken over instead of being made again.

A folder of results may come from others. What a page in it says of itself proves nothing, so that
the hashes of all pages that were written are kept in the user's cache, where no such folder is.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from lib.files import ParamsError, cache_dir, file_sha, write_text
from lib.records.store import sha

NAME = "pages.txt"  # in the cache: a hash a line, the newest last
HEAD = 4096  # characters of a page that hold what it was made from
MOST = 4_000_000  # bytes of it; beyond, the older half goes
OWN: set[str] = set()  # what this process wrote, also where nothing can be kept
NOWHERE = (OSError, ParamsError)  # no cache: then pages are made again, which only takes longer


def write(path: Path, text: str, beside: Iterable[Path] = ()) -> None:
    """Write a page, and remember it with the files `beside` it that are to stay as they are."""
    write_text(path, text)
    digest = _digest(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), beside)
    OWN.add(digest)
    with contextlib.suppress(*NOWHERE):
        file = cache_dir() / NAME
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="ascii") as listed:
            listed.write(f"\n{digest}")  # its own line, also after half of one


def is_current(path: Path, made: str, beside: Iterable[Path] = ()) -> bool:
    """Whether a page says that it was made from this, and is_own."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            same = f'content="{made}"' in file.read(HEAD)
        return same and is_own(path, beside)
    except OSError:  # there is none, or none for us
        return False


def is_own(path: Path, beside: Iterable[Path] = ()) -> bool:
    """Whether a page, with the files beside it, is one that this program wrote here."""
    digest = _digest(file_sha(path), beside)
    if digest in OWN:
        return True
    try:
        file = cache_dir() / NAME
        state = file.stat()
        return digest in _listed(file, state.st_size, state.st_mtime_ns)
    except NOWHERE:
        return False


def _digest(page_sha: str, beside: Iterable[Path]) -> str:
    return sha([page_sha, *([file.name, file_sha(file)] for file in sorted(beside))])


@functools.lru_cache(maxsize=1)
def _listed(file: Path, size: int, mtime_ns: int) -> frozenset[str]:
    """The hashes of a list that has this size and time."""
    with file.open("rb") as lines:
        if size > MOST:
            lines.seek(size - MOST // 2)
        text = lines.read().decode("ascii", errors="replace")
    if size > MOST:
        with contextlib.suppress(OSError):
            write_text(file, text)
    return frozenset(text.split())
