"""The report's part on a published study: ladder, rankings, claims ledger and table 13, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from lib import governance as lib_governance
from lib import judge, published, verdicts
from lib import ladder as lib_ladder
from lib import rankings as lib_rankings
from lib.analysis.series import paper_name
from lib.judge import TIE, TOLERANCES, WORDS, Ruling
from lib.published import Published
from lib.records.record import Record
from lib.show import figure as show_figure
from lib.show import table as show_table
from lib.show.html import Footnotes, figure, grid_html, verdict_mark
from lib.show.table import Table, frame
from lib.show.wording import Finding, interval
from lib.stats import Estimate
from lib.verdicts import Entry

HEAD = (
    "Claim",
    "The paper",
    "Measured, by its protocol",
    "Corrected definition",
    "Device-bound",
    "Verdict",
    "Cause",
)
SORTED = ("Claim", "Verdict")  # the other columns hold unlike quantities


@dataclass(frozen=True)
class Part:
    """HTML of each piece, the files that were written, and sentences for the abstract."""

    ladder: str
    rankings: str
    ledger: str
    governance: str
    files: list[Path]
    findings: list[Finding]


def part(records: Sequence[Record], study: Published, out_dir: str | Path) -> Part | None:
    """Everything of the study beside the rows; None where none of its models was measured."""
    mine = [
        r for r in records if r.kind == "environment" or paper_name(r.key.get("model"), study.data)
    ]
    entries = verdicts.ledger(mine, study)
    if not entries:
        return None
    rungs, orders = lib_ladder.rungs(mine, study), lib_rankings.rankings(mine, study)
    tables = [lib_ladder.table(rungs, study), lib_rankings.table(orders)]
    files = [
        *verdicts.write_csv(entries, out_dir),
        *lib_governance.write_csv(study, out_dir),
        *(_write(table, out_dir) for table in tables),
    ]
    picture = show_figure.html(
        show_figure.ladder(rungs, tables[0].title), lib_ladder.reads(mine, study)
    )
    return Part(
        ladder=picture + grid_html(tables[0], "ladder-rungs", "The rungs of the ladder"),
        rankings=rankings_html(tables[1]),
        ledger=ledger_html(entries),
        governance=governance_html(study),
        files=files,
        findings=[*lib_ladder.finding(rungs, study), *verdicts.finding(entries)],
    )


def ledger_text(records: Sequence[Record]) -> str:
    """The claims ledger as Markdown, for a notebook."""
    return show_table.markdown(verdicts.table(verdicts.ledger(records, published.load())))


def ladder_figure(records: Sequence[Record]) -> Axes:
    """The ratio ladder as a figure."""
    study = published.load()
    rungs = lib_ladder.rungs(records, study)
    return show_figure.ladder(rungs, lib_ladder.table(rungs, study).title)


def show_ladder(records: Sequence[Record]) -> None:
    """The ratio ladder with its caption, in a notebook."""
    show_figure.show(ladder_figure(records), lib_ladder.reads(records, published.load()))


def ladder_text(records: Sequence[Record]) -> str:
    """The rungs of the ladder with their causes as Markdown, for a notebook."""
    study = published.load()
    return show_table.markdown(lib_ladder.table(lib_ladder.rungs(records, study), study))


def rankings_text(records: Sequence[Record]) -> str:
    """The rankings as Markdown, for a notebook."""
    return show_table.markdown(lib_rankings.table(lib_rankings.rankings(records, published.load())))


def _write(table: Table, out_dir: str | Path) -> Path:
    path = Path(out_dir) / "tables" / f"{table.name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(frame(table, digits=8).to_csv(index=False), encoding="utf-8")
    return path


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
    return _prose(figure("rankings", caption, f"<tr>{head}</tr>", body))


def ledger_html(entries: Sequence[Entry]) -> str:
    """The claims ledger: one claim a row, in the order of the paper."""
    notes = Footnotes("ledger")
    head = "".join(
        f'<th scope="col" class="text"{_sortable(i) if t in SORTED else ""}>{t}</th>'
        for i, t in enumerate(HEAD)
    )
    body = "".join(_entry(entry, notes) for entry in entries)
    counts = verdicts.counts(entries)
    said = ", ".join(f"{counts[word]} {word}" for word in WORDS)
    caption = (
        f"<b>Claims ledger.</b> {len(entries)} claims: {said}. "
        f'<span class="where">{escape(tolerances())}</span>'
    )
    return _prose(figure("ledger", caption, f"<tr>{head}</tr>", body, notes.html()))


def _prose(html: str) -> str:
    """A table of sentences: its cells wrap."""
    return html.replace('class="data sortable"', 'class="data sortable prose"', 1)


def _sortable(index: int) -> str:
    return f' data-col="{index}"'


def tolerances() -> str:
    """The rules of the verdicts in words, from the constants that they use."""
    t, m = TOLERANCES["time"], TOLERANCES["memory"]
    few = TOLERANCES["effect"]
    return (
        f"A value is reproduced if its 95 % interval lies within {t.share:.0%} of the printed one "
        f"({t.points:g} percentage points where it is a percentage) for time, throughput and "
        f"energy, {m.share:.0%} ({m.points:g} points) for memory, {few.points:g} point for effects "
        "of a few percent, or one unit of the last printed digit. An order is reproduced if every "
        f"ratio is resolved and differs from 1 by more than {TIE:.0%}. Without an interval nothing "
        "is decided, except for counts and readings of the allocator."
    )


def _entry(entry: Entry, notes: Footnotes) -> str:
    claim, m = entry.claim, entry.measured
    meant = f"meant: {claim['meant']}" if claim.get("meant") else ""
    as_said = m.corrected_as if any(x.value is not None for x in m.corrected.values()) else ""
    causes = "".join(f"<li>{escape(cause)}</li>" for cause in entry.causes)
    if entry.differs:
        full = "; ".join(f"{what}: {how}" for what, how in entry.differs.items())
        causes += f"<li>differs in {', '.join(entry.differs)}{notes.mark(full)}</li>"
    return (
        f'<tr id="claim-{escape(entry.name)}"><th scope="row">{escape(claim["text"])}'
        f'<span class="ci">{escape(claim["where"])}</span></th>'
        f"<td>{escape(entry.printed).replace(' %', '&nbsp;%')}{_small(meant)}</td>"
        f"{_column(m.protocol, entry.unit, notes)}"
        f"{_column(m.corrected, entry.unit, notes, entry.rulings['corrected'], as_said)}"
        f"{_column(m.bound, entry.unit, notes, entry.rulings['bound'])}"
        f'<td data-value="{WORDS.index(entry.verdict.word)}">{verdict_mark(entry.verdict)} '
        f"<b>{entry.verdict.word}</b>{_small(entry.verdict.why)}</td>"
        f'<td class="cause"><ul>{causes}</ul></td></tr>'
    )


def _small(text: str) -> str:
    return f'<span class="ci">{escape(text)}</span>' if text else ""


def _column(
    found: dict[str, Estimate],
    unit: str,
    notes: Footnotes,
    ruling: Ruling | None = None,
    as_said: str = "",
) -> str:
    """Each value with interval, n and what it is of; or the reasons, each once under the table."""
    first = next((x.value for x in found.values() if x.value is not None), None)
    if first is None:
        marks = "".join(notes.mark(why) for why in dict.fromkeys(x.reason for x in found.values()))
        return f'<td class="missing">–{marks}</td>'
    lines = []
    for label, x in found.items():
        if x.value is None:
            lines.append(f'–{notes.mark(x.reason)} <span class="ci">{escape(label)}</span>')
            continue
        details = ", ".join(filter(None, (interval(x), f"n = {x.n}" if x.n > 1 else "", label)))
        value = f"{verdicts.shown(x)} {unit}".strip()
        lines.append(
            f'<span class="v" title="{escape(x.method)}">{escape(value)}</span>{_small(details)}'
        )
    if ruling is not None and ruling.word != judge.UNTESTABLE:
        lines[0] = f"{verdict_mark(ruling)} {lines[0]}"
    items = "".join(f"<div>{line}</div>" for line in lines)
    return f"<td>{items}{_small(as_said)}</td>"


def governance_html(study: Published) -> str:
    """Table 13 with its sources as links."""
    table = lib_governance.table(study)
    head = "".join(
        f'<th scope="col" class="text" data-col="{i}">{escape(c.title)}</th>'
        for i, c in enumerate(table.columns)
    )
    body = "".join(_governance_row(row) for row in table.rows)
    caption = f"<b>Table 13.</b> {escape(table.title)}."
    below = "".join(f'<p class="note">{escape(note)}.</p>' for note in table.notes)
    return _prose(figure("table-13", caption, f"<tr>{head}</tr>", body, below))


def _governance_row(row: tuple[Any, ...]) -> str:
    model, field, paper, publisher, verdict, sources, date = row
    links = " ".join(_link(url, f"[{n}]") for n, url in enumerate(sources.split(), start=1))
    shown = _link(publisher, "link") if publisher.startswith("https://") else escape(publisher)
    cells = (escape(field), escape(paper), shown, escape(verdict), links, escape(date))
    return (
        f'<tr><th scope="row">{escape(model)}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    )


def _link(url: str, text: str) -> str:
    return f'<a href="{escape(url)}" rel="noreferrer" title="{escape(url)}">{text}</a>'
