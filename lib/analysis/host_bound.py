"""Does a decode step wait for the device or for the host? Device-busy time over wall time, and the
kernels that take it.

The busy time is a profiler's (rows of kind `busy`); the wall time that of calls without one (rows
of kind `latency`). Kernels take the same time under the profiler, calls do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lib import stats
from lib.analysis.estimators import PROFILER, decode_share, prefill_share
from lib.analysis.metrics import METRICS
from lib.analysis.setups import SETUP, build, by_setup, named
from lib.records.record import Record
from lib.show.table import Column, Table, or_why
from lib.show.wording import interval, short
from lib.stats import Estimate

# A share of the time in which the device works. Between the two, both matter.
DEVICE_BOUND, HOST_BOUND = 0.9, 0.7
STACK = 1 + SETUP.index("stack")
EXPERTS = 1 + SETUP.index("experts")
KERNELS_SHOWN = 10  # kernels of an arm; what is left is one line
KERNEL_COLUMNS = (
    Column("of", numeric=False), Column("context", "tokens", numeric=False),
    Column("kernel", numeric=False), Column("launches of a step"),
    Column("time of a launch", "µs"), Column("time of a step", "µs"),
    Column("share of the device's time"),
)  # fmt: skip
KERNEL_NOTE = (
    "names without template arguments, so that kernels of one name are one line; the share is "
    "of the sum over all kernels, copies and fills"
)


def table(rows: Sequence[Record]) -> Table:
    """Busy time, wall time, share and verdict of decoding and of the prefill, for each arm."""
    profiled = [row for group in arms(rows).values() for row in group]
    profiled += [row for row in rows if row.kind == "environment"]

    columns = [
        *(METRICS[name] for name in ("decode_busy", "decode_kernels", "tpot", "decode_share")),
        (Column("decode", numeric=False), lambda group: verdict(decode_share(group)) or "-"),
        *(METRICS[name] for name in ("prefill_busy", "ttft", "prefill_share")),
        (Column("prefill", numeric=False), lambda group: verdict(prefill_share(group)) or "-"),
    ]
    kinds, fields = ("busy", "latency"), ("context",)
    grid = build("hostbound", "Host or device", profiled, kinds, fields, columns)
    return _or_why(grid, rows, "decode_busy_s", "no reading")


def tables(rows: Sequence[Record]) -> list[Table]:
    """The table, where any arm was profiled."""
    return [grid] if (grid := table(rows)).rows else []


def sentences(rows: Sequence[Record]) -> list[str]:
    """For each model and setup at its longest context: who waits for whom."""
    lines, longest = [], _longest(rows)
    for where, group in longest.items():
        share, busy_ms = decode_share(group), METRICS["decode_busy"].of(group)
        if share.value is None:
            continue
        prefill = verdict(prefill_share(group)) or "not measured"
        lines.append(
            f"{_name(where, list(longest))} at {group[0].key['context']} tokens: the device works "
            f"{short(busy_ms.value)} ms of a decode step, {short(share.value)} of its time "
            f"{interval(share)}".rstrip()
            + f": {verdict(share)} (from {DEVICE_BOUND:g} on "
            f"device-bound, to {HOST_BOUND:g} host-bound); prefill: {prefill}."
        )
    return [*lines, *comparison(rows)]


def _name(where: tuple[str, ...], beside: Sequence[tuple[str, ...]]) -> str:
    """The model, stack and experts, and what else tells it from the arms beside it."""

    def less(key: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("" if at in (STACK, EXPERTS) else value for at, value in enumerate(key))

    label = named([less(key) for key in beside])[less(where)].label
    experts = f", experts {where[EXPERTS]}" if where[EXPERTS] not in ("None", "none") else ""
    return f"{label} on {where[STACK]}{experts},"


def comparison(rows: Sequence[Record]) -> list[str]:
    """What a comparison of models means of which two or more wait for the host."""
    waiting: dict[tuple[Any, ...], dict[str, None]] = {}
    for where, group in _longest(rows).items():
        if verdict(decode_share(group)) == "host-bound":
            context = group[0].key["context"]
            waiting.setdefault((where[STACK], context), {})[where[0]] = None
    return [
        f"Decoding of {' and of '.join(names)} on {stack} at {context} tokens is host-bound: "
        "comparing their decode throughput compares what the host does for a step, not the models."
        for (stack, context), names in waiting.items()
        if len(names) > 1
    ]


def _longest(rows: Sequence[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Of each model and setup the arm with the longest context."""
    longest: dict[tuple[Any, ...], list[Record]] = {}
    for where, group in sorted(arms(rows).items(), key=lambda item: item[0][-1]):
        longest[where[:-1]] = group
    return longest


def arms(rows: Sequence[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Profiled rows and the greedy latency rows of the same arm: model, setup, context."""
    greedy = [
        r for r in rows if r.kind in ("environment", "busy") or r.key.get("decoding") == "greedy"
    ]
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for group in by_setup(greedy, ("busy", "latency")):
        for row in group.rows:
            if row.kind == "latency" or row.value("decode_busy_s") is not None:
                where = (group.model, *group.setup, row.key.get("context"))
                groups.setdefault(where, []).append(row)
    return {where: arm for where, arm in groups.items() if any(r.kind == "busy" for r in arm)}


def verdict(share: Estimate) -> str:
    """device-bound, host-bound or mixed; empty without a share.

    Where the ends of the interval do not agree with the value, it is not resolved.
    """
    if share.value is None:
        return ""
    ends = [_bound(x) for x in (share.low, share.high) if x is not None]
    bound = _bound(share.value)
    return bound if {*ends} <= {bound} else f"{bound}, not resolved"


def _bound(share: float) -> str:
    if share >= DEVICE_BOUND:
        return "device-bound"
    return "host-bound" if share <= HOST_BOUND else "mixed"


def kernel_table(rows: Sequence[Record]) -> Table:
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
    grid = Table(
        "step-kernels", "Kernels of a decode step", KERNEL_COLUMNS, tuple(lines), (KERNEL_NOTE,)
    )
    return _or_why(grid, rows, "decode_kernel_times", "recorded before kernels were")


def _kernels(times: Sequence[Sequence]) -> list[tuple]:
    """(name, launches, µs a launch, µs a step, share) of the longest, and of all others as one."""
    whole = sum(seconds for *_, seconds in times)
    lines, rest = [tuple(kernel) for kernel in times[:KERNELS_SHOWN]], times[KERNELS_SHOWN:]
    if rest:
        launches = sum(number for _, number, _ in rest)
        lines.append((f"{len(rest)} others", launches, sum(seconds for *_, seconds in rest)))
    return [
        (
            name,
            stats.exact(number, PROFILER),
            stats.exact(seconds / number * 1e6, PROFILER),
            stats.exact(seconds * 1e6, PROFILER),
            stats.exact(seconds / whole, PROFILER),
        )
        for name, number, seconds in lines
    ]


def kernel_tables(rows: Sequence[Record]) -> list[Table]:
    """The table, where any step's kernels were recorded."""
    return [grid] if (grid := kernel_table(rows)).rows else []


def _or_why(grid: Table, rows: Sequence[Record], name: str, otherwise: str) -> Table:
    """A table of profiled calls; where it is empty, why no row has the value `name`."""
    reasons = [row.error or row.missing.get(name, otherwise) for row in rows if row.kind == "busy"]
    return or_why(grid, "; ".join(dict.fromkeys(reasons)) or "no profiled call")
