"""Does this code write the same report, tables and claims as a commit did?

    python tools/same_report.py COMMIT [--set outputs/released/h100-sxm] [--python PATH]

builds the report of a result set twice, with the code of COMMIT and with that of this folder, and
compares every file by its bytes. Prints what differs, with the first lines; exits with 1 if
anything does. Standard library only.
"""

import argparse
import contextlib
import difflib
import hashlib
import operator
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def checkout(commit: str, folder: Path) -> None:
    """The files of a commit in a folder, with the predictions and scored clients that are here, and
    without results."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "--", ".", ":!outputs"],
        check=True,
        capture_output=True,
    ).stdout
    folder.mkdir(parents=True)
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive, check=True)
    for name in ("predictions", "released/clients"):
        shutil.copytree(ROOT / "outputs" / name, folder / "outputs" / name)


def build(code: Path, results: Path, out: Path, python: str) -> None:
    """The report of a result set by the code in a folder."""
    command = ["make", "report", f"FROM={results}", f"OUT={out}", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=code, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the report could not be built in {code}:\n{done.stderr[-2000:]}")


def files(folder: Path) -> dict[str, Path]:
    """Every file of a folder by its path below it."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def first_difference(old: Path, new: Path) -> str:
    """The first lines in which two text files differ, each cut at 200 characters."""
    texts = [path.read_text(encoding="utf-8", errors="replace").splitlines() for path in (old, new)]
    lines = [
        x for x in difflib.unified_diff(*texts, n=0, lineterm="") if x[:3] not in ("---", "+++")
    ]
    return "\n".join(f"    {line[:200]}" for line in lines[:6])


@contextlib.contextmanager
def both_reports(commit: str, results: Path, python: str) -> Iterator[tuple[Path, Path]]:
    """Folders with the report of a result set as a commit writes it and as this code does.

    What a commit writes does not change, so that it is built once and kept with temporary files,
    and with it a copy of the results.
    """
    results = (ROOT / results).resolve()
    full = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{commit}^{{commit}}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    name = hashlib.sha256(f"{full} {results}".encode()).hexdigest()[:12]
    old = Path(tempfile.gettempdir()) / f"same-report-{name}"
    # One place for both, which links and commands tell; of released sets reports know more.
    place = old.with_name(f"{old.name}-sets")
    with tempfile.TemporaryDirectory() as folder:
        if not old.exists():
            shutil.rmtree(place, ignore_errors=True)
            for part in (results.name, "visits"):
                if (results.parent / part).exists():
                    shutil.copytree(results.parent / part, place / part)
            checkout(full, Path(folder) / "code")
            build(Path(folder) / "code", place / results.name, Path(folder) / "old", python)
            shutil.move(Path(folder) / "old", old)
        build(ROOT, place / results.name, Path(folder) / "new", python)
        yield old, Path(folder) / "new"


def interpreter(name: str) -> str:
    """The absolute path of a Python, which is called from other folders."""
    return str(Path(shutil.which(name) or name).absolute())


def compare(
    title: str,
    noun: str,
    read: Callable[[Path], dict[Any, Any]],
    same: Callable[[Any, Any], bool] = operator.eq,
    show: Callable[[Any, Any], str] = "  {}\n  {}".format,
    name: Callable[[Any], str] = str,
) -> int:
    """The command line of a comparison of two reports; returns 1 where anything differs.

    `read` says what is in a report's folder by its place; `same` compares two of one place, `show`
    says in which way they differ, and `name` writes a place.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("commit")
    parser.add_argument("--set", type=Path, default=Path("outputs/released/h100-sxm"))
    parser.add_argument("--python", type=interpreter, default=sys.executable)
    args = parser.parse_args()
    with both_reports(args.commit, args.set, args.python) as (old, new):
        before, after = read(old), read(new)
        alone = sorted(before.keys() ^ after.keys())
        for place in alone:
            print(f"only {'before' if place in before else 'after'}: {name(place)}")
        common = sorted(before.keys() & after.keys())
        different = [place for place in common if not same(before[place], after[place])]
        for place in different:
            print(f"differs: {name(place)}\n{show(before[place], after[place])}")
    count = len(alone) + len(different)
    print(f"{len(after):,} {noun}, {count:,} of them not as at {args.commit}")
    return 1 if count else 0


def main() -> int:
    return compare(
        __doc__.splitlines()[0],
        "files",
        files,
        same=lambda old, new: old.read_bytes() == new.read_bytes(),
        show=first_difference,
    )


if __name__ == "__main__":
    sys.exit(main())
