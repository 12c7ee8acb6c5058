"""All numbers of a folder as one tidy DataFrame: `frame(folder)`, one line a metric and arm.

make export FROM=outputs/released/h100-sxm OUT=outputs/export
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from lib.analysis.efficiency import with_card
from lib.analysis.estimators import ONE_ROW
from lib.analysis.metrics import METRICS, Metric
from lib.analysis.rows import SETUP, Rows, load
from lib.files import require_room
from lib.records.record import Record, record_id
from lib.show.table import write_csv

# The data dictionary: what each column holds.
COLUMNS = {
    "metric": "name of the metric, see metrics.csv",
    "value": "its estimate in its unit; missing with a reason",
    "low": "lower end of its interval; missing where there is none",
    "high": "upper end of its interval",
    "level": "how often the interval covers; missing for a range of visits",
    "n": "repetitions behind the estimate",
    "model": "the model's name",
    "weights": "random, checkpoint or gguf",
    "dtype": "number format of the weights",
    "gpu": "name of the GPU, or that there was none",
    "stack": "what generated the tokens",
    "experts": "implementation of a mixture's experts; missing for dense models",
    "context": "tokens of the prompt",
    "batch": "sequences at once",
    "new_tokens": "generated tokens of each sequence; missing where the metric is of several",
    "environment": "id of the environment's row",
    "run": "folder of the job below the results",
    "kind": "kind of the row",
    "decoding": "greedy, or the sampling",
    "server": "kind of the server; missing where none was loaded",
    "load": "how it was loaded: users of a closed loop, or a rate",
    "unit": "unit of value, low and high",
    "method": "how the estimate and its interval were made",
    "reason": "why the value, or its interval, is missing",
}
KEY = ("model", "context", "batch", "decoding", "server", "load")
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
    return pd.DataFrame(lines, columns=list(COLUMNS)).astype(numbers | whole)


def _lines(metric: Metric, rows: Rows) -> list[dict[str, Any]]:
    lines, of_one_row = [], isinstance(metric.of, ONE_ROW)
    for arm in _arms(metric, rows, of_one_row):
        row, lengths = arm[-1], {r.key.get("new_tokens") for r in arm}
        estimate = metric.of(arm if of_one_row else with_card(rows, arm))
        meant = not of_one_row or row.error or metric.of.name in row.missing
        if estimate.value is None and not meant:  # a call of another sort
            continue
        line = {name: row.key.get(name) for name in KEY}
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
        fields = (row.key.get(name) for name in KEY)
        arms.setdefault((*fields, rows.setup(row)), []).append(row)
    return list(arms.values())


def export(folder: str | Path, out: str | Path) -> list[Path]:
    """Write all numbers of a folder as CSV and Parquet, with what the columns and metrics are.

    Returns numbers.csv, numbers.parquet, columns.csv and metrics.csv below `out`.
    """
    target = Path(out)
    require_room(target)
    numbers = frame(folder)
    paths = [target / f"numbers.{kind}" for kind in ("csv", "parquet")]
    numbers.to_csv(paths[0], index=False)
    numbers.to_parquet(paths[1], index=False)
    columns = [{"column": name, "meaning": meaning} for name, meaning in COLUMNS.items()]
    metrics = [
        {
            "metric": metric.name,
            "title": metric.title,
            "unit": metric.unit,
            "formula": metric.formula,
            "better": {True: "higher", False: "lower", None: ""}[metric.higher_is_better],
            "paper's name": metric.paper_name,
        }
        for metric in METRICS.values()
    ]
    paths += [
        write_csv(target / "columns.csv", columns),
        write_csv(target / "metrics.csv", metrics),
    ]
    return paths
