"""Tables of estimates as HTML: the value with its interval, n and method on the cell itself."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from lib.judge import DIRECTION, NOT, REPRODUCED, UNTESTABLE, Ruling
from lib.papertables import Cell, PaperTable
from lib.show.table import Table
from lib.show.wording import interval, number_text, short
from lib.stats import Estimate

SIGNS = {
    REPRODUCED: ("✓", "holds"),
    DIRECTION: ("≈", "partly"),
    NOT: ("✗", "fails"),
    UNTESTABLE: ("?", "open"),
}


class Footnotes:
    """Reasons under one table, each once, marked a, b, c in the order of appearance."""

    def __init__(self, table_id: str) -> None:
        self.table_id = table_id
        self.reasons: list[str] = []

    def mark(self, reason: str) -> str:
        """The mark of a reason, linked to its text."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        name = _letters(self.reasons.index(reason))
        return f'<a class="mark" href="#{self.table_id}-{name}">{name}</a>'

    def html(self) -> str:
        """The reasons as a list."""
        items = "".join(
            f'<li id="{self.table_id}-{_letters(i)}"><b>{_letters(i)}</b> {escape(reason)}</li>'
            for i, reason in enumerate(self.reasons)
        )
        return f'<ul class="footnotes">{items}</ul>' if items else ""


def _letters(index: int) -> str:
    more, last = divmod(index, 26)
    return (_letters(more - 1) if more else "") + string.ascii_lowercase[last]


def number_cell(
    estimate: Estimate,
    notes: Footnotes,
    *,
    decimals: int | None = None,
    label: str = "",
    css: str = "",
    show_interval: bool = True,
    mark: str = "",
) -> str:
    """A cell with a number and its interval; n, method and setup in its title and data-."""
    css = f"num {css}".strip()
    if estimate.value is None:
        mark = notes.mark(estimate.reason or "not measured")
        return f'<td class="{css} missing" data-value="">–{mark}</td>'
    say = short if decimals is None else lambda x: f"{x:,.{decimals}f}"
    span = interval(estimate)
    details = [
        f"n = {estimate.n}" if estimate.n else "",
        estimate.method,
        f"95 % interval {span}" if span else estimate.reason,
        label,
    ]
    data = {
        "value": number_text(estimate.value),
        "low": number_text(estimate.low),
        "high": number_text(estimate.high),
        "n": estimate.n,
        "method": estimate.method,
        "setup": label,
        "reason": "" if span else estimate.reason,
        "records": " ".join(estimate.records),
    }
    attributes = " ".join(f'data-{k}="{escape(str(v))}"' for k, v in data.items() if v or v == 0)
    title = escape("; ".join(filter(None, details)))
    beside = span or (estimate.method if estimate.method.startswith("max of") else "")
    ci = f'<span class="ci">{beside}</span>' if beside and show_interval else ""
    value = f'<span class="v">{say(estimate.value)}</span>'
    return f'<td class="{css}" title="{title}" {attributes}>{value}{mark}{ci}</td>'


def figure(table_id: str, caption: str, head: str, body: str, below: str = "") -> str:
    """A captioned table in a focusable region of its own that scrolls sideways."""
    return (
        f'<figure class="table" id="{table_id}"><figcaption id="{table_id}-caption">{caption}'
        f'</figcaption><div class="scroll" role="region" tabindex="0" '
        f'aria-labelledby="{table_id}-caption"><table class="data sortable" '
        f'aria-labelledby="{table_id}-caption"><thead>{head}</thead><tbody>{body}</tbody></table>'
        f"</div>{below}</figure>"
    )


