"""Tables 1 to 12 of the paper, each cell beside what was measured by the same definition.

A cell holds the printed value, the measured estimate and their ratio. A cell without a
measurement says why. The rules of the columns are the functions of `analysis.series`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lib import stats
from lib.analysis import metrics
from lib.analysis.series import Series, estimate, samples
from lib.records.record import Record, record_id, require_comparable
from lib.show.table import write_csv
from lib.show.wording import number_text
from lib.stats import Estimate
from lib.studies.schema import PrintedTable, StudyFile
from lib.studies.study import Study, paper_name, study
from lib.studies.verdict import Ruling, band, of_value

SERVER = (
    "not measured: it needs a vLLM server in an environment of its own, and a client that "
    "sends it requests; serving is not part of this workbook yet"
)
# What the columns of a table of the paper are computed from, by the number of the table.
COLUMNS = {
    1: (("ttft",), ("e2e",), ("e2e",), ("e2e",)), 5: (("peak",), ("peak",), ("peak",)),
    6: (("energy",), ("energy",), ("energy",)),
    8: (("card",), ("card", "e2e"), ("card", "ttft"), ("card", "energy"), ("e2e", "peak")),
}  # fmt: skip
SWEEPS = {2: ("e2e",), 3: ("ttft",), 7: ("energy",)}
ABLATIONS = {9: "decoding", 10: "context", 11: "precision", 12: "stack"}
BASE_ROWS = {9: "Greedy", 10: "512"}
PRECISIONS = {"BF16": "bfloat16", "FP16": "float16", "FP32": "float32"}


@dataclass(frozen=True)
class Cell:
    """One number of the paper beside ours. `unit` is the unit meant; `printed` is verbatim.

    The verdict has no word where there is nothing to judge: the paper has no value, or the cell is
    the reference of its table.
    """

    table: int
    row: str
    column: str
    unit: str
    paper: float | None
    printed: str | None
    measured: Estimate
    ratio: Estimate
    note: str
    verdict: Ruling

    @property
    def n(self) -> int:
        """Repetitions behind the measured value."""
        return self.measured.n


@dataclass(frozen=True)
class PaperTable:
    """One table: its caption, where it stands in the paper, and its cells row by row."""

    number: int
    title: str
    where: str
    note: str
    columns: tuple[tuple[str, str, str], ...]  # name, unit written, unit meant
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]  # label, note of the paper, cells

    @property
    def cells(self) -> list[Cell]:
        """All cells, row by row."""
        return [cell for _, _, cells in self.rows for cell in cells]


COLUMN_RULES: dict[int, tuple[Callable[..., Estimate], ...]] = {
    1: (metrics.ttft_ms, metrics.p50_ms, metrics.p95_ms, metrics.output_tok_per_s),
    6: (
        partial(metrics.output_tok_per_s, kind="energy"),
        metrics.tokens_per_j,
        metrics.joules_per_1k,
    ),
    8: (
        metrics.active_billion,
        metrics.ape_tpot,
        metrics.ape_ttft,
        metrics.ape_energy,
        metrics.tok_per_s_per_1000_mib,
    ),
}
SWEEP_RULES: dict[int, Callable[..., Estimate]] = {
    2: metrics.output_tok_per_s,
    3: metrics.ttft_ms,
    7: metrics.joules_per_1k,
}


def measure(s: Study, table: int, row: str, column: str, index: int) -> tuple[Estimate, Series]:
    """The measured estimate of one cell, and the rows it comes from."""
    context, tokens = s.published["context"], s.published["new_tokens"]
    if table in COLUMN_RULES:
        series = s.base[row]
        return COLUMN_RULES[table][index](series, context, tokens), series
    if table in SWEEP_RULES:
        model, at = (row, column) if table == 7 else (column, row)
        return SWEEP_RULES[table](s.base[model], int(at), tokens), s.base[model]
    if table == 4:
        series = s.base[row]
        arms = [samples(series, "latency", "e2e_s", c, tokens) for c in (128, context)]
        if index == 0:
            return metrics.throughput_change_pct(*arms), series
        return metrics.output_tok_per_s(series, (128, context)[index - 1], tokens), series
    if table == 5:
        return _peak_cell(s, row, index), s.base[row]
    return _ablation_cell(s, table, row, index)


def _peak_cell(s: Study, row: str, index: int) -> Estimate:
    """Table 5: the peak, its distance to GPT-OSS, and how much less GPT-OSS needs."""
    arm = (s.published["context"], s.published["new_tokens"])
    mine, reference = s.base[row], s.base[s.published["ablation_model"]]
    peak, least = metrics.peak_mib(mine, *arm), metrics.peak_mib(reference, *arm)
    if index == 0 or peak.value is None:
        return peak
    if least.value is None:
        return least
    pair = [x.one("memory-paper", context=arm[0], new_tokens=arm[1]) for x in (mine, reference)]
    try:
        require_comparable(pair, s.environments)
    except ValueError as error:
        return stats.missing(f"not compared: {error}")
    value = (peak.value - least.value) if index == 1 else 100 * (1 - least.value / peak.value)
    return replace(peak, value=value, method="difference of single readings")


def _ablation_cell(s: Study, table: int, row: str, index: int) -> tuple[Estimate, Series]:
    tokens = s.published["new_tokens"]
    series, kind = s.ablation[ABLATIONS[table]], f"ablation-{ABLATIONS[table]}"
    arm = arm_row(series, table, row)
    if arm is None:
        return stats.missing(series.reason or f"not measured: no {kind} row for {row}"), series
    times_s = _arm_samples(arm)
    time_s = estimate(times_s)
    if index == 0:
        return stats.inverse(time_s, arm.key.get("new_tokens") or tokens), series
    if index == 1 and table in (9, 12):
        return time_s, series
    reference = arm_row(series, table, BASE_ROWS[table])
    if reference is None:
        return stats.missing("not measured: no reference arm"), series
    if reference is arm and times_s[0]:
        return Estimate(0.0, n=len(times_s[0]), method="the reference arm"), series
    return metrics.throughput_change_pct(_arm_samples(reference), times_s), series


def _arm_samples(arm: Record) -> tuple[list[float], str]:
    if arm.error:
        return [], f"failed: {arm.error}"
    return arm.samples.get("e2e_s") or [], f"not measured: {arm.missing.get('e2e_s', 'no e2e_s')}"


def arm_row(series: Series, table: int, label: str) -> Record | None:
    """The record of one row of tables 9 to 12."""
    for row in reversed(series.rows):
        key = row.key
        names = {
            9: decoding_label(str(key.get("decoding"))),
            10: str(key.get("context")),
            11: next((p for p, d in PRECISIONS.items() if d == key.get("dtype")), ""),
            12: {"hf-eager": "Transformers"}.get(str(key.get("stack")), str(key.get("stack"))),
        }
        if row.kind != "card" and names[table] == label:
            return row
    return None


def decoding_label(decoding: str) -> str:
    """The paper's name of a decoding method: "temperature 1.5" is High Temp, "top-k 50" Top-k (50).

    Temperatures above 1 are high, below 1 low.
    """
    name, _, value = decoding.partition(" ")
    if name == "temperature":
        return "High Temp" if float(value) > 1 else "Low Temp"
    return f"{name.capitalize()} ({value})" if value else name.capitalize()


def paper_tables(records: Sequence[Record], published: StudyFile) -> list[PaperTable]:
    """Tables 1 to 12, or an empty list where none of the paper's models is among the rows."""
    if not any(paper_name(r.key.get("model"), published) for r in records):
        return []
    s = study(records, published)
    return [_paper_table(s, number, spec) for number, spec in sorted(published["tables"].items())]


