"""A table as data: named columns with units, rows of text, counts and estimates.

It becomes a DataFrame here and HTML in `lib.markup`; statistics come from `lib.stats` only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lib import stats
from lib.groups import SETUP, setup_of, setup_order, setup_value
from lib.records.kinds import model_order
from lib.records.record import Record, environments, record_id
from lib.show import wording
from lib.show.wording import rounded, short
from lib.stats import Estimate

RANDOM_NOTE = (
    "random weights: valid for memory and dense latency; router-dependent for "
    "mixture-of-experts prefill"
)


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
        shown = frame(self)
        return {"text/html": shown._repr_html_(), "text/plain": repr(shown)}


def without_empty(table: Table) -> Table:
    """The table less columns that are empty in every row; notes give the reasons of numbers."""
    kept, reasons = [], {}
    for at, column in enumerate(table.columns):
        cells = [row[at] for row in table.rows]
        estimates = [cell for cell in cells if isinstance(cell, Estimate)]
        if not cells or any(cell.value is not None for cell in estimates):
            kept.append(at)
        elif len(estimates) < len(cells):
            kept += [at] * any(cell not in ("", None) for cell in cells)
        else:
            why = "; ".join(dict.fromkeys(cell.reason for cell in estimates))
            reasons.setdefault(why, []).append(column.title)
    said = [f"{', '.join(titles)}: {why}" for why, titles in reasons.items()]
    return replace(
        table,
        columns=tuple(table.columns[at] for at in kept),
        rows=tuple(tuple(row[at] for at in kept) for row in table.rows),
        notes=(*table.notes, *said),
    )


def sampled(rows: Sequence[Record], name: str, q: float = 50, factor: float = 1) -> Estimate:
    """The percentile of a sample of the last row that has it, or why there is none."""
    reason = "not measured"
    for row in reversed(rows):
        if row.samples.get(name):
            found = stats.scaled(stats.percentile(row.samples[name], q), factor)
            return replace(found, records=(record_id(row),))
        if row.error:
            reason = f"failed: {row.error}"
        elif name in row.missing:
            reason = f"not measured: {row.missing[name]}"
    return stats.missing(reason)


def frame(table: Table, digits: int = 4) -> Shown:
    """The table for reading: each estimate's value, and its 95 % interval as text where it has one.

    Values are rounded to `digits` significant digits, whole units stay; a missing value is None.
    A column `n` counts repetitions, and a last column `missing` gives reasons, each only where
    there are any.
    """
    made = Shown([_line(table.columns, row, digits) for row in table.rows])
    made.index = pd.Index([""] * len(made))  # a row number says nothing
    optional = [c for c in made.columns if c.endswith(" 95 %") or c in ("n", "missing")]
    return made.drop(columns=[c for c in optional if not made[c].astype(bool).any()])


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


def setups(rows: Iterable[Record], envs: dict[str, dict]) -> tuple[list[str], list[str]]:
    """The setup fields that differ between rows, and a note about those that do not."""
    seen: dict[str, set] = {name: set() for name in SETUP}
    for row in rows:
        for name in SETUP:
            seen[name].add(setup_value(row, name, envs))
    differ = [name for name in SETUP if len(seen[name]) > 1]
    same = [f"{name} {next(iter(values))}" for name, values in seen.items() if len(values) == 1]
    notes = ["all rows: " + ", ".join(same)] if same else []
    if "random" in seen["weights"]:
        notes.append(RANDOM_NOTE)
    return differ, notes


def grouped(rows: Sequence[Record], kinds: Sequence[str], fields: Sequence[str]) -> dict:
    """Rows grouped by model, setup and the given key fields, in a readable order."""
    envs = environments(rows)
    groups: dict[tuple, list[Record]] = {}
    for row in rows:
        if row.kind in kinds:
            at = (_field(row, name) for name in fields)
            where = (str(row.key.get("model")), setup_of(row, envs), *at)
            groups.setdefault(where, []).append(row)
    return dict(sorted(groups.items(), key=lambda item: _order(item[0])))


def _field(row: Record, name: str) -> Any:
    if name == "protocol":
        return "paper" if row.kind == "memory-paper" else "generate()"
    return row.key.get(name)


def _order(where: tuple) -> tuple:
    model, setup, *fields = where
    numbers = tuple(f if isinstance(f, int | float) else 0 for f in fields)
    return (model_order(model), setup_order(setup), numbers, tuple(map(str, fields)))


def build(
    name: str,
    title: str,
    rows: Sequence[Record],
    kinds: Sequence[str],
    fields: Sequence[str],
    columns: Sequence[Column],
    cells: Callable[[list[Record]], Sequence[Any]],
    having: str = "",
) -> Table:
    """A row for each group of rows of these kinds, with `cells` of it; with `having`, only for
    groups in which that kind is. Numbers that do not say which rows they come from get the ids of
    their group."""
    groups = grouped(rows, kinds, fields)
    if having:
        groups = {at: g for at, g in groups.items() if any(r.kind == having for r in g)}
    differ, notes = setups((r for g in groups.values() for r in g), environments(rows))
    at = [SETUP.index(d) for d in differ]
    leading = [
        Column("model", numeric=False),
        *(Column(d, numeric=False) for d in differ),
        *(Column(f.replace("_", " "), numeric=False) for f in fields),
    ]
    built = tuple(
        (model, *(setup[i] for i in at), *values, *_behind(columns, cells(group), group))
        for (model, setup, *values), group in groups.items()
    )
    return Table(name, title, (*leading, *columns), built, tuple(notes))


def _behind(columns: Sequence[Column], cells: Sequence[Any], group: Sequence[Record]) -> list[Any]:
    if not cells:  # a group without a row
        return []
    ids = tuple(dict.fromkeys(record_id(row) for row in group))

    def known(column: Column, cell: Any) -> Any:
        found = isinstance(cell, Estimate) and cell.value is not None
        return replace(cell, records=cell.records or ids) if found and column.measured else cell

    return [known(*pair) for pair in zip(columns, cells, strict=True)]


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
