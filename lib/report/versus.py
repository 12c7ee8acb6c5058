"""The page of an upgrade verdict, and the same as Markdown, from the rows of a run."""

from __future__ import annotations

from pathlib import Path

from lib.analysis import glossary, versus, versus_why
from lib.files import write_text
from lib.records import store
from lib.show.page import data_link, document
from lib.show.table import Table
from lib.show.wording import bullets


def summary(run: versus.Run) -> str:
    """The verdicts and the reasons as Markdown."""
    verdicts = bullets([v.text for v in versus.verdicts(run)])
    lines = [*versus_why.why(run), *versus_why.cautions(run)]
    return f"{versus.headline(run)}\n\n{verdicts}\n\nWhy:\n\n{bullets(lines)}\n"


def tables(run: versus.Run) -> list[Table]:
    """Verdicts, what else differs, versions."""
    return [versus.verdict_table(run), versus_why.why_table(run), versus.version_table(run)]


def write(folder: Path) -> Path:
    """report.html, verdict.md and CSV files into the folder of a run; returns the page."""
    store.refuse_released(folder)
    run = versus.load(folder)
    grids = tables(run)
    parts = [summary(run), *(grid.markdown() for grid in grids)]
    write_text(folder / "verdict.md", "\n\n".join(parts) + "\n")
    page = document(
        "versus.html",
        terms=glossary.terms(),
        title="Upgrade verdict: B against A",
        kicker="Deployment workbook · versus",
        subtitle=versus.headline(run),
        verdicts=[v.text for v in versus.verdicts(run)],
        reasons=versus_why.why(run),
        cautions=versus_why.cautions(run),
        grids=grids,
        environments=[(letter, run.manifest[letter]["text"]) for letter in versus.SIDES],
        downloads=[(grid.name, data_link(grid.write_csv(folder).read_bytes())) for grid in grids],
        footer=f"Measured from {run.manifest['start']} on, {len(run.rounds)} of "
        f"{run.manifest['rounds']} rounds.",
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"
