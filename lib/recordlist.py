"""The rows behind the report's numbers: which ones a cell comes from, and a list of them all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lib.analysis import series as analysis_series
from lib.analysis.series import Series, Study
from lib.papertables import Cell, PaperTable, arm_row
from lib.records.jobs import Job
from lib.records.record import Record, record_id
from lib.show.html import figure
from lib.show.wording import short

# What the columns of a table of the paper are computed from, by the number of the table.
COLUMNS = {
    1: (("ttft",), ("e2e",), ("e2e",), ("e2e",)), 5: (("peak",), ("peak",), ("peak",)),
    6: (("energy",), ("energy",), ("energy",)),
    8: (("card",), ("card", "e2e"), ("card", "ttft"), ("card", "energy"), ("e2e", "peak")),
}  # fmt: skip
SWEEPS = {2: ("e2e",), 3: ("ttft",), 7: ("energy",)}
ABLATIONS = {9: "decoding", 10: "context", 11: "precision", 12: "stack"}
BASE_ROWS = {9: "Greedy", 10: "512"}
FIELDS = (
    "model",
    "context",
    "new_tokens",
    "batch",
    "decoding",
    "weights",
    "dtype",
    "stack",
    "experts",
    "attention",
    "cache",
)
LONGEST = 24  # samples shown of one name
BEHIND_A_TRACE = ("start_s", "stop_s", "token_s")


def with_records(table: PaperTable, study: Study) -> PaperTable:
    """The table with the ids of the rows that each measured cell comes from."""
    built = []
    for label, note, cells in table.rows:
        known = tuple(_named(cell, _rows(study, cell, i)) for i, cell in enumerate(cells))
        built.append((label, note, known))
    return replace(table, rows=tuple(built))


def _named(cell: Cell, rows: Sequence[Record]) -> Cell:
    ids = tuple(dict.fromkeys(record_id(row) for row in rows))
    if cell.measured.value is None:
        return cell
    ratio = cell.ratio if cell.ratio.value is None else replace(cell.ratio, records=ids)
    return replace(cell, measured=replace(cell.measured, records=ids), ratio=ratio)


def _rows(s: Study, cell: Cell, index: int) -> list[Record]:
    """The rows of one cell, in the order of COLUMNS."""
    context, number = s.published["context"], cell.table
    if number in ABLATIONS:
        series = s.ablation[ABLATIONS[number]]
        labels = [cell.row, *([BASE_ROWS[number]] if number in BASE_ROWS and index else [])]
        found = [arm_row(series, number, label) for label in labels]
    elif number in SWEEPS:
        model, at = (cell.row, cell.column) if number == 7 else (cell.column, cell.row)
        found = [_row(s, s.base[model], what, int(at)) for what in SWEEPS[number]]
    elif number == 4:
        contexts = (128, context) if index == 0 else ((128, context)[index - 1],)
        found = [_row(s, s.base[cell.row], "e2e", at) for at in contexts]
    else:
        found = [_row(s, s.base[cell.row], what, context) for what in COLUMNS[number][index]]
        if number == 5 and index:
            found.append(_row(s, s.base[s.published["ablation_model"]], "peak", context))
    return [row for row in found if row is not None]


def _row(s: Study, series: Series, what: str, context: int) -> Record | None:
    if what == "card":
        return series.one("card")
    kind = {"ttft": "latency", "e2e": "latency", "energy": "energy", "peak": "memory-paper"}[what]
    tokens = 1 if what == "ttft" else s.published["new_tokens"]
    return series.one(kind, context=context, new_tokens=tokens)


def papers(
    tables: Sequence[PaperTable], rows: Sequence[Record], published: dict[str, Any]
) -> list[PaperTable]:
    """All tables of the paper with their rows."""
    study = analysis_series.study(rows, published)
    return [with_records(table, study) for table in tables]


def html(rows: Sequence[Record], jobs: Sequence[Job], out: Path) -> str:
    """The rows as a table: arm, repetitions, environment, and the file that holds them.

    `jobs` are in the order in which their rows replace each other, so that the last one counts.
    """
    home = {record_id(row): job for job in jobs for row in job.records}
    lines = [_line(row, home.get(record_id(row)), out) for row in rows if row.kind != "environment"]
    names = ("record", "kind", "model", "arm", "repetitions and readings", "file")
    head = "".join(
        f'<th scope="col" class="text" data-col="{i}">{name}</th>' for i, name in enumerate(names)
    )
    caption = (
        "<b>Records.</b> One line for each arm, in SI units, the unit in the name. The file "
        "holds it whole, with its warnings and the reason for what is missing."
    )
    return figure("records", caption, f"<tr>{head}</tr>", "".join(lines))


def _line(row: Record, job: Job | None, out: Path) -> str:
    name = record_id(row)
    path = job.folder / "records.jsonl" if job else None
    link = "–"
    if path and path.exists():
        href = quote(Path(os.path.relpath(path, out)).as_posix())
        link = f'<a href="{href}">{escape(job.path)}</a>'
    cells = (
        ("text", row.kind),
        ("text", row.key.get("model") or "–"),
        ("long", _arm(row)),
        ("long", _content(row)),
    )
    shown = "".join(f'<td class="{css}">{escape(str(text))}</td>' for css, text in cells)
    return f'<tr id="record-{name}"><th scope="row">{name}</th>{shown}<td>{link}</td></tr>'


def _arm(row: Record) -> str:
    fields = sorted(row.key, key=FIELDS.index)
    said = [
        f"{name.replace('_', ' ')} {row.key[name]}"
        for name in fields
        if name != "model" and row.key[name] not in (None, "none")
    ]
    return ", ".join([*said, f"environment {row.env_id}"])


def _content(row: Record) -> str:
    """Samples as they are, to four digits; of a row without samples its readings."""
    if row.error:
        return f"failed: {row.error}"
    said = []
    for name, values in row.samples.items():
        if name in BEHIND_A_TRACE or not all(isinstance(v, int | float) for v in values):
            said.append(f"{name}: {len(values)} in the file")
            continue
        more = f" and {len(values) - LONGEST} more" if len(values) > LONGEST else ""
        said.append(f"{name}: {', '.join(f'{v:.4g}' for v in values[:LONGEST])}{more}")
    readings = {
        k: v
        for k, v in row.values.items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }
    said += [f"{name} {short(value)}" for name, value in readings.items()] if not said else []
    return "; ".join(said) or "–"
