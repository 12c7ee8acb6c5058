"""What the data of arXiv:2508.16700 cannot say, where the study's modules look for it.

AUDIT are the rules of its audit by topic, CLAIMS those of the claims that no form fits, `part` its
own pieces of a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from matplotlib.axes import Axes

from lib.records.record import Record
from lib.show import figure, html
from lib.show.table import Table, markdown
from lib.show.wording import Finding
from lib.studies.arxiv_2508_16700 import audit, claims, ladder, rankings
from lib.studies.html import prose
from lib.studies.study import Published, load

AUDIT = {
    "latency": audit.LATENCY,
    "memory": audit.MEMORY,
    "energy": audit.ENERGY,
    "efficiency": audit.EFFICIENCY,
    "ablations": audit.ABLATIONS,
    "governance": audit.GOVERNANCE,
    "arithmetic": audit.ARITHMETIC,
}
CLAIMS = claims.RULES
Curve = tuple[str, str, str, list[float], list[float]]  # label, model, line style, x, y


def part(
    records: Sequence[Record], study: Published
) -> tuple[dict[str, str], list[Table], list[Finding]]:
    """Ladder and rankings as HTML, as tables, and in a sentence."""
    rungs, orders = ladder.rungs(records, study), rankings.rankings(records, study)
    tables = [ladder.table(rungs, study), rankings.table(orders)]
    picture = figure.html(ladder.ladder(rungs, tables[0].title), ladder.reads(records, study))
    pieces = {
        "ladder": picture + html.grid_html(tables[0], "ladder-rungs", "The rungs of the ladder"),
        "rankings": rankings_html(tables[1]),
    }
    return pieces, tables, ladder.finding(rungs, study)


def ladder_figure(records: Sequence[Record]) -> Axes:
    """The ratio ladder as a figure."""
    study = load()
    rungs = ladder.rungs(records, study)
    return ladder.ladder(rungs, ladder.table(rungs, study).title)


def show_ladder(records: Sequence[Record]) -> None:
    """The ratio ladder with its caption, in a notebook."""
    figure.show(ladder_figure(records), ladder.reads(records, load()))


def ladder_text(records: Sequence[Record]) -> str:
    """The rungs of the ladder with their causes as Markdown, for a notebook."""
    study = load()
    return markdown(ladder.table(ladder.rungs(records, study), study))


def rankings_text(records: Sequence[Record]) -> str:
    """The rankings as Markdown, for a notebook."""
    return markdown(rankings.table(rankings.rankings(records, load())))


def rankings_html(table: Table) -> str:
    """The rankings, one place a line."""
    head = "".join(f'<th scope="col" class="text">{escape(c.title)}</th>' for c in table.columns)
    body = ""
    for metric, *cells in table.rows:
        lines = (
            "".join(f"<div>{escape(part)}</div>" for part in cell.split("; ")) for cell in cells
        )
        body += f'<tr><th scope="row">{escape(metric)}</th>'
        body += "".join(f"<td>{cell}</td>" for cell in lines) + "</tr>"
    note = f'<p class="note">{escape(table.notes[0].capitalize())}.</p>'
    caption = f"<b>{escape(table.title)}.</b>{note}"
    return prose(html.figure("rankings", caption, f"<tr>{head}</tr>", body))


def throughput_curves(study: Published) -> list[Curve]:
    """Per model the printed throughput and the decode-only slope of its released call times."""
    curves: list[Curve] = []
    for title in study.models:
        at, model = study.contexts, study.entry(title)[0]
        printed = [study.value(2, c, title) for c in at]
        decode = [audit.decode_tok_per_s(study, title, c) for c in at]
        curves.append((f"{title}, printed", model, "-", at, printed))
        curves.append((f"{title}, decode only", model, "--", at, decode))
    return curves


def ttft_curves(study: Published) -> list[Curve]:
    """Per model the printed TTFT and the released median (ms)."""
    curves: list[Curve] = []
    for title in study.models:
        at, model = study.contexts, study.entry(title)[0]
        printed = [study.value(3, c, title) for c in at]
        median = [study.fact("ttft_median_ms", title, c) for c in at]
        curves.append((f"{title}, printed", model, "-", at, printed))
        curves.append((f"{title}, released median", model, "--", at, median))
    return curves
