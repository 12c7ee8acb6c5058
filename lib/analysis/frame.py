"""All numbers of a folder as one tidy DataFrame: `frame(folder)`, one line a metric and arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lib.analysis.efficiency import with_card
from lib.analysis.metrics import METRICS, ONE_ROW, Metric
from lib.analysis.rows import SETUP, Rows, load
from lib.records.record import Record, record_id

COLUMNS = (
    "metric", "value", "low", "high", "level", "n",
    "model", "weights", "dtype", "gpu", "stack", "experts", "context", "batch", "new_tokens",
    "environment", "run", "kind", "decoding", "unit", "method", "reason",
)  # fmt: skip
ESTIMATE = ("value", "low", "high", "level", "n", "method", "reason")


def frame(folder: str | Path) -> pd.DataFrame:
    """Every metric of every arm below a folder of results, in the columns COLUMNS.

    `metric` is a name of METRICS; `low` and `high` are the interval, `level` how often such an
    interval covers. A missing value is NaN with a `reason`. `new_tokens` is missing where a metric
    is of several lengths. `environment` and `run` (a job's folder below this one) are those of the
    last row.
    """
    rows = load(folder)
    lines = [line for metric in METRICS.values() for line in _lines(metric, rows)]
    numbers = dict.fromkeys(("value", "low", "high", "level"), "float64")
    whole = dict.fromkeys(("n", "context", "batch", "new_tokens"), "Int64")
    return pd.DataFrame(lines, columns=COLUMNS).astype(numbers | whole)


def _lines(metric: Metric, rows: Rows) -> list[dict[str, Any]]:
    lines, of_one_row = [], isinstance(metric.of, ONE_ROW)
    for arm in _arms(metric, rows, of_one_row):
        row, lengths = arm[-1], {r.key.get("new_tokens") for r in arm}
        estimate = metric.of(arm if of_one_row else with_card(rows, arm))
        meant = not of_one_row or row.error or metric.of.name in row.missing
        if estimate.value is None and not meant:  # a call of another sort
            continue
        line = {name: row.key.get(name) for name in ("model", "context", "batch", "decoding")}
        line |= {n: None if v == "None" else v for n, v in zip(SETUP, rows.setup(row), strict=True)}
        line |= {name: getattr(estimate, name) for name in ESTIMATE}
        line["level"] = None if estimate.low is None else estimate.level
        line |= {"metric": metric.name, "unit": metric.unit, "kind": row.kind}
        line |= {"environment": row.env_id, "run": rows.runs.get(record_id(row))}
        lines.append(line | {"new_tokens": lengths.pop() if len(lengths) == 1 else None})
    return lines


def _arms(metric: Metric, rows: Rows, of_one_row: bool) -> list[list[Record]]:
    """What the metric is of: single rows, or the rows of all kinds and lengths of one setup."""
    kinds = [kind for kind in metric.kinds if kind != "trace" or of_one_row]
    mine = rows.of_kinds(kinds if kinds == ["card"] else [k for k in kinds if k != "card"])
    if of_one_row:
        return [[row] for row in mine]
    arms: dict[tuple, list[Record]] = {}
    for row in mine:
        fields = (row.key.get(name) for name in ("model", "context", "batch", "decoding"))
        arms.setdefault((*fields, rows.setup(row)), []).append(row)
    return list(arms.values())
