"""The tables of a study, each cell beside what was measured by the same definition.

A cell holds the printed value, the measured estimate and their ratio, and what the library of today
gives where the study's software computed other experts. A cell without a measurement says why. The
study's file says for each table what its rows and columns are, and which metric each cell is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib import stats
from lib.analysis import metrics
from lib.analysis.series import Series, estimate
from lib.records.record import Record, record_id
from lib.show.table import write_csv
from lib.show.wording import number_text
from lib.stats import Estimate
from lib.studies import forms, verdict
from lib.studies.evidence import ARMS, Evidence, Map, difference, gather, lower_pct, refused
from lib.studies.schema import Column as PrintedColumn
from lib.studies.schema import PrintedTable, StudyFile
from lib.studies.study import Published, paper_name
from lib.studies.verdict import Verdict

CHANGES = ("change", "saving")  # forms of a column in percent, which have no ratio
HEADS = {"model": "Model", "context": "Context", "arm": "Row", "gpu": "GPU"}


@dataclass(frozen=True)
class Cell:
    """One number of the paper beside ours. `unit` is the unit meant; `printed` is verbatim.

    `today` is with the experts that the library of today computes; None where `measured` is.
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
    today: Estimate | None
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


@dataclass(frozen=True)
class Place:
    """What one cell is of: a metric and form, and the model and context, or the ablation's arm."""

    spec: PrintedTable
    column: PrintedColumn
    metric: str
    form: str
    model: str
    context: int
    row: str
    gpu: str


def _place(e: Evidence, spec: PrintedTable, row: str, column: str) -> Place:
    own, data = spec["columns"][column], e.published.data
    where = {"model": data["ablation_model"], "context": data["context"]}
    where |= {spec.get("rows_are", "model"): row, spec.get("columns_are", ""): column}
    context = int(own.get("context", where["context"]))
    metric = own.get("metric", spec.get("metric", ""))
    gpu = where.get("gpu", "")
    return Place(spec, own, metric, own.get("form", ""), where["model"], context, row, gpu)


def _series(at: Place, m: Map, ablation: Map) -> Series:
    return ablation[at.spec["ablation"]] if "ablation" in at.spec else m[at.model]


def measure(e: Evidence, at: Place, m: Map, ablation: Map) -> Estimate:
    """The measured estimate of one cell, of the given series."""
    if "ablation" in at.spec:
        return _ablation_cell(e, at, ablation[at.spec["ablation"]])
    card = e.published.data.get("gpus", {}).get(at.gpu, {})
    if "reason" in card:
        return stats.missing(card["reason"])
    if not at.metric:
        return stats.missing("not measured: no metric of this workbook is this quantity")
    ours = {e.envs.get(r.env_id or "", {}).get("gpu") for r in m[at.model].rows}
    if card and ours and card["name"] not in ours:
        return stats.missing(f"not measured: no row of {card['name']}")
    metric, here = forms.metric_of(at.metric), (m, at.model, at.context)
    if at.form == "change":
        before = (m, at.model, at.column["before"])
        return metrics.percent_change(metric.over(e, here, before))
    if not at.form:
        return metric.at(e, *here)
    least = (m, e.reference, at.context)
    if at.form == "saving":
        return lower_pct(metric.over(e, least, here))
    pair = [metric.at(e, *place) for place in (here, least)]
    rows = [next((r for r in m[x].rows if r.kind != "card"), None) for _, x, _ in (here, least)]
    return refused(e, rows) or difference(*pair)


def _ablation_cell(e: Evidence, at: Place, series: Series) -> Estimate:
    """Throughput of an arm of an ablation, its time, or its change against the reference arm."""
    arm = arm_row(series, at.spec, at.row)
    if arm is None:
        kind = f"ablation-{at.spec['ablation']}"
        reason = series.reason or f"not measured: no {kind} row for {at.row}"
        return stats.missing(at.spec.get("row_reasons", {}).get(at.row, reason))
    if at.form == "change":
        if at.row == at.spec["reference"] and arm.samples.get("e2e_s"):
            n, own = len(arm.samples["e2e_s"]), (record_id(arm),)
            return Estimate(0.0, n=n, method="the reference arm", records=own)
        return metrics.percent_change(arm_ratio(series, at.spec, at.row, at.spec["reference"]))
    tokens = arm.key.get("new_tokens") or e.arm[1]
    time_s = replace(estimate(_arm_samples(arm)), records=(record_id(arm),))
    return time_s if at.metric == "e2e_s" else stats.inverse(time_s, tokens)


