"""A table as data: named columns with units over typed cells, and its forms.

A cell is an `Estimate`, which is a number with its interval or the reason why there is none; a
`Number`, which says how one is written; a `Text`; a `Verdict`; plain text or a count; None, which
is a dash; or a tuple of these, a line each. HTML is templates/table.html, which escapes all text.
"""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from lib import files
from lib.show.page import packed_link, shell
from lib.show.wording import interval, level, number_text, sentence, short
from lib.stats import CONFIDENCE, Estimate

if TYPE_CHECKING:
    import pandas as pd

LONG = 36  # characters of a text that stay on one line
CLIP = 64  # characters of one word, such as a kernel's mangled name; the rest opens


@dataclass(frozen=True)
class Column:
    """A column's title and unit; `numeric` columns hold estimates, `measured` ones those that come
    from the rows of their group. `group` is a header that neighbours share; `css` a class."""

    title: str
    unit: str = ""
    numeric: bool = True
    measured: bool = True
    group: Column | None = None
    sortable: bool = True
    css: str = ""

    @property
    def header(self) -> str:
        """Title with the unit, and the group before it."""
        own = f"{self.title} ({self.unit})" if self.unit else self.title
        return f"{self.group.header}, {own}" if self.group else own


@dataclass(frozen=True)
class Verdict:
    """A verdict as a sign, a word and the reason; `css` is the sign's class, `rank` sorts."""

    word: str
    why: str
    sign: str
    css: str
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.word}: {self.why}" if self.why else self.word


@dataclass(frozen=True)
class Text:
    """A text, with what stands small under it, where it leads, or the reasons below the table;
    `sort` is what it is sorted by. `page` is a file that may stand beside this one: where it does
    not, the text is no link."""

    text: str
    small: str = ""
    url: str = ""
    reasons: tuple[str, ...] = ()
    title: str = ""
    sort: str | None = None
    page: str = ""


@dataclass(frozen=True)
class Number:
    """How an estimate is written: decimals, unit, what it is of and from, the verdict on it."""

    estimate: Estimate
    decimals: int | None = None
    unit: str = ""
    label: str = ""
    setup: str = ""
    verdict: Verdict | None = None
    show_interval: bool = True

    @property
    def value(self) -> str:
        """The value in words, a dash where it is missing."""
        value = self.estimate.value
        if value is None:
            return "–"
        text = short(value) if self.decimals is None else f"{value:z,.{self.decimals}f}"
        return f"{text} {self.unit}".strip()


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of typed cells under named columns, what holds for all of them, and what stands below.

    A row may have a name of its own in the page (`row_ids`); `prose` tables hold sentences.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    row_ids: tuple[str, ...] = ()
    prose: bool = False

    def html(self, table_id: str = "", *, page: bool = True) -> Markup:
        """The table for a page, or for a notebook, which scrolls it itself."""
        macro = shell().get_template("table.html").module.table
        rows = [[_view(c, x, i == 0) for i, (c, x) in enumerate(self._cells(r))] for r in self.rows]
        how = [
            _how_of_most(row[at] for row in rows) if column.sortable else {}
            for at, column in enumerate(self.columns)
        ]
        return macro(self, rows, how, Footnotes(table_id or f"grid-{self.name}"), page)

    @property
    def groups(self) -> list[tuple[Column | None, Column, int]]:
        """Of each group of columns its header, its first column and how many it has."""
        groups: list[tuple[Column | None, Column, int]] = []
        for column in self.columns:
            if groups and column.group and groups[-1][0] is column.group:
                groups[-1] = (*groups[-1][:2], groups[-1][2] + 1)
            else:
                groups.append((column.group, column, 1))
        return groups

    @property
    def remarks(self) -> list[str]:
        """The notes as sentences."""
        return [sentence(note) for note in self.notes]

    @property
    def has_numbers(self) -> bool:
        """Whether a value may have an interval."""
        return any(isinstance(cell, Estimate) for row in self.rows for cell in row)

    def _cells(self, row: Sequence[Any]) -> list[tuple[Column, Any]]:
        return list(zip(self.columns, row, strict=True))

    def _repr_html_(self) -> str:
        return str(self.html(page=False))

    def __repr__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [[c.header for c in self.columns], [":--"] * len(self.columns)]
        lines += [[words(cell).replace("|", "\\|") for cell in row] for row in self.rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"{self.title}.", *([text] if self.rows else []), *self.remarks])

    def lines(self) -> list[dict[str, Any]]:
        """Rows by header; a last entry `missing` says why numbers are, where any is."""
        lines = [{c.header: _plain(x) for c, x in self._cells(row)} for row in self.rows]
        reasons = [
            "; ".join(
                f"{column.title}: {x.reason}"
                for column, cell in self._cells(row)
                if isinstance(x := _plain(cell), Estimate) and x.value is None
            )
            for row in self.rows
        ]
        if any(reasons):
            lines = [x | {"missing": why} for x, why in zip(lines, reasons, strict=True)]
        return lines

    def frame(self) -> pd.DataFrame:
        """The rows as a DataFrame in full precision, an estimate in four columns as in a CSV."""
        import pandas as pd

        return pd.DataFrame([flat(line) for line in self.lines()])

    def csv_link(self) -> str:
        """The rows as a link that needs no other file, see `packed_link`."""
        return packed_link(csv_text(self.lines()).encode())

    def write_csv(self, out_dir: str | Path) -> Path:
        """tables/<name>.csv below `out_dir`."""
        return write_csv(Path(out_dir) / "tables" / f"{self.name}.csv", self.lines())


def flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line in which each estimate fills four columns: name, name_low, name_high and name_n; and
    a fifth, name_level, where the interval's level is not 95 %."""
    columns: dict[str, Any] = {}
    for name, cell in line.items():
        if isinstance(cell, Estimate):
            columns |= {name: cell.value, f"{name}_low": cell.low, f"{name}_high": cell.high}
            columns[f"{name}_n"] = cell.n or None
            if cell.level != CONFIDENCE and cell.low is not None:
                columns[f"{name}_level"] = cell.level
        else:
            columns[name] = cell
    return columns


def csv_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """Lines as CSV, see `flat`; numbers have 8 significant digits, what is missing is empty."""
    rows = [flat(line) for line in lines]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: number_text(v) if isinstance(v, float) else v for k, v in row.items()})
    return file.getvalue()


def write_csv(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """Write `csv_text` of lines to a file, which is returned."""
    files.write_text(path, csv_text(lines))
    return path


def of_lines(name: str, title: str, lines: Sequence[Mapping[str, Any]], reason: str = "") -> Table:
    """Cells by the title of their column; without any line the reason."""
    columns = tuple(
        Column(
            key, numeric=any(isinstance(x.get(key), Estimate | Number | int | float) for x in lines)
        )
        for key in dict.fromkeys(key for line in lines for key in line)
    )
    rows = tuple(tuple(line.get(column.title) for column in columns) for line in lines)
    return Table(name, title, columns, rows, () if rows else (reason,))


def or_why(table: Table, reason: str) -> Table:
    """The table; without rows its title and the reason."""
    return table if table.rows else replace(table, notes=(reason,))


def without_empty(table: Table) -> Table:
    """The table less columns that are empty in every row; notes give the reasons of numbers."""
    places, reasons = [], {}
    for at, column in enumerate(table.columns):
        cells = [row[at] for row in table.rows]
        estimates = [cell for cell in cells if isinstance(cell, Estimate)]
        if not cells or any(cell.value is not None for cell in estimates):
            places.append(at)
        elif len(estimates) < len(cells):
            places += [at] * any(cell not in ("", None) for cell in cells)
        else:
            why = "; ".join(dict.fromkeys(cell.reason for cell in estimates))
            reasons.setdefault(why, []).append(column.title)
    remarks = [f"{', '.join(titles)}: {why}" for why, titles in reasons.items()]
    return replace(
        table,
        columns=tuple(table.columns[at] for at in places),
        rows=tuple(tuple(row[at] for at in places) for row in table.rows),
        notes=(*table.notes, *remarks),
    )


def _plain(cell: Any) -> Any:
    """A cell as a CSV has it: an estimate, a number, or its words."""
    if isinstance(cell, Number):
        return cell.estimate
    return cell if cell is None or isinstance(cell, Estimate | int | float) else words(cell)


def words(cell: Any) -> str:
    """A cell as text."""
    if isinstance(cell, tuple):
        return "; ".join(words(line) for line in cell)
    if isinstance(cell, Estimate):
        cell = Number(cell)
    if isinstance(cell, Number):
        x = cell.estimate
        if x.value is None:
            return " ".join(filter(None, (f"– ({x.reason})", cell.label)))
        n = f"n = {x.n}" if x.n > 1 else ""
        text = ", ".join(filter(None, (f"{cell.value} {interval(x)}".strip(), n)))
        return f"{text} ({cell.label})" if cell.label else text
    if isinstance(cell, Text):
        more = (cell.small, "; ".join(cell.reasons), cell.url)
        return cell.text + "".join(f" ({x})" for x in more if x)
    if isinstance(cell, float):
        return short(cell)
    return "" if cell is None else str(cell)


@dataclass
class Footnotes:
    """Reasons under one table, each once, marked a, b, c in the order of appearance."""

    table_id: str
    reasons: list[str] = field(default_factory=list)

    def mark(self, reason: str) -> str:
        """The letters of a reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return letters(self.reasons.index(reason))

    def __iter__(self) -> Iterable[tuple[str, str]]:
        return iter([(letters(i), reason) for i, reason in enumerate(self.reasons)])


def letters(index: int) -> str:
    """a to z, then aa, ab ..."""
    more, last = divmod(index, 26)
    return (letters(more - 1) if more else "") + string.ascii_lowercase[last]


def _view(column: Column, cell: Any, leads: bool) -> dict[str, Any]:
    """What the template shows of a cell: classes, data- attributes, how it was measured, lines."""
    view: dict[str, Any] = {"leads": leads, "data": {}, "how": {}, "many": False}
    css = ["text"]
    if isinstance(cell, tuple):
        view |= {"many": True, "lines": [_line(line) for line in cell]}
        numbers = all(isinstance(line, Number | Estimate) for line in cell)
        css = ["num"] if column.numeric and numbers else css
    elif isinstance(cell, Estimate | Number):
        number = cell if isinstance(cell, Number) else Number(cell)
        css, view["lines"] = ["num"], [_line(number)]
        if number.estimate.value is None:
            css.append("missing")
            view["data"] = {"value": ""}
        else:
            view |= {"data": _data(number.estimate), "how": _how(number)}
    elif isinstance(cell, Text):
        css = ["num" if column.numeric else "text", "long" if len(cell.text) > LONG else ""]
        view |= {"lines": [_line(cell)], "data": {} if cell.sort is None else {"value": cell.sort}}
        view["how"] = {"title": cell.title} if cell.title and not cell.url else {}
    elif isinstance(cell, Verdict):
        view |= {"lines": [_line(cell)], "data": {"value": cell.rank}}
    else:
        counted = isinstance(cell, int | float) and not isinstance(cell, bool)
        long = len(str(cell)) > LONG
        css = ["num"] if counted else ["text", "long"] if long else ["text"]
        view |= {"lines": [_line(cell)], "data": {"value": cell} if isinstance(cell, float) else {}}
    view["css"] = " ".join(filter(None, (*css, column.css)))
    return view


def _data(x: Estimate) -> dict[str, Any]:
    data = {
        "value": number_text(x.value),
        "low": number_text(x.low),
        "high": number_text(x.high),
        "n": x.n,
        "records": " ".join(x.records),
    }
    return {name: value for name, value in data.items() if value or value == 0}


def _how(number: Number) -> dict[str, str]:
    """How a number was measured: a tooltip, and what it consists of. The interval is in it where
    the cell does not show that."""
    x = number.estimate
    span = interval(replace(x, level=CONFIDENCE))  # the level stands before it
    hidden = "" if number.show_interval else f"{level(x)} interval {span}"
    n = f"n = {x.n}" if x.n else ""
    how = {
        "title": "; ".join(filter(None, (n, x.method, hidden if span else x.reason, number.setup))),
        "level": level(x) if span and x.level != CONFIDENCE else "",
        "method": x.method,
        "setup": number.setup,
        "reason": "" if span else x.reason,
    }
    return {name: value for name, value in how.items() if value}


def _how_of_most(cells: Iterable[dict[str, Any]]) -> dict[str, str]:
    """How most numbers of a column were measured, which its header says in place of each of them;
    nothing where they have nothing in common, or a number does not say it."""
    numbers = [x["how"] for x in cells if {"num", "missing"} & {*x["css"].split()} == {"num"}]
    if not all(how.get("title") for how in numbers):
        return {}
    most, count = max(((x, numbers.count(x)) for x in numbers), key=itemgetter(1), default=({}, 0))
    return most if count > 1 else {}


def _line(cell: Any) -> dict[str, Any]:
    """One line of a cell: its text with what stands beside and under it."""
    line = {"text": "", "value": False, "small": "", "url": "", "title": "", "reasons": ()}
    line |= {"page": "", "clip": ""}
    line |= {"verdict": None, "strong": ""}
    if isinstance(cell, Estimate):
        cell = Number(cell)
    if isinstance(cell, Verdict):
        return line | {"verdict": cell, "strong": cell.word, "small": cell.why}
    if isinstance(cell, Text):
        names = ("text", "small", "url", "title", "reasons", "page")
        return line | {name: getattr(cell, name) for name in names}
    if not isinstance(cell, Number):
        counted = isinstance(cell, int) and not isinstance(cell, bool)
        text = f"{cell:,}" if counted else "–" if cell is None else words(cell)
        clipped = any(len(word) > CLIP for word in text.split())
        return line | {"text": text, "clip": f"{text[:CLIP]}…" if clipped else ""}
    x = cell.estimate
    if x.value is None:
        reasons = (x.reason or "not measured",)
        return line | {"text": "–", "reasons": reasons, "small": cell.label}
    beside = interval(x) or (x.method if x.method.startswith("max of") else "")
    if cell.label or cell.unit:
        beside = ", ".join(filter(None, (beside, f"n = {x.n}" if x.n > 1 else "", cell.label)))
    small = beside if cell.show_interval else ""
    return line | {
        "text": cell.value,
        "value": True,
        "small": small,
        "title": x.method,
        "verdict": cell.verdict,
    }
