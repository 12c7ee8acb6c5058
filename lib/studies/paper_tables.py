"""The tables of a study, each cell beside what was measured by the same definition.

A cell holds the printed value, the measured estimate and their ratio. A cell without a
measurement says why. The study's file says for each table what its rows and columns are, and which
of METRICS each cell is.
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
from lib.files import unknown
from lib.records.record import Record, record_id, require_comparable
from lib.show.table import write_csv
from lib.show.wording import number_text
from lib.stats import Estimate
from lib.studies import evidence
from lib.studies.schema import Column as PrintedColumn
from lib.studies.schema import PrintedTable, StudyFile
from lib.studies.study import Study, paper_name, study
from lib.studies.verdict import Verdict, band, of_value

# What an ablation changes, and so what tells its arms apart.
ARMS = {"decoding": "decoding", "context": "context", "precision": "dtype", "stack": "stack"}
CHANGES = ("change", "saving")  # forms of a column in percent, which have no ratio
HEADS = {"model": "Model", "context": "Context", "arm": "Row", "gpu": "GPU"}


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
    verdict: Verdict

    @property
    def n(self) -> int:
        """Repetitions behind the measured value."""
        return self.measured.n


@dataclass(frozen=True)
class PaperTable:
    """One table as the study's file describes it, and its cells row by row."""

    number: int
    spec: PrintedTable
    columns: tuple[tuple[str, PrintedColumn], ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]  # label, note of the paper, cells

    @property
    def cells(self) -> list[Cell]:
        """All cells, row by row."""
        return [cell for _, _, cells in self.rows for cell in cells]


# Metrics of one model's arm, and the rows that each is computed from.
METRICS: dict[str, tuple[Callable[[Series, int, int], Estimate], tuple[str, ...]]] = {
    "ttft_ms": (partial(metrics.at, "ttft"), ("ttft",)),
    "p50_ms": (partial(metrics.at, "p50"), ("e2e",)),
    "p95_ms": (partial(metrics.at, "p95"), ("e2e",)),
    "output_tok_per_s": (partial(metrics.at, "output"), ("e2e",)),
    "energy_output_tok_per_s": (partial(metrics.at, "output", kind="energy"), ("energy",)),
    "tokens_per_j": (partial(metrics.at, "tok_per_j"), ("energy",)),
    "joules_per_1k": (partial(metrics.at, "j_per_1k"), ("energy",)),
    "peak_mib": (partial(metrics.at, "peak_mib"), ("peak",)),
    "active_billion": (partial(metrics.at, "active"), ("card",)),
    "ape_tpot": (partial(metrics.at, "ape_tpot"), ("card", "e2e")),
    "ape_ttft": (partial(metrics.at, "ape_ttft"), ("card", "ttft")),
    "ape_energy": (partial(metrics.at, "ape_energy"), ("card", "energy")),
    "tok_per_s_per_1000_mib": (partial(metrics.at, "tok_per_s_per_1000_mib"), ("e2e", "peak")),
}


# Metrics of the decode steps of all lengths at a context.
STEPS: dict[str, Callable[[Series, int, dict], Estimate]] = {
    "decode_step_ms": evidence.decode_step_ms,
    "memory_floor_share": evidence.memory_floor_share,
    "memory_floor_pct": lambda *at: stats.scaled(evidence.memory_floor_share(*at), 100),
}


@dataclass(frozen=True)
class Place:
    """What one cell is of: a metric and form, and the model and context, or the ablation's arm."""

    spec: PrintedTable
    column: PrintedColumn
    metric: str
    form: str
    series: Series
    context: int
    row: str
    gpu: str


def _place(s: Study, spec: PrintedTable, row: str, column: str) -> Place:
    own = spec["columns"][column]
    where = {"model": s.published["ablation_model"], "context": s.published["context"]}
    where |= {spec.get("rows_are", "model"): row, spec.get("columns_are", ""): column}
    series = s.ablation[spec["ablation"]] if "ablation" in spec else s.base[where["model"]]
    context = int(own.get("context", where["context"]))
    metric = own.get("metric", spec.get("metric", ""))
    return Place(spec, own, metric, own.get("form", ""), series, context, row, where.get("gpu", ""))


