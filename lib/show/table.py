"""A table as data: named columns with units, rows of text, counts and estimates.

It becomes a DataFrame or Markdown here, and HTML in `show.html`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lib import stats
from lib.show import wording
from lib.show.wording import rounded, short
from lib.stats import Estimate


@dataclass(frozen=True)
class Column:
    """A column's title and unit; `numeric` columns hold estimates, `measured` ones those that come
    from the rows of their group."""

    title: str
    unit: str = ""
    numeric: bool = True
    measured: bool = True

    @property
    def header(self) -> str:
        """Title with the unit, as a header shows it."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Table:
    """Rows of text, counts and estimates under named columns, and what holds for all of them."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """What a notebook shows: the table as a DataFrame."""
        data = frame(self)
        return {"text/html": data._repr_html_(), "text/plain": repr(data)}


class Shown(pd.DataFrame):
    """A DataFrame that shows all of itself: no reason cut off, no column hidden, a dash for what is
    missing. It computes as any other."""

    @property
    def _constructor(self) -> type[Shown]:
        return Shown

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return pd.DataFrame(self).map(wording.cell).to_html()

    def __repr__(self) -> str:
        with pd.option_context("display.max_colwidth", None):
            return pd.DataFrame(self).map(wording.cell).to_string()


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


def frame(table: Table, digits: int = 4) -> Shown:
    """The table for reading: each estimate's value, and its 95 % interval as text where it has one.

    Values are rounded to `digits` significant digits, whole units stay; a missing value is None.
    A column `n` counts repetitions, and a last column `missing` gives reasons, each only where
    there are any.
    """
    data = Shown([_line(table.columns, row, digits) for row in table.rows])
    data.index = pd.Index([""] * len(data))  # a row number says nothing
    optional = [c for c in data.columns if c.endswith(" 95 %") or c in ("n", "missing")]
    return data.drop(columns=[c for c in optional if not data[c].astype(bool).any()])


def _line(columns: Sequence[Column], row: Sequence[Any], digits: int) -> dict[str, Any]:
    line: dict[str, Any] = {}
    counts: dict[str, int] = {}
    reasons = []
    for column, cell in zip(columns, row, strict=True):
        if not isinstance(cell, Estimate):
            line[column.header] = cell
            continue
        line[column.header] = None if cell.value is None else rounded(cell.value, digits)
        line[f"{column.title} 95 %"] = wording.interval(cell)
        if cell.value is None:
            reasons.append(f"{column.title}: {cell.reason}")
        elif stats.is_sampled(cell):
            counts[column.title] = cell.n
    return line | {"n": _repetitions(counts), "missing": "; ".join(reasons)}


def _repetitions(counts: dict[str, int]) -> str:
    """The commonest n, then the columns that have another: "6; ITL 30"; empty if all are 1."""
    if max(counts.values(), default=1) == 1:
        return ""
    usual = Counter(counts.values()).most_common(1)[0][0]
    others = [f"{title} {n}" for title, n in counts.items() if n != usual]
    return "; ".join([str(usual), *others])


def markdown(table: Table) -> str:
    """The table as Markdown: for sentences, which a DataFrame would cut off."""
    lines = [[c.header for c in table.columns], [":--"] * len(table.columns)]
    lines += [[_words(cell).replace("|", "\\|") for cell in row] for row in table.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([text, *(f"{note}." for note in table.notes)])


def _words(cell: Any) -> str:
    if not isinstance(cell, Estimate):
        return "" if cell is None else str(cell)
    if cell.value is None:
        return f"– ({cell.reason})"
    n = f"n = {cell.n}" if cell.n > 1 else ""
    return ", ".join(filter(None, (f"{short(cell.value)} {wording.interval(cell)}".strip(), n)))
