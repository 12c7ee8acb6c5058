"""What the measuring itself cost: where the time of each job went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from lib.records.jobs import Job
from lib.records.record import Record, select
from lib.show.table import Column, Table
from lib.show.wording import short
from lib.stats import Estimate

TIMED = ("ttft_s", "e2e_s")
COLUMNS = (
    Column("model", numeric=False), Column("setup", numeric=False),
    Column("notebook", numeric=False), Column("whole job", "s"), Column("start-up", "s"),
    Column("imports", "s"), Column("model build", "s"), Column("captures and compilations", "s"),
    Column("warm-up", "s"), Column("timed calls", "s"), Column("everything else", "s"),
)  # fmt: skip
NOTES = (
    "start-up: the job less its cells, which is the kernel's start and the writing of files; "
    "imports: the first cell; model build: from files or a seed to a model on the device; "
    "everything else: untimed measurements, models that arms load for themselves, figures",
)


def table(jobs: Sequence[Job]) -> Table:
    """One line for each finished job of a measuring notebook; seconds."""
    measured = [job for job in jobs if job.status == "ok" and select(job.records, "environment")]
    rows = tuple(
        (job.model, job.setup, job.title, *map(_seconds, parts(job).values())) for job in measured
    )
    return Table("costs", "What the measuring cost", COLUMNS, rows, _notes(measured))


def parts(job: Job) -> dict[str, float]:
    """Seconds of a job by what they went into; `other` is what is left."""
    cells = cell_seconds(job)
    prepare = sum(row.values.get("prepare_s") or 0.0 for row in job.own)
    found = {
        "job": span_s(job.run),
        "startup": span_s(job.run) - sum(cells),
        "imports": cells[0] if cells else 0.0,
        "build": sum(row.values.get("load_s") or 0.0 for row in select(job.own, "card")),
        "prepare": prepare,
        "warmup": max(0.0, summed(job.own, ("warmup_s",)) - prepare),
        "timed": summed(job.own, TIMED),
    }
    spent = sum(seconds for name, seconds in found.items() if name != "job")
    return found | {"other": found["job"] - spent}


def span_s(run: dict[str, Any]) -> float:
    """Seconds between the start and the end of a job, by its manifest."""
    ends = [datetime.fromisoformat(run[name]) for name in ("start", "end")]
    return (ends[1] - ends[0]).total_seconds()


def cell_seconds(job: Job) -> list[float]:
    """Seconds of each code cell, as papermill wrote them into the executed notebook."""
    if job.notebook_path is None:
        return []
    cells = json.loads(job.notebook_path.read_text(encoding="utf-8"))["cells"]
    times = [c["metadata"].get("papermill", {}) for c in cells if c["cell_type"] == "code"]
    return [t["duration"] for t in times if t.get("duration") is not None]


def summed(rows: Sequence[Record], names: Sequence[str]) -> float:
    """Sum of all repetitions under these names."""
    return sum(sum(row.samples.get(name, ())) for row in rows for name in names)


def _seconds(value: float) -> Estimate:
    return Estimate(value, n=1, method="clock", reason="one job, no interval")


def _notes(jobs: Sequence[Job]) -> tuple[str, ...]:
    if not jobs:
        return ()
    found = [parts(job) for job in jobs]
    whole = sum(part["job"] for part in found)
    setting_up = sum(part["startup"] + part["imports"] + part["build"] for part in found)
    return (
        *NOTES,
        f"all jobs: {short(whole / 60)} min, of which starting, importing and building "
        f"models {setting_up / whole:.0%}",
    )
