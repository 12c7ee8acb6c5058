"""The claims and tables of a study as HTML, each cell beside the verdict on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from lib.show.html import Footnotes, _header, figure, number_cell
from lib.show.wording import interval
from lib.stats import Estimate
from lib.studies import claims, governance, paper_tables
from lib.studies.claims import Entry
from lib.studies.paper_tables import CHANGES, HEADS, Cell, PaperTable
from lib.studies.schema import Column
from lib.studies.study import Published
from lib.studies.verdict import (
    DIRECTION,
    NOT,
    REPRODUCED,
    TIE,
    TOLERANCES,
    UNTESTABLE,
    WORDS,
    Verdict,
)

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
SIGNS = {
    REPRODUCED: ("✓", "holds"),
    DIRECTION: ("≈", "partly"),
    NOT: ("✗", "fails"),
    UNTESTABLE: ("?", "open"),
}


def ledger_html(entries: Sequence[Entry]) -> str:
    """The claims ledger: one claim a row, in the order of the paper."""
    notes = Footnotes("ledger")
    head = "".join(
        f'<th scope="col" class="text"{_sortable(i) if t in SORTED else ""}>{t}</th>'
        for i, t in enumerate(HEAD)
    )
    body = "".join(_entry(entry, notes) for entry in entries)
    counts = claims.counts(entries)
    verdicts = ", ".join(f"{counts[word]} {word}" for word in WORDS)
    caption = (
        f"<b>Claims ledger.</b> {len(entries)} claims: {verdicts}. "
        f'<span class="where">{escape(tolerances())}</span>'
    )
    return prose(figure("ledger", caption, f"<tr>{head}</tr>", body, notes.html()))


def prose(html: str) -> str:
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
    corrected_as = m.corrected_as if any(x.value is not None for x in m.corrected.values()) else ""
    causes = "".join(f"<li>{escape(cause)}</li>" for cause in entry.causes)
    if entry.differs:
        full = "; ".join(f"{what}: {how}" for what, how in entry.differs.items())
        causes += f"<li>differs in {', '.join(entry.differs)}{notes.mark(full)}</li>"
    return (
        f'<tr id="claim-{escape(entry.name)}"><th scope="row">{escape(claim["text"])}'
        f'<span class="ci">{escape(claim["where"])}</span></th>'
        f"<td>{escape(entry.printed).replace(' %', '&nbsp;%')}{_small(meant)}</td>"
        f"{_column(m.protocol, entry.unit, notes)}"
        f"{_column(m.corrected, entry.unit, notes, entry.verdicts['corrected'], corrected_as)}"
        f"{_column(m.bound, entry.unit, notes, entry.verdicts['bound'])}"
        f'<td data-value="{WORDS.index(entry.verdict.word)}">{verdict_mark(entry.verdict)} '
        f"<b>{entry.verdict.word}</b>{_small(entry.verdict.why)}</td>"
        f'<td class="cause"><ul>{causes}</ul></td></tr>'
    )


def _small(text: str) -> str:
    return f'<span class="ci">{escape(text)}</span>' if text else ""


def _column(
    estimates: dict[str, Estimate],
    unit: str,
    notes: Footnotes,
    verdict: Verdict | None = None,
    corrected_as: str = "",
) -> str:
    """Each value with interval, n and what it is of; or the reasons, each once under the table."""
    if all(x.value is None for x in estimates.values()):
        reasons = dict.fromkeys(x.reason for x in estimates.values())
        return f'<td class="missing">–{"".join(map(notes.mark, reasons))}</td>'
    lines = []
    for label, x in estimates.items():
        if x.value is None:
            lines.append(f'–{notes.mark(x.reason)} <span class="ci">{escape(label)}</span>')
            continue
        details = ", ".join(filter(None, (interval(x), f"n = {x.n}" if x.n > 1 else "", label)))
        value = f"{claims.value_text(x)} {unit}".strip()
        lines.append(
            f'<span class="v" title="{escape(x.method)}">{escape(value)}</span>{_small(details)}'
        )
    if verdict is not None and verdict.word != UNTESTABLE:
        lines[0] = f"{verdict_mark(verdict)} {lines[0]}"
    items = "".join(f"<div>{line}</div>" for line in lines)
    return f"<td>{items}{_small(corrected_as)}</td>"


def governance_html(study: Published) -> str:
    """The table of licences and policies with its sources as links."""
    table = governance.table(study)
    head = "".join(
        f'<th scope="col" class="text" data-col="{i}">{escape(c.title)}</th>'
        for i, c in enumerate(table.columns)
    )
    body = "".join(_governance_row(row) for row in table.rows)
    caption = f"<b>Table {governance.number(study)}.</b> {escape(table.title)}."
    below = "".join(f'<p class="note">{escape(note)}.</p>' for note in table.notes)
    return prose(figure(table.name, caption, f"<tr>{head}</tr>", body, below))


def _governance_row(row: tuple[Any, ...]) -> str:
    model, field, paper, publisher, verdict, sources, date = row
    links = " ".join(_link(url, f"[{n}]") for n, url in enumerate(sources.split(), start=1))
    stated = _link(publisher, "link") if publisher.startswith("https://") else escape(publisher)
    cells = (escape(field), escape(paper), stated, escape(verdict), links, escape(date))
    return (
        f'<tr><th scope="row">{escape(model)}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    )


def _link(url: str, text: str) -> str:
    return f'<a href="{escape(url)}" rel="noreferrer" title="{escape(url)}">{text}</a>'


def paper_html(table: PaperTable, table_id: str, context: Sequence[str]) -> str:
    """One of the paper's tables: for each column the paper's value, ours and the ratio.

    `context` are the sentences of the caption that hold for the whole table (GPUs, weights).
    """
    notes = Footnotes(table_id)
    first = HEADS[table.spec.get("rows_are", "model")]
    top, second, index = [f'<th scope="col" rowspan="2" data-col="0">{first}</th>'], [], 1
    for name, column in table.columns:
        parts, meant = _parts(column), paper_tables.meant(column)
        same = meant == column["unit"] or meant.startswith("output") or ";" in meant
        unit = "" if same else f"in {meant}"
        title = escape(name) + (f' <span class="unit">{escape(unit)}</span>' if unit else "")
        top.append(f'<th scope="colgroup" class="group" colspan="{len(parts)}">{title}</th>')
        for part in parts:
            edge = ' group"' if part == "paper" else '"'
            header = _header(part, index).replace('class="num"', f'class="num{edge}')
            second.append(header)
            index += 1
    body = "".join(_paper_row(table, *row, notes) for row in table.rows)
    caption = (
        f"<b>Table {table.number}.</b> {escape(table.spec['title'])}. "
        f'<span class="where">{escape(" ".join(context))} '
        f"Paper: {escape(table.spec['where'])}.</span>"
    )
    note = table.spec.get("note", "")
    below = _account(table) + (f'<p class="note">{escape(note)}</p>' if note else "")
    head = f"<tr>{''.join(top)}</tr><tr>{''.join(second)}</tr>"
    return figure(table_id, caption, head, body, below + notes.html())


def _parts(column: Column) -> list[str]:
    """Changes have no ratio column."""
    change = column.get("form") in CHANGES
    return ["paper", "measured"] if change else ["paper", "measured", "ratio"]


def _paper_row(
    table: PaperTable, label: str, note: str, cells: Sequence[Cell], notes: Footnotes
) -> str:
    html = [f'<th scope="row">{escape(label)}{f" {_small(note)}" if note else ""}</th>']
    for (_, column), cell in zip(table.columns, cells, strict=True):
        decimals = len((cell.printed or "0.00").partition(".")[2])
        if cell.printed is None:
            html.append('<td class="num group" data-value="">–</td>')
        else:
            html.append(
                f'<td class="num group paper" data-value="{cell.printed}">'
                f"{float(cell.printed):,.{decimals}f}</td>"
            )
        mark = verdict_mark(cell.verdict)
        ratio = "ratio" in _parts(column)
        html.append(
            number_cell(
                cell.measured,
                notes,
                decimals=decimals,
                label=cell.note,
                css="measured",
                mark="" if ratio else mark,
            )
        )
        if ratio:
            html.append(_ratio_cell(cell, notes, mark))
    return f"<tr>{''.join(html)}</tr>"


def _ratio_cell(cell: Cell, notes: Footnotes, mark: str) -> str:
    if cell.ratio.value is None and cell.measured.value is not None:
        return f'<td class="num ratio" data-value="" title="{escape(cell.ratio.reason)}">–</td>'
    if cell.ratio.value is None:
        return '<td class="num ratio missing" data-value="">–</td>'
    # Its interval is the measured one divided by the printed value: in the title, not in print.
    return number_cell(
        cell.ratio, notes, decimals=3, label=cell.note, css="ratio", show_interval=False, mark=mark
    )


def verdict_mark(verdict: Verdict) -> str:
    """A verdict as one sign: ✓ reproduced, ≈ direction only, ✗ not reproduced, ? not testable."""
    if not verdict.word:
        return ""
    sign, css = SIGNS[verdict.word]
    text = escape(str(verdict), quote=True)
    names = f'title="{text}" aria-label="{text}"'
    return f'<span class="verdict {css}" role="img" {names}>{sign}</span>'


def _account(table: PaperTable) -> str:
    """How the cells of a table stand: verdicts by count, and the repetitions behind them."""
    words = Counter(cell.verdict.word for cell in table.cells)
    parts = [f"{words[word]} {word}" for word in SIGNS if words[word]]
    n = sorted({cell.n for cell in table.cells if cell.measured.value is not None and cell.n > 1})
    if n:
        parts.append(f"n = {n[0]}" + (f" to {n[-1]}" if len(n) > 1 else ""))
    return f'<p class="note">Verdicts: {"; ".join(parts)}.</p>' if parts else ""
