"""Tables of estimates as HTML: the value with its interval, n and method on the cell itself."""

from __future__ import annotations

import string
from collections.abc import Sequence
from html import escape
from typing import Any

from lib.show.table import Table
from lib.show.wording import interval, number_text, short
from lib.stats import Estimate


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
    remarks = "".join(f'<p class="note">{escape(_sentence(n))}</p>' for n in table.notes)
    estimates = any(isinstance(cell, Estimate) for row in table.rows for cell in row)
    what = " Value and 95 % interval." if estimates else ""
    caption = f"<b>{escape(title or table.title)}.</b>{what}{remarks}"
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
    text = escape(title) + (f' <span class="unit">{escape(unit)}</span>' if unit else "")
    return f'<th scope="col" class="{css}" data-col="{index}"{more}>{text}</th>'