def arm_ratio(series: Series, spec: PrintedTable, label: str, other: str) -> Estimate:
    """Output throughput of one row of a table of arms over that of another."""
    arms = [arm_row(series, spec, name) for name in (label, other)]
    if None in arms:
        absent = (label, other)[arms.index(None)]
        return stats.missing(series.reason or f"not measured: no row for {absent}")
    if reason := next((why for _, why in map(_arm_samples, arms) if why), ""):
        return stats.missing(reason)
    return metrics.METRICS["output"].ratio(*([arm] for arm in arms))


def _arm_samples(arm: Record) -> tuple[list[float], str]:
    if arm.error:
        return [], f"failed: {arm.error}"
    values = arm.samples.get("e2e_s") or []
    return values, "" if values else f"not measured: {arm.missing.get('e2e_s', 'no e2e_s')}"


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
    e = gather(records, Published(published))
    return [_paper_table(e, number, spec) for number, spec in sorted(published["tables"].items())]


def _paper_table(e: Evidence, number: int, spec: PrintedTable) -> PaperTable:
    columns, rows = tuple(spec["columns"].items()), dict(spec["rows"])
    if spec.get("more_rows"):  # arms that the paper does not have
        field, theirs = ARMS[spec["ablation"]], {*map(str, spec.get("arms", {}).values())}
        ours = {
            str(r.key.get(field)) for r in e.ablation[spec["ablation"]].rows if r.kind != "card"
        }
        rows |= {arm: [None] * len(columns) for arm in sorted(ours - theirs)}
    lines = []
    for label, values in rows.items():
        cells = tuple(
            _cell(e, number, spec, label, name, printed)
            for (name, _), printed in zip(columns, values, strict=True)
        )
        lines.append((label, spec.get("row_notes", {}).get(label, ""), cells))
    return PaperTable(number, spec, columns, tuple(lines))


def meant(column: PrintedColumn) -> str:
    """The unit by which the numbers of a column were computed."""
    return column.get("meant", column["unit"])


def _cell(
    e: Evidence, number: int, spec: PrintedTable, row: str, column: str, printed: str | None
) -> Cell:
    at = _place(e, spec, row, column)
    own, now = (e.like_paper, e.ablation_like_paper), (e.base, e.ablation)
    measured = measure(e, at, *own)
    arm = arm_row(_series(at, *own), spec, row) if "ablation" in spec else None
    series, differs = _series(at, *own), _differs(e, at)
    if arm and arm.key.get("engine"):  # it computes its own way, whatever the library does
        series, differs = Series((arm,)), False
    today = measure(e, at, *now) if differs else None
    written, unit = at.column["unit"], meant(at.column)
    paper = None if printed is None else float(printed)
    notes = [measured.reason if measured.value is None else series.label()]
    if today is not None and today.value is not None:
        notes.append(
            f"the library of today: {number_text(today.value)} ({_series(at, *now).label()})"
        )
    if measured.value is not None and at.metric == "joules_per_1k":
        theirs = forms.PAPER_JOULES.at(e, own[0], at.model, at.context)
        if theirs.value is not None:
            notes.append(f"by the paper's before/after estimator {number_text(theirs.value)} J")
    return Cell(
        number,
        row,
        column,
        written if unit.startswith("output") or ";" in unit else unit,
        paper,
        printed,
        measured,
        today,
        _ratio(measured, paper, at.form),
        "; ".join(filter(None, notes)),
        judged(e, at, printed, measured),
    )


def _differs(e: Evidence, at: Place) -> bool:
    """Whether a cell depends on the experts, and the study's software ran others than today's."""
    if "ablation" in at.spec:
        return e.ablation_like_paper is not e.ablation
    depends = at.metric in forms.METRICS and forms.METRICS[at.metric].experts
    own = at.model == e.reference or at.form in ("difference", "saving")
    return depends and own and e.like_paper is not e.base


def judged(e: Evidence, at: Place, printed: str | None, measured: Estimate) -> Verdict:
    """The verdict on one cell, by the tolerance of what its column holds."""
    if printed is None or float(printed) == 0:
        return Verdict("", "the paper has no value" if printed is None else "the reference")
    quantity = at.column.get("tolerance", at.spec.get("tolerance", "time"))
    allowed = verdict.band(printed, at.column["unit"], quantity)
    neutral = 0 if at.form in CHANGES else None
    return verdict.of_value(verdict.settled(measured, e.doubts), allowed, neutral)


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
        "today": cell.today or stats.missing(""),
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
