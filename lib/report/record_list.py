"""The rows behind the report's numbers: which ones a cell comes from, and a list of them all."""

from __future__ import annotations

from collections.abc import Sequence

from lib.records.jobs import Job
from lib.records.record import Record, record_id
from lib.show.table import Column, Table, Text
from lib.show.wording import short

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
    "engine",
    "server",
    "load",
    "devices",
)
LONGEST = 12  # samples shown of one name
NOTE = (
    "one line for each arm, in SI units, the unit in the name; records.jsonl in its folder "
    "holds it whole, with its warnings and the reason for what is missing"
)
BEHIND_A_TRACE = ("start_s", "stop_s", "token_s")


def table(rows: Sequence[Record], jobs: Sequence[Job]) -> Table:
    """The rows of these jobs: arm, repetitions, environment, and the folder whose records.jsonl
    holds them.

    `jobs` are in the order in which their rows replace each other, so that the last one counts.
    """
    home = {record_id(row): job for job in jobs for row in job.records}
    rows = [row for row in rows if row.kind != "environment" and record_id(row) in home]
    names = [record_id(row) for row in rows]
    titles = ("record", "kind", "model", "arm", "repetitions and readings", "folder")
    cells = (
        tuple(map(Text, (n, r.kind, r.key.get("model") or "–", _arm(r), _content(r), home[n].path)))
        for n, r in zip(names, rows, strict=True)
    )
    return Table(
        "records",
        "Records",
        tuple(Column(title, numeric=False) for title in titles),
        tuple(cells),
        (NOTE,),
    )


def _arm(row: Record) -> str:
    texts = [
        f"{name.replace('_', ' ')} {row.key[name]}"
        for name in sorted(row.key, key=FIELDS.index)
        if name != "model" and row.key[name] not in (None, "none")
    ]
    return ", ".join([*texts, f"environment {row.env_id}"])


def _content(row: Record) -> str:
    """Samples as they are, to four digits; of a row without samples its readings."""
    if row.error:
        return f"failed: {row.error}"
    texts = []
    for name, values in row.samples.items():
        if name in BEHIND_A_TRACE or not all(isinstance(v, int | float) for v in values):
            texts.append(f"{name}: {len(values)} in the file")
            continue
        more = f" and {len(values) - LONGEST} more" if len(values) > LONGEST else ""
        texts.append(f"{name}: {', '.join(f'{v:.4g}' for v in values[:LONGEST])}{more}")
    readings = {
        k: v
        for k, v in row.values.items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }
    texts = texts or [f"{name} {short(value)}" for name, value in readings.items()]
    return "; ".join(texts) or "–"
