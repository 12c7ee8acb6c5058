"""Where the device's time of one decode step goes: kernels by time, from profiled calls.

Rows of kind `busy` hold them (`lib.latency`). Where a step is device-bound, the top of the list is
what holds it back.
"""

from __future__ import annotations

from collections.abc import Sequence

from lib import stats
from lib.groups import by_setup
from lib.records.record import Record
from lib.show.table import Column, Shown, Table, frame
from lib.stats import Estimate

SHOWN = 10  # kernels of an arm; what is left is one line
COLUMNS = (Column("of", numeric=False), Column("context", "tokens", numeric=False),
           Column("kernel", numeric=False), Column("launches of a step"),
           Column("time of a launch", "µs"), Column("time of a step", "µs"),
           Column("share of the device's time"))  # fmt: skip
NOTE = (
    "names without template arguments, so that kernels of one name are one line; the share is "
    "of the sum over all kernels, copies and fills"
)


def table(rows: Sequence[Record]) -> Table:
    """Of each model and setup, at its longest profiled context, the kernels that take longest."""
    lines = []
    for group in by_setup(rows, ("busy",)):
        profiled = [r for r in group.rows if r.value("decode_kernel_times")]
        if profiled:
            row = max(profiled, key=lambda r: r.key["context"])
            lines += [
                (group.label, row.key["context"], *cells)
                for cells in _kernels(row.values["decode_kernel_times"])
            ]
    return Table("step-kernels", "Kernels of a decode step", COLUMNS, tuple(lines), (NOTE,))


def _kernels(times: Sequence[Sequence]) -> list[tuple]:
    """(name, launches, µs a launch, µs a step, share) of the longest, and of all others as one."""
    whole = sum(seconds for *_, seconds in times)
    lines, rest = [tuple(kernel) for kernel in times[:SHOWN]], times[SHOWN:]
    if rest:
        launches = sum(number for _, number, _ in rest)
        lines.append((f"{len(rest)} others", launches, sum(seconds for *_, seconds in rest)))
    return [
        (
            name,
            reading(number),
            reading(seconds / number * 1e6),
            reading(seconds * 1e6),
            reading(seconds / whole),
        )
        for name, number, seconds in lines
    ]


def reading(value: float) -> Estimate:
    """A value that was profiled once."""
    return stats.exact(value, "profiler")


def tables(rows: Sequence[Record]) -> list[Table]:
    """The table, where any step's kernels were recorded."""
    return [made] if (made := table(rows)).rows else []


def shown(rows: Sequence[Record]) -> Shown:
    """`table` as a DataFrame; where no kernel was recorded, why."""
    return or_why(table(rows), rows, "decode_kernel_times", "recorded before kernels were")


def or_why(made: Table, rows: Sequence[Record], name: str, otherwise: str) -> Shown:
    """A table of profiled calls for reading; where it is empty, why no row has the value `name`."""
    if made.rows:
        return frame(made)
    reasons = [row.error or row.missing.get(name, otherwise) for row in rows if row.kind == "busy"]
    return Shown({"not measured": [*dict.fromkeys(reasons)] or ["no profiled call"]})