def grid_html(table: Table, table_id: str, title: str = "") -> str:
    """A generic table."""
    notes = Footnotes(table_id)
    head = "".join(_header(c.title, i, c.unit, c.numeric) for i, c in enumerate(table.columns))
    body = "".join(_grid_row(row, notes) for row in table.rows)
    said = "".join(f'<p class="note">{escape(_sentence(n))}</p>' for n in table.notes)
    estimates = any(isinstance(cell, Estimate) for row in table.rows for cell in row)
    what = " Value and 95 % interval." if estimates else ""
    caption = f"<b>{escape(title or table.title)}.</b>{what}{said}"
    return figure(table_id, caption, f"<tr>{head}</tr>", body, notes.html())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _grid_row(row: Sequence[Any], notes: Footnotes) -> str:
    cells = []
    for i, cell in enumerate(row):
        if isinstance(cell, Estimate):
            cells.append(number_cell(cell, notes))
        elif i == 0:
            cells.append(f'<th scope="row">{escape(str(cell))}</th>')
        else:
            number = isinstance(cell, int | float) and not isinstance(cell, bool)
            text = f"{cell:,}" if number else escape("–" if cell is None else str(cell))
            css = "num" if number else "text long" if len(str(cell)) > 36 else "text"
            cells.append(f'<td class="{css}" data-value="{escape(str(cell))}">{text}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _header(title: str, index: int, unit: str = "", numeric: bool = True, more: str = "") -> str:
    css = "num" if numeric else "text"
    shown = escape(title) + (f' <span class="unit">{escape(unit)}</span>' if unit else "")
    return f'<th scope="col" class="{css}" data-col="{index}"{more}>{shown}</th>'


def paper_html(table: PaperTable, table_id: str, context: Sequence[str]) -> str:
    """One of the paper's tables: for each column the paper's value, ours and the ratio.

    `context` are the sentences of the caption that hold for the whole table (GPUs, weights).
    """
    notes = Footnotes(table_id)
    first = "Row" if table.number in (9, 10, 11, 12) else "Model"
    first = "Context" if table.number in (2, 3, 10) else first
    top, second, index = [f'<th scope="col" rowspan="2" data-col="0">{first}</th>'], [], 1
    for i, (name, written, meant) in enumerate(table.columns):
        parts = _parts(table, i)
        unit = "" if meant == written or meant.startswith(("output", "ms;")) else f"in {meant}"
        shown = escape(name) + (f' <span class="unit">{escape(unit)}</span>' if unit else "")
        top.append(f'<th scope="colgroup" class="group" colspan="{len(parts)}">{shown}</th>')
        for part in parts:
            edge = ' group"' if part == "paper" else '"'
            header = _header(part, index).replace('class="num"', f'class="num{edge}')
            second.append(header)
            index += 1
    body = "".join(_paper_row(table, *row, notes) for row in table.rows)
    caption = (
        f"<b>Table {table.number}.</b> {escape(table.title)}. "
        f'<span class="where">{escape(" ".join(context))} '
        f"Paper: {escape(table.where)}.</span>"
    )
    below = _account(table) + (f'<p class="note">{escape(table.note)}</p>' if table.note else "")
    head = f"<tr>{''.join(top)}</tr><tr>{''.join(second)}</tr>"
    return figure(table_id, caption, head, body, below + notes.html())


def _parts(table: PaperTable, column: int) -> list[str]:
    """Changes and differences have no ratio column."""
    change = table.columns[column][1] == "%"
    return ["paper", "measured"] if change else ["paper", "measured", "ratio"]


def _paper_row(
    table: PaperTable, label: str, note: str, cells: Sequence[Cell], notes: Footnotes
) -> str:
    said = f' <span class="ci">{escape(note)}</span>' if note else ""
    html = [f'<th scope="row">{escape(label)}{said}</th>']
    for i, cell in enumerate(cells):
        decimals = len((cell.printed or "0.00").partition(".")[2])
        if cell.printed is None:
            html.append('<td class="num group" data-value="">–</td>')
        else:
            html.append(
                f'<td class="num group paper" data-value="{cell.printed}">'
                f"{float(cell.printed):,.{decimals}f}</td>"
            )
        mark = verdict_mark(cell.verdict)
        ratio = "ratio" in _parts(table, i)
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


def verdict_mark(verdict: Ruling) -> str:
    """A verdict as one sign: ✓ reproduced, ≈ direction only, ✗ not reproduced, ? not testable."""
    if not verdict.word:
        return ""
    sign, css = SIGNS[verdict.word]
    said = escape(str(verdict), quote=True)
    named = f'title="{said}" aria-label="{said}"'
    return f'<span class="verdict {css}" role="img" {named}>{sign}</span>'


def _account(table: PaperTable) -> str:
    """How the cells of a table stand: verdicts by count, and the repetitions behind them."""
    words = Counter(cell.verdict.word for cell in table.cells)
    said = [f"{words[word]} {word}" for word in SIGNS if words[word]]
    n = sorted({cell.n for cell in table.cells if cell.measured.value is not None and cell.n > 1})
    if n:
        said.append(f"n = {n[0]}" + (f" to {n[-1]}" if len(n) > 1 else ""))
    return f'<p class="note">Verdicts: {"; ".join(said)}.</p>' if said else ""
