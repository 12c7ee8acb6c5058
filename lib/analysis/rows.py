"""Rows of a result set, indexed once: the setup and environment of each, and rows by kind.

`Rows` is a sequence of records, so that whatever takes records takes it. A selection of it keeps
the index of the whole: what a row was measured on is known also where its environment's row is left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.analysis import gates, physics
from lib.records import jobs
from lib.records.record import (
    NO_ARM,
    Record,
    environments,
    record_id,
    shared_gpu,
    told,
    warning,
)
from lib.records.store import merge, precedence

SETUP = ("weights", "dtype", "stack", "experts", "gpu")
NO_GPU = "none (CPU)"
# Warnings that say nothing against a row's numbers; every other one does.
HARMLESS = {
    "active-params": "it says which experts the row ran",
    "gate_repeated": "the second look passed, or the row would have no times",
    "instant_agreement": "it is another readout than the counter that is off",
    "power_cap": "a board at its limit is not broken",
}


class Rows(Sequence[Record]):
    """Records with their environments (by id), setups, and, where a folder was read, their runs.

    Those of numbers that contradict each other carry a warning, see `physics`, and so do those of a
    GPU that was shared. Times of a stack
    whose check of logits shows too little are left out, see `gates`.
    """

    def __init__(self, records: Iterable[Record] = (), *, of: Rows | None = None) -> None:
        self.records = tuple(records) if of is not None else gates.withheld(map(told, records))
        self.environments: dict[str, dict[str, Any]] = (
            environments(self.records) if of is None else of.environments
        )
        if of is None:
            self.records = physics.warned(self.records, self.environments)
            self.records = tuple(_told_shared(row, self.environments) for row in self.records)
        self.runs: dict[str, str] = {} if of is None else of.runs
        self._setups: dict[int, tuple[Record, tuple]] = {} if of is None else of._setups
        self._made: dict[tuple, Any] = {}
        self._kinds: dict[str, list[tuple[int, Record]]] | None = None
        self._engines: dict[tuple, set[str]] | None = None
        self._whole: Rows = self if of is None else of._whole

    @classmethod
    def of(cls, records: Iterable[Record]) -> Rows:
        """The records as Rows; Rows stay as they are."""
        return records if isinstance(records, Rows) else cls(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, at: Any) -> Any:
        return self.records[at]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def environment(self, row: Record) -> dict[str, Any]:
        """What a row was measured on and with; empty where it is not among the records."""
        return self.environments.get(row.env_id or "", {})

    def setup(self, row: Record) -> tuple[str, ...]:
        """The values of SETUP of a row of these; the GPU is that of its environment."""
        if id(row) not in self._setups:  # the row stays beside it, so that its id is not used again
            gpu = str(self.environment(row).get("gpu") or NO_GPU)
            values = (*(str(row.key.get(name)) for name in SETUP[:-1]), gpu)
            if row.key.get("engine"):
                values = self._with_engine(row, values)
            self._setups[id(row)] = (row, values)
        return self._setups[id(row)][1]

    def _with_engine(self, row: Record, values: tuple[str, ...]) -> tuple[str, ...]:
        """The setup of an engine's row. Where several engines were timed on one kind of GPU, the
        stack says which: their rows answer different questions."""
        if len(self._whole.engines.get(values, ())) < 2:
            return values
        stack = SETUP.index("stack")
        named = f"{values[stack]} {row.key['engine'][:6]}"
        return (*values[:stack], named, *values[stack + 1 :])

    @property
    def engines(self) -> dict[tuple, set[str]]:
        """The engines that were timed in each setup."""
        if self._engines is None:
            self._engines = {}
            for r in self.records:
                if r.key.get("engine") and any(name.endswith("e2e_s") for name in r.samples):
                    gpu = str(self.environment(r).get("gpu") or NO_GPU)
                    setup = (*(str(r.key.get(name)) for name in SETUP[:-1]), gpu)
                    self._engines.setdefault(setup, set()).add(r.key["engine"])
        return self._engines

    def of_kinds(self, kinds: str | Sequence[str]) -> list[Record]:
        """Rows of one or several kinds, in their order."""
        if self._kinds is None:
            self._kinds = {}
            for placed in enumerate(self.records):
                self._kinds.setdefault(placed[1].kind, []).append(placed)
        names = (kinds,) if isinstance(kinds, str) else dict.fromkeys(kinds)
        placed = [pair for name in names for pair in self._kinds.get(name, ())]
        return [row for _, row in sorted(placed, key=lambda pair: pair[0])]

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function makes of these rows and of arguments, made when it is first asked for."""
        if (function, arguments) not in self._made:
            self._made[function, arguments] = function(self, *arguments)
        return self._made[function, arguments]

    def where(self, test: Callable[[Record], Any]) -> Rows:
        """Those that pass a test, with the index of all."""
        return Rows((row for row in self.records if test(row)), of=self)

    def by_title(self, titles: Mapping[str, Iterable[str]]) -> dict[str, Rows]:
        """Rows of each model under the title by which a study lists its names, in any case."""
        title_of = {name.lower(): title for title, names in titles.items() for name in names}
        members: dict[str, list[Record]] = {title: [] for title in titles}
        for row in self.records:
            if (title := title_of.get(str(row.key.get("model")).lower())) is not None:
                members[title].append(row)
        return {title: Rows(rows, of=self) for title, rows in members.items()}


def objections(rows: Iterable[Record]) -> str:
    """The codes of warnings that speak against rows, so that they decide nothing; or empty."""
    codes = dict.fromkeys(w["code"] for row in rows for w in row.warnings)
    return ", ".join(code for code in codes if code not in HARMLESS)


def _told_shared(row: Record, environments: dict[str, dict[str, Any]]) -> Record:
    """The row, with a warning where its GPU was not its own, so that it decides nothing."""
    reason = shared_gpu([row], environments) if row.kind not in NO_ARM else ""
    mark = warning("shared_gpu", reason)
    told = not reason or mark in row.warnings
    return row if told else replace(row, warnings=(*row.warnings, mark))


def load(folder: str | Path) -> Rows:
    """The rows of every job below a folder, and visits recorded beside it, one for each arm.

    A folder without results, or with a job that cannot be read, is an error.
    """
    entries = sorted(jobs.find(folder), key=lambda job: precedence(job.run))
    if broken := [f"{job.path}: {job.damage}" for job in entries if job.damage]:
        raise ValueError(f"{folder} has damaged jobs: {'; '.join(broken)}")
    rows = Rows(merge([row for job in entries for row in job.records], folder))
    if not rows:
        raise FileNotFoundError(f"no results below {folder}; it takes a folder of run.json files")
    rows.runs.update({record_id(row): job.path for job in entries for row in job.records})
    return rows
