"""A result set of more than a dozen models: what stands on a page for each, and what leads there.

`report.html` then holds the answer and what is over all models; tables, figures, rows and notebooks
of a model are in `details.html` of its folder. A page is written again only where something that
it is made from has changed, several at once in processes of their own.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lib import stats
from lib.analysis import gates
from lib.analysis.cost import Prices
from lib.analysis.rows import Rows
from lib.files import ROOT, file_sha
from lib.records.jobs import ACROSS, Job
from lib.records.record import NO_ARM, Record, record_id
from lib.records.store import VISITS, sha
from lib.show.table import Column, Table, Text
from lib.studies.study import Published

DOZEN = 12  # models that one page holds whole
PAGE = "details.html"  # of a model, in its folder
WORKERS = 4  # processes at most; each takes about 300 MB
COUNTS = ("jobs", "rows", "failed", "withheld", "warned")
UNTIMED = stats.missing("no decoding was timed")
CODE = ("lib/**/*.py", "lib/show/templates/*", "params/models.yaml", "params/gpus.yaml")


def by_model(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    """Jobs by the folder of their model; those over all models have none."""
    parts: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.parts[0] != ACROSS:
            parts[job.parts[0]].append(job)
    return dict(parts)


def rows_of(rows: Rows, jobs: Iterable[Job]) -> dict[str, list[Record]]:
    """Rows by the folder of the model that they are of, those over all models under ACROSS; each
    with the rows of the environments that they were measured in."""
    folder_of = {record_id(row): job.parts[0] for job in jobs for row in job.records}
    machines = {row.env_id: row for row in rows.of_kinds("environment")}
    parts: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        if row.kind != "environment":
            parts[folder_of.get(record_id(row), ACROSS)].append(row)
    return {
        folder: [*(machines[i] for i in _environments(members) if i in machines), *members]
        for folder, members in parts.items()
    }


def _environments(rows: Iterable[Record]) -> list[str | None]:
    return list(dict.fromkeys(one.env_id for row in rows for one in (row, *row.others)))


def table(
    parts: Mapping[str, Sequence[Job]], rows: Mapping[str, Sequence[Record]], card: Table | None
) -> Table:
    """Each model with what the answer's `card` says of it, how its jobs ended, and its page; those
    that serve most first."""
    columns, lines = (card.columns, card.rows) if card else ((Column("model", numeric=False),), ())
    lines = {line[0].text: line for line in lines}
    ranks, built = {name: at for at, name in enumerate(lines)}, []
    for folder, jobs in parts.items():
        names = [r.key["model"] for r in rows.get(folder, ()) if r.key.get("model") in lines]
        name = min(names, key=ranks.__getitem__, default=jobs[0].model)
        first, *cells = lines.get(name, (Text(name), *[UNTIMED] * (len(columns) - 1)))
        page = f"{quote(folder)}/{PAGE}"
        line = (replace(first, page=page), *cells, *_counts(jobs, rows.get(folder, ())))
        built.append((ranks.get(name, len(ranks)), line))
    built.sort(key=lambda pair: pair[0])
    return Table(
        "models",
        "Every model",
        (*columns, *(Column(title, numeric=title != "jobs") for title in COUNTS)),
        tuple(line for _, line in built),
        ("failed, withheld and warned count rows; the reasons are on the page of the model",),
        card.below if card else (),
    )


def _counts(jobs: Sequence[Job], rows: Sequence[Record]) -> tuple[Any, ...]:
    """How the jobs of a model ended, and how many of its rows there are of each sort."""
    ends = Counter(job.status for job in jobs)
    arms = [row for row in rows if row.kind not in NO_ARM]
    withheld = sum(map(gates.is_withheld, arms))
    return (
        Text(", ".join(f"{count} {status}" for status, count in ends.items())),
        len(arms),
        sum(bool(row.error) for row in arms) - withheld,
        withheld,
        sum(bool(row.warnings) for row in arms),
    )


@functools.cache
def _code() -> str:
    """Hash of the files that make a page of rows."""
    paths = sorted(path for pattern in CODE for path in ROOT.glob(pattern))
    return sha([[path.relative_to(ROOT).as_posix(), file_sha(path)] for path in paths])


def common(source: Path, jobs: Iterable[Job], prices: Prices | None, study: Published) -> str:
    """Hash of what every page is made from beside its model's own files: rows over all models,
    visits beside the set, prices, the study, and the code."""
    visits = sorted((source.resolve().parent / VISITS).glob("**/*.jsonl"))
    files = [job.folder / "records.jsonl" for job in jobs if job.parts[0] == ACROSS]
    shas = [file_sha(path) for path in (*files, *visits) if path.is_file()]
    return sha([_code(), source.name, shas, asdict(prices) if prices else None, repr(study.data)])


def made_from(jobs: Iterable[Job], shared: str) -> str:
    """Hash of what a model's page shows: its jobs' files, what is said of them, and `shared`."""
    names = ("run.json", "records.jsonl", "notebook.ipynb")
    return sha(
        [shared]
        + [
            [job.path, job.id, job.command, job.stale, job.out, job.damage]
            + [file_sha(path) for name in names if (path := job.folder / name).is_file()]
            for job in jobs
        ]
    )


def each(function: Callable[[Any], object], tasks: Sequence[Any]) -> Iterator[int]:
    """Call a function of a module with every task, in as many processes as there are cores; yields
    how many are through.

    What it raises is raised here, and no process is left behind.
    """
    count = min(WORKERS, cores(), len(tasks))
    if count < 2:
        for number, task in enumerate(tasks, start=1):
            function(task)
            yield number
        return
    method = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=method, initializer=_follow)
    try:
        for number, _ in enumerate(pool.map(function, tasks), start=1):
            yield number
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _follow() -> None:
    """In a process of its own: end with the one that started it, which alone hears Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
