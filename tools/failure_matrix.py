"""Write docs/failures.md: what can go wrong, and what the tests show happens then.

    python tools/failure_matrix.py

Every line is a case of a test's own table, so that none stands here which is not tested.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TARGET = ROOT / "docs" / "failures.md"
HEAD = """\
# What can go wrong, and what happens then

Made by `python tools/failure_matrix.py` from the tables of the tests named at each heading.
"""


def parts() -> Iterable[tuple[str, str, str, Sequence[str], Iterable[Sequence[str]]]]:
    """Title, test, a sentence, the columns and the lines of each table."""
    from tests import test_command_lines, test_environment, test_strangers
    from tests.report import test_bundle
    from tests.run import test_deaths, test_settle, test_several, test_truth

    def contexts(rows: set[int]) -> str:
        return " and ".join(f"the arm of {n}" for n in sorted(rows)) or "nothing"

    yield (
        "A run that dies while its results are put in place",
        "tests/run/test_settle.py",
        "Killed before each of its file operations. At every moment the folder holds the old run "
        "whole or the new one whole; where no finished run was there, what the new one had "
        "measured stays as an interrupted run's. The next run ends as an undisturbed one. Whole "
        "runs are killed at random times by `make kill-tests`. A run whose machine went away "
        "leaves its rows in `.partial`: the same command takes them up, and so does `make merge` "
        "of a copy.",
        ("history", "a finished run held", "afterwards"),
        [(n, contexts(a), contexts(b)) for n, (a, b) in test_settle.HISTORIES.items()],
    )
    yield (
        "Damaged results",
        "tests/run/test_truth.py",
        "The report says `damaged` and shows no row that was not measured; the console names the "
        "file, and the next run measures that job again, without FORCE.",
        ("damage", "file"),
        [(n, f"`{name}`") for n, (name, _) in test_truth.DAMAGE.items()],
    )
    yield (
        "Stale results",
        "tests/run/test_truth.py",
        "The result is kept; console and report say what it was measured with, and FORCE=1 "
        "measures again.",
        ("since then", "what is said"),
        [(f.__name__.replace("_", " "), f"`measured with {s}`") for f, s in test_truth.CHANGES],
    )
    yield (
        "A kernel that dies",
        "tests/run/test_deaths.py",
        "The job is `dead-kernel`, later jobs run, the exit status is 1, and no process is left.",
        ("death", "what is said (a pattern)"),
        [(n, f"`{says}`") for n, (_, says) in test_deaths.DEATHS.items()],
    )
    yield (
        "A GPU that is shared",
        "tests/run/test_several.py",
        "What is to be compared is refused there; the rows of other jobs say so, and are compared "
        "with nothing. With time slices of Kubernetes a neighbour is seen by the memory it holds, "
        "and the files of `make jobs` ask for nodes without them.",
        ("what the driver or a variable tells", "which makes it"),
        [
            (", ".join(f"{k} {v}" for k, v in (told | env).items()) or "nothing", _plain(reason))
            for told, env, reason in test_several.SHARED
        ],
    )
    yield (
        "Folders of others",
        "tests/test_strangers.py",
        "A report, a bundle, a merge or a run in such a folder does its work or refuses; no file "
        "outside is read into it, written or deleted.",
        ("what leads out", "as"),
        [
            *((f"a name in run.json, plan.json or a row: `{n!r}`", "refused")
              for n in test_strangers.OUTSIDE),
            *((f"a link in place of {n}", "refused, with what to remove")
              for n in test_strangers.LINKS),
        ],
    )  # fmt: skip
    yield (
        "Odd files",
        "tests/test_strangers.py",
        "Damage that the report tells, or one line that says what to remove or rename; no reader "
        "ends in a traceback or waits for ever.",
        ("what no run has written", "as"),
        [
            *((f"in a row: {n}", "damaged") for n in test_strangers.ODD_ROWS),
            *((f"in run.json: `{next(iter(x))}`", "damaged") for x in test_strangers.ODD_RUNS),
            *((f"as notebook: `{text:.60}`", "damaged") for text in test_strangers.NOTEBOOKS),
            *((n, "refused") for n in test_strangers.ODD_FILES),
            *((f"in a row of a script, `{n.strip()}`: `{value}`", "refused")
              for n, value in test_strangers.LOOSE.items()),
        ],
    )  # fmt: skip
    yield (
        "Secrets in a bundle",
        "tests/report/test_bundle.py",
        "The bundle is refused, with file and line; so is a file that cannot be looked through.",
        ("a token",),
        [
            *((n,) for n in (*test_bundle.HIDDEN, *test_bundle.SPLIT)),
            *((f"packed in {n}",) for n in test_bundle.PACKED),
        ],
    )
    yield (
        "What stands in place of .venv",
        "tests/test_environment.py",
        "What make has begun it builds anew; what is somebody else's it never deletes.",
        ("in its place", "then"),
        [(n, "built" if ours else "one paragraph") for n, (_, ours) in
         test_environment.HALF.items()],
    )  # fmt: skip
    yield (
        "What a variable of make holds",
        "tests/test_environment.py",
        "It is text: it arrives as it is, and neither make nor the shell evaluates it.",
        ("value",),
        [(f"`` {v.replace(chr(10), chr(0x21B5))} ``",) for v in test_environment.NASTY],
    )
    yield (
        "Bad command lines",
        "tests/test_command_lines.py",
        "Each ends with status 2 and one line that names the value and the fix.",
        ("python -m lib ...", "the line holds"),
        [
            (f"`{_short(line)}`" if line else "(nothing)", f"`{_short(value)}`; `{fix}`")
            for line, value, fix in test_command_lines.BAD
        ],
    )


def _plain(pattern: str) -> str:
    return f"shared: {pattern}".replace("\\", "") if pattern else "its own"


def _short(text: str) -> str:
    return text if len(text) < 70 else f"{text[:40]}... ({len(text)} letters)"


def text() -> str:
    """The page."""
    lines = [HEAD]
    for title, test, sentence, columns, rows in parts():
        cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines += [f"## {title}", "", f"`{test}`, {len(cells)} cases. {sentence}", ""]
        lines += [f"| {' | '.join(row)} |" for row in (columns, [":--"] * len(columns), *cells)]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
