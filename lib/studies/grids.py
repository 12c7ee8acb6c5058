"""The tables of a study for the page, each cell beside the verdict on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lib.show.table import Column, Number, Table, Text
from lib.show.table import Verdict as Sign
from lib.stats import Estimate
from lib.studies.paper_tables import CHANGES, HEADS, Cell, PaperTable, meant
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

SIGNS = {
    REPRODUCED: ("✓", "holds"),
    DIRECTION: ("≈", "partly"),
    NOT: ("✗", "fails"),
    UNTESTABLE: ("?", "untested"),
}


def sign(verdict: Verdict) -> Sign | None:
    """A verdict as a sign: ✓ reproduced, ≈ direction only, ✗ not reproduced, ? not testable."""
    if not verdict.word:
        return None
    return Sign(verdict.word, verdict.why, *SIGNS[verdict.word], WORDS.index(verdict.word))


def tolerances() -> str:
    """The rules of the verdicts in words, from the constants that they use."""
    t, m = TOLERANCES["time"], TOLERANCES["memory"]
    few = TOLERANCES["effect"]
    return (
        f"A value is reproduced if its 95 % interval lies within {t.share:.0%} of the printed one "
        f"({t.points:g} percentage points where it is a percentage) for time, throughput and "
        f"energy, {m.share:.0%} ({m.points:g} points) for memory, {few.points:g} point for effects "
        "of a few percent, or one unit of the last printed digit. An order is reproduced if every "
        f"ratio's interval excludes 1 and reaches further from it than {TIE:.0%}. Of two to five "
        "visits their range decides as an interval would, without its level. Without either "
        "nothing is decided, except for counts and readings of the allocator, nor by a row that "
        "warns, in any visit."
    )


def estimates(
    column: dict[str, Estimate],
    unit: str,
    verdict: Verdict | None = None,
    remark: str = "",
    exact: Sequence[str] = (),
) -> Any:
    """Each value with interval, n and what it is of, or the reasons why there is none.

    Whole numbers whose method is `exact` have no decimals.
    """
    if all(x.value is None for x in column.values()):
        return (Text("–", reasons=tuple(dict.fromkeys(x.reason for x in column.values()))),)
    mark = sign(verdict) if verdict and verdict.word != UNTESTABLE else None
    lines = []
    for label, x in column.items():
        whole = x.method in exact and x.value is not None and x.value == round(x.value)
        lines.append(Number(x, 0 if whole else None, unit, label, verdict=mark))
        mark = None  # one sign a cell
    return (*lines, Text("", small=remark)) if remark else tuple(lines)


def paper_grid(table: PaperTable, context: Sequence[str]) -> Table:
    """One of the paper's tables: for each column the paper's value, ours and the ratio.

    `context` are the sentences of the caption that hold for the whole table (GPUs, weights).
    """
    columns = [Column(HEADS[table.spec.get("rows_are", "model")], numeric=False)]
    for name, column in table.columns:
        unit = meant(column)
        same = unit == column["unit"] or unit.startswith("output") or ";" in unit
        group = Column(name, "" if same else f"in {unit}")
        columns += [Column("paper", group=group, css="group paper")]
        columns += [Column("measured", group=group, css="measured")]
        if column.get("form") not in CHANGES:  # which have no ratio
            columns += [Column("ratio", group=group, css="ratio")]
    rows = []
    for label, note, cells in table.rows:
        row = [Text(label, note)]
        for (_, column), cell in zip(table.columns, cells, strict=True):
            row += _parts(cell, column.get("form") not in CHANGES)
        rows.append(tuple(row))
    return Table(
        f"table-{table.number}",
        f"Table {table.number}. {table.spec['title']}",
        tuple(columns),
        tuple(rows),
        (" ".join([*context, f"Paper: {table.spec['where']}."]),),
        tuple(filter(None, (_account(table), table.spec.get("note")))),
    )


def _parts(cell: Cell, has_ratio: bool) -> list[Any]:
    """A cell of the paper: printed, measured with its verdict, or the verdict with the ratio."""
    decimals, verdict = len((cell.printed or "0.00").partition(".")[2]), sign(cell.verdict)
    printed = "–" if cell.printed is None else f"{float(cell.printed):,.{decimals}f}"
    own = None if has_ratio else verdict
    parts: list[Any] = [
        Text(printed, sort=cell.printed or ""),
        Number(cell.measured, decimals, setup=cell.note, verdict=own),
    ]
    if cell.today is not None and cell.today.value is not None:
        parts[-1] = (parts[-1], Number(cell.today, decimals, label="experts as of today"))
    if has_ratio and cell.ratio.value is None:
        why = "" if cell.measured.value is None else cell.ratio.reason
        parts.append(Text("–", title=why, sort=""))
    elif has_ratio:
        # Its interval is the measured one divided by the printed value: in the title, not in print.
        parts.append(Number(cell.ratio, 3, setup=cell.note, verdict=verdict, show_interval=False))
    return parts


def _account(table: PaperTable) -> str:
    """How the cells of a table stand: verdicts by count, and the repetitions behind them."""
    counts = Counter(cell.verdict.word for cell in table.cells)
    parts = [f"{counts[word]} {word}" for word in SIGNS if counts[word]]
    n = sorted({cell.n for cell in table.cells if cell.measured.value is not None and cell.n > 1})
    if n:
        parts.append(f"n = {n[0]}" + (f" to {n[-1]}" if len(n) > 1 else ""))
    return f"Verdicts: {'; '.join(parts)}." if parts else ""