def _paper_table(s: Study, number: int, spec: PrintedTable) -> PaperTable:
    columns = tuple((n, c["unit"], c.get("meant", c["unit"])) for n, c in spec["columns"].items())
    rows = dict(spec["rows"])
    if number == 12:  # stacks that the paper does not have
        ours = {str(r.key.get("stack")) for r in s.ablation["stack"].rows if r.kind != "card"}
        rows |= {stack: [None] * len(columns) for stack in sorted(ours - {s.published["stack"]})}
    lines = []
    for label, values in rows.items():
        cells = tuple(
            _cell(s, number, label, column, printed, i)
            for i, (column, printed) in enumerate(zip(columns, values, strict=True))
        )
        lines.append((label, spec.get("row_notes", {}).get(label, ""), cells))
    note = spec.get("note", "")
    return PaperTable(number, spec["title"], spec["where"], note, columns, tuple(lines))


def _cell(
    s: Study, number: int, row: str, column: tuple[str, str, str], printed: str | None, index: int
) -> Cell:
    name, written, meant = column
    measured, series = measure(s, number, row, name, index)
    if number == 12 and row == "vLLM" and measured.value is None:
        measured = stats.missing(SERVER)
    paper = None if printed is None else float(printed)
    notes = [series.label()] if measured.value is not None else [measured.reason]
    if measured.value is not None and number in (6, 7) and name not in ("TPOT (tok/s)", "Tokens/W"):
        context = int(name) if number == 7 else s.published["context"]
        own = metrics.joules_per_1k(series, context, s.published["new_tokens"], "paper_energy_j")
        if own.value is not None:
            notes.append(f"by the paper's before/after estimator {number_text(own.value)} J")
    unit = written if meant.startswith("output") or ";" in meant else meant
    return Cell(
        number,
        row,
        name,
        unit,
        paper,
        printed,
        measured,
        _ratio(measured, paper, written),
        "; ".join(filter(None, notes)),
        verdict(number, name, written, printed, measured),
    )


