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
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def checkout(commit: str, folder: Path) -> None:
    """The files of a commit in a folder, without its results."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "--", ".", ":!outputs"],
        check=True,
        capture_output=True,
    ).stdout
    folder.mkdir(parents=True)
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive, check=True)


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

    What a commit writes does not change, so that it is built once and kept with temporary files.
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
    with tempfile.TemporaryDirectory() as folder:
        if not old.exists():
            checkout(full, Path(folder) / "code")
            build(Path(folder) / "code", results, Path(folder) / "old", python)
            shutil.move(Path(folder) / "old", old)
        build(ROOT, results, Path(folder) / "new", python)
        yield old, Path(folder) / "new"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--set", type=Path, default=Path("outputs/released/h100-sxm"))
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    with both_reports(args.commit, args.set, args.python) as (old, new):
        before, after = files(old), files(new)
        different = [
            name
            for name in before.keys() & after.keys()
            if before[name].read_bytes() != after[name].read_bytes()
        ]
        for name in sorted(before.keys() ^ after.keys()):
            print(f"only {'before' if name in before else 'after'}: {name}")
        for name in sorted(different):
            print(f"differs: {name}\n{first_difference(before[name], after[name])}")
    count = len(before.keys() ^ after.keys()) + len(different)
    print(f"{len(after)} files, {count} of them not as at {args.commit}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