def measure(s: Study, at: Place) -> Estimate:
    """The measured estimate of one cell."""
    if "ablation" in at.spec:
        return _ablation_cell(s, at)
    card = s.published.get("gpus", {}).get(at.gpu, {})
    if "reason" in card:
        return stats.missing(card["reason"])
    if not at.metric:
        return stats.missing("not measured: no metric of this workbook is this quantity")
    if at.metric in STEPS:
        ours = {s.environments.get(r.env_id or "", {}).get("gpu") for r in at.series.rows}
        if card and at.series.rows and card["name"] not in ours:
            return stats.missing(f"not measured: no row of {card['name']}")
        return STEPS[at.metric](at.series, at.context, s.environments)
    tokens = s.published["new_tokens"]
    if at.form == "change":
        contexts = (at.column["before"], at.context)
        arms = (samples(at.series, "latency", "e2e_s", c, tokens) for c in contexts)
        return metrics.throughput_change_pct(*arms)
    if at.metric not in METRICS:
        raise unknown("metric", at.metric, [*METRICS, *STEPS])
    of, kinds = METRICS[at.metric]
    value = of(at.series, at.context, tokens)
    return _against_reference(s, at, value) if at.form else value


def _against_reference(s: Study, at: Place, value: Estimate) -> Estimate:
    """A reading less the study's model's, or how much less the study's model needs (%)."""
    of, (kind,) = METRICS[at.metric]
    arm = (at.context, s.published["new_tokens"])
    reference = s.base[s.published["ablation_model"]]
    least = of(reference, *arm)
    if value.value is None or least.value is None:
        return value if value.value is None else least
    pair = [_row(s, series, kind, at.context) for series in (at.series, reference)]
    try:
        require_comparable(pair, s.environments)
    except ValueError as error:
        return stats.missing(f"not compared: {error}")
    change = value.value - least.value
    if at.form == "saving":
        change = 100 * (1 - least.value / value.value)
    return replace(value, value=change, method="difference of single readings")


def _ablation_cell(s: Study, at: Place) -> Estimate:
    """Throughput of an arm of an ablation, its time, or its change against the reference arm."""
    arm = arm_row(at.series, at.spec, at.row)
    if arm is None:
        kind = f"ablation-{at.spec['ablation']}"
        reason = at.series.reason or f"not measured: no {kind} row for {at.row}"
        return stats.missing(at.spec.get("row_reasons", {}).get(at.row, reason))
    times_s = _arm_samples(arm)
    if at.form != "change":
        time_s, tokens = estimate(times_s), arm.key.get("new_tokens") or s.published["new_tokens"]
        return time_s if at.metric == "e2e_s" else stats.inverse(time_s, tokens)
    reference = arm_row(at.series, at.spec, at.spec["reference"])
    if reference is None:
        return stats.missing("not measured: no reference arm")
    if reference is arm and times_s[0]:
        return Estimate(0.0, n=len(times_s[0]), method="the reference arm")
    return metrics.throughput_change_pct(_arm_samples(reference), times_s)


def _arm_samples(arm: Record) -> tuple[list[float], str]:
    if arm.error:
        return [], f"failed: {arm.error}"
    return arm.samples.get("e2e_s") or [], f"not measured: {arm.missing.get('e2e_s', 'no e2e_s')}"


def arm_row(series: Series, spec: PrintedTable, label: str) -> Record | None:
    """The last record of one row of a table of arms."""
    value = str(spec.get("arms", {}).get(label, label))
    field = ARMS[spec["ablation"]]
    rows = (r for r in reversed(series.rows) if r.kind != "card" and str(r.key[field]) == value)
    return next(rows, None)


def paper_tables(records: Sequence[Record], published: StudyFile) -> list[PaperTable]:
    """The tables in order, or an empty list where none of the paper's models is among the rows."""
    if not any(paper_name(r.key.get("model"), published) for r in records):
        return []
    s = study(records, published)
    return [_paper_table(s, number, spec) for number, spec in sorted(published["tables"].items())]