def verdict(
    number: int, column: str, written: str, printed: str | None, measured: Estimate
) -> Ruling:
    """The verdict on one cell, by the tolerance of what its column holds."""
    if printed is None or float(printed) == 0:
        return Ruling("", "the paper has no value" if printed is None else "the reference")
    quantity = "memory" if number == 5 else "count" if column == "Active (B)" else "time"
    quantity = "effect" if (number, written) == (9, "%") else quantity
    allowed = band(printed, written, quantity)
    return of_value(measured, allowed, 0 if written == "%" else None)


def _ratio(measured: Estimate, paper: float | None, unit: str) -> Estimate:
    if measured.value is None:
        return stats.missing(measured.reason)
    if paper is None:
        return stats.missing("the paper has no value")
    if unit == "%" or paper <= 0:
        return stats.missing("no ratio of a change or a difference")
    return stats.scaled(measured, 1 / paper)


def csv_row(cell: Cell) -> dict[str, Any]:
    """One line of a table's CSV; what is missing is empty and the note says why."""
    return {
        "row": cell.row,
        "column": cell.column,
        "unit": cell.unit,
        "paper": cell.printed,
        "measured": cell.measured,
        "ratio": cell.ratio,
        "verdict": cell.verdict.word,
        "why": cell.verdict.why,
        "method": cell.measured.method,
        "note": cell.note,
    }


def write_csvs(records: Sequence[Record], published: StudyFile, out_dir: str | Path) -> list[Path]:
    """tables/table-01.csv to table-12.csv below `out_dir`; the paths, none without paper models."""
    folder = Path(out_dir) / "tables"
    return [
        write_csv(folder / f"table-{table.number:02d}.csv", map(csv_row, table.cells))
        for table in paper_tables(records, published)
    ]


def with_records(table: PaperTable, s: Study) -> PaperTable:
    """The table with the ids of the rows that each measured cell comes from."""
    rows = tuple(
        (label, note, tuple(_named(cell, _rows(s, cell, i)) for i, cell in enumerate(cells)))
        for label, note, cells in table.rows
    )
    return replace(table, rows=rows)


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
        rows = [arm_row(series, number, label) for label in labels]
    elif number in SWEEPS:
        model, at = (cell.row, cell.column) if number == 7 else (cell.column, cell.row)
        rows = [_row(s, s.base[model], what, int(at)) for what in SWEEPS[number]]
    elif number == 4:
        contexts = (128, context) if index == 0 else ((128, context)[index - 1],)
        rows = [_row(s, s.base[cell.row], "e2e", at) for at in contexts]
    else:
        rows = [_row(s, s.base[cell.row], what, context) for what in COLUMNS[number][index]]
        if number == 5 and index:
            rows.append(_row(s, s.base[s.published["ablation_model"]], "peak", context))
    return [row for row in rows if row is not None]


def _row(s: Study, series: Series, what: str, context: int) -> Record | None:
    if what == "card":
        return series.one("card")
    kind = {"ttft": "latency", "e2e": "latency", "energy": "energy", "peak": "memory-paper"}[what]
    tokens = 1 if what == "ttft" else s.published["new_tokens"]
    return series.one(kind, context=context, new_tokens=tokens)


def papers(
    tables: Sequence[PaperTable], rows: Sequence[Record], published: StudyFile
) -> list[PaperTable]:
    """All tables of the paper with their rows."""
    s = study(rows, published)
    return [with_records(table, s) for table in tables]
