"""The rows behind the report's numbers: which ones a cell comes from, and a list of them all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from lib.records.jobs import Job
from lib.records.record import Record, record_id
from lib.show.html import figure
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
)
LONGEST = 24  # samples shown of one name
BEHIND_A_TRACE = ("start_s", "stop_s", "token_s")


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
    html = "".join(f'<td class="{css}">{escape(str(text))}</td>' for css, text in cells)
    return f'<tr id="record-{name}"><th scope="row">{name}</th>{html}<td>{link}</td></tr>'


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
