"""Tables 1 to 12 of the paper, each cell beside what was measured by the same definition.

A cell holds the printed value, the measured estimate and their ratio. A cell without a
measurement says why. The rules of the columns are the functions of `analysis.series`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lib import judge, stats
from lib.analysis import metrics as rules
from lib.analysis import series as analysis_series
from lib.analysis.series import Series, Study
from lib.records.record import Record, require_comparable
from lib.show import wording
from lib.stats import Estimate

CSV_COLUMNS = (
    "row",
    "column",
    "unit",
    "paper",
    "measured",
    "low",
    "high",
    "ratio",
    "ratio_low",
    "ratio_high",
    "verdict",
    "why",
    "n",
    "method",
    "note",
)
SERVER = (
    "not measured: it needs a vLLM server in an environment of its own, and a client that "
    "sends it requests; serving is not part of this workbook yet"
)
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
    verdict: judge.Ruling

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
    1: (rules.ttft_ms, rules.p50_ms, rules.p95_ms, rules.output_tok_per_s),
    6: (partial(rules.output_tok_per_s, kind="energy"), rules.tokens_per_j, rules.joules_per_1k),
    8: (
        rules.active_billion,
        rules.ape_tpot,
        rules.ape_ttft,
        rules.ape_energy,
        rules.tok_per_s_per_1000_mib,
    ),
}
SWEEP_RULES: dict[int, Callable[..., Estimate]] = {
    2: rules.output_tok_per_s,
    3: rules.ttft_ms,
    7: rules.joules_per_1k,
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
        arms = [
            analysis_series.samples(series, "latency", "e2e_s", c, tokens) for c in (128, context)
        ]
        if index == 0:
            return rules.throughput_change_pct(*arms), series
        return rules.output_tok_per_s(series, (128, context)[index - 1], tokens), series
    if table == 5:
        return _peak_cell(s, row, index), s.base[row]
    return _ablation_cell(s, table, row, index)


def _peak_cell(s: Study, row: str, index: int) -> Estimate:
    """Table 5: the peak, its distance to GPT-OSS, and how much less GPT-OSS needs."""
    arm = (s.published["context"], s.published["new_tokens"])
    mine, reference = s.base[row], s.base[s.published["ablation_model"]]
    peak, least = rules.peak_mib(mine, *arm), rules.peak_mib(reference, *arm)
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
    name = {9: "decoding", 10: "context", 11: "precision", 12: "stack"}[table]
    series, kind = s.ablation[name], f"ablation-{name}"
    arm = arm_row(series, table, row)
    if arm is None:
        return stats.missing(series.reason or f"not measured: no {kind} row for {row}"), series
    found = _arm_samples(arm)
    time_s = analysis_series.estimate(found)
    if index == 0:
        return stats.inverse(time_s, arm.key.get("new_tokens") or tokens), series
    if index == 1 and table in (9, 12):
        return time_s, series
    reference = arm_row(series, table, {9: "Greedy", 10: "512"}[table])
    if reference is None:
        return stats.missing("not measured: no reference arm"), series
    if reference is arm and found[0]:
        return Estimate(0.0, n=len(found[0]), method="the reference arm"), series
    return rules.throughput_change_pct(_arm_samples(reference), found), series


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


def paper_tables(records: Sequence[Record], published: dict[str, Any]) -> list[PaperTable]:
    """Tables 1 to 12, or an empty list where none of the paper's models is among the rows."""
    if not any(analysis_series.paper_name(r.key.get("model"), published) for r in records):
        return []
    s = analysis_series.study(records, published)
    return [_paper_table(s, number, spec) for number, spec in sorted(published["tables"].items())]


def _paper_table(s: Study, number: int, spec: dict[str, Any]) -> PaperTable:
    columns = tuple((n, c["unit"], c.get("meant", c["unit"])) for n, c in spec["columns"].items())
    rows = dict(spec["rows"])
    if number == 12:  # stacks that the paper does not have
        ours = {str(r.key.get("stack")) for r in s.ablation["stack"].rows if r.kind != "card"}
        rows |= {stack: [None] * len(columns) for stack in sorted(ours - {s.published["stack"]})}
    built = []
    for label, values in rows.items():
        cells = tuple(
            _cell(s, number, label, column, printed, i)
            for i, (column, printed) in enumerate(zip(columns, values, strict=True))
        )
        built.append((label, spec.get("row_notes", {}).get(label, ""), cells))
    note = spec.get("note", "")
    return PaperTable(number, spec["title"], spec["where"], note, columns, tuple(built))


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
        own = rules.joules_per_1k(series, context, s.published["new_tokens"], "paper_energy_j")
        if own.value is not None:
            notes.append(
                f"by the paper's before/after estimator {wording.number_text(own.value)} J"
            )
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
) -> judge.Ruling:
    """The verdict on one cell, by the tolerance of what its column holds."""
    if printed is None or float(printed) == 0:
        return judge.Ruling("", "the paper has no value" if printed is None else "the reference")
    quantity = "memory" if number == 5 else "count" if column == "Active (B)" else "time"
    quantity = "effect" if (number, written) == (9, "%") else quantity
    allowed = judge.band(printed, written, quantity)
    return judge.of_value(measured, allowed, 0 if written == "%" else None)


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
    m, r = cell.measured, cell.ratio
    return {
        "row": cell.row,
        "column": cell.column,
        "unit": cell.unit,
        "paper": cell.printed or "",
        "measured": wording.number_text(m.value),
        "low": wording.number_text(m.low),
        "high": wording.number_text(m.high),
        "ratio": wording.number_text(r.value),
        "ratio_low": wording.number_text(r.low),
        "ratio_high": wording.number_text(r.high),
        "verdict": cell.verdict.word,
        "why": cell.verdict.why,
        "n": m.n or "",
        "method": m.method,
        "note": cell.note,
    }


def write_csvs(
    records: Sequence[Record], published: dict[str, Any], out_dir: str | Path
) -> list[Path]:
    """tables/table-01.csv to table-12.csv below `out_dir`; the paths, none without paper models."""
    paths = []
    for table in paper_tables(records, published):
        path = Path(out_dir) / "tables" / f"table-{table.number:02d}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(csv_row(cell) for cell in table.cells)
        paths.append(path)
    return paths