def _paper_table(s: Study, number: int, spec: PrintedTable) -> PaperTable:
    columns, rows = tuple(spec["columns"].items()), dict(spec["rows"])
    if spec.get("more_rows"):  # arms that the paper does not have
        field, theirs = ARMS[spec["ablation"]], {*map(str, spec.get("arms", {}).values())}
        ours = {
            str(r.key.get(field)) for r in s.ablation[spec["ablation"]].rows if r.kind != "card"
        }
        rows |= {arm: [None] * len(columns) for arm in sorted(ours - theirs)}
    lines = []
    for label, values in rows.items():
        cells = tuple(
            _cell(s, number, spec, label, name, printed)
            for (name, _), printed in zip(columns, values, strict=True)
        )
        lines.append((label, spec.get("row_notes", {}).get(label, ""), cells))
    return PaperTable(number, spec, columns, tuple(lines))


def meant(column: PrintedColumn) -> str:
    """The unit by which the numbers of a column were computed."""
    return column.get("meant", column["unit"])


def _cell(
    s: Study, number: int, spec: PrintedTable, row: str, column: str, printed: str | None
) -> Cell:
    at = _place(s, spec, row, column)
    measured, written = measure(s, at), at.column["unit"]
    paper = None if printed is None else float(printed)
    arm = arm_row(at.series, spec, row) if "ablation" in spec else None
    series = Series((arm,)) if arm and arm.key.get("engine") else at.series
    notes = [series.label()] if measured.value is not None else [measured.reason]
    if measured.value is not None and at.metric == "joules_per_1k":
        arm = (at.series, at.context, s.published["new_tokens"])
        own = metrics.at("j_per_1k_paper", *arm)
        if own.value is not None:
            notes.append(f"by the paper's before/after estimator {number_text(own.value)} J")
    unit = meant(at.column)
    ids = tuple(dict.fromkeys(record_id(row) for row in _rows(s, at)))
    if measured.value is not None and ids:
        measured = replace(measured, records=ids)
    return Cell(
        number,
        row,
        column,
        written if unit.startswith("output") or ";" in unit else unit,
        paper,
        printed,
        measured,
        _ratio(measured, paper, at.form),
        "; ".join(filter(None, notes)),
        verdict(at, printed, measured),
    )


def verdict(at: Place, printed: str | None, measured: Estimate) -> Verdict:
    """The verdict on one cell, by the tolerance of what its column holds."""
    if printed is None or float(printed) == 0:
        return Verdict("", "the paper has no value" if printed is None else "the reference")
    quantity = at.column.get("tolerance", at.spec.get("tolerance", "time"))
    allowed = band(printed, at.column["unit"], quantity)
    return of_value(measured, allowed, 0 if at.form in CHANGES else None)


def _ratio(measured: Estimate, paper: float | None, form: str) -> Estimate:
    if measured.value is None:
        return stats.missing(measured.reason)
    if paper is None:
        return stats.missing("the paper has no value")
    if form in CHANGES or paper <= 0:
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


def write_csvs(tables: Sequence[PaperTable], out_dir: str | Path) -> list[Path]:
    """tables/table-01.csv and so on below `out_dir`; the paths."""
    folder = Path(out_dir) / "tables"
    return [
        write_csv(folder / f"table-{table.number:02d}.csv", map(csv_row, table.cells))
        for table in tables
    ]


def _rows(s: Study, at: Place) -> list[Record]:
    """The rows that a cell comes from."""
    if "ablation" in at.spec:
        labels = [at.row, *([at.spec["reference"]] if at.form == "change" else [])]
        rows = [arm_row(at.series, at.spec, label) for label in labels]
    elif at.metric not in METRICS:
        rows = []
    else:
        contexts = [*([at.column["before"]] if at.form == "change" else []), at.context]
        rows = [_row(s, at.series, k, c) for k in METRICS[at.metric][1] for c in contexts]
        if at.form in ("difference", "saving"):
            reference = s.base[s.published["ablation_model"]]
            rows += [_row(s, reference, k, at.context) for k in METRICS[at.metric][1]]
    return [row for row in rows if row is not None]


def _row(s: Study, series: Series, what: str, context: int) -> Record | None:
    if what == "card":
        return series.one("card")
    kind = {"ttft": "latency", "e2e": "latency", "energy": "energy", "peak": "memory-paper"}[what]
    tokens = 1 if what == "ttft" else s.published["new_tokens"]
    return series.one(kind, context=context, new_tokens=tokens)
