"""Does a decode step wait for the device or for the host? Device-busy time over wall time, and the
kernels that take it.

The busy time is a profiler's (rows of kind `busy`); the wall time that of calls without one (rows
of kind `latency`). Kernels take the same time under the profiler, calls do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lib import stats
from lib.analysis.metrics import decode_tok_per_s
from lib.analysis.setups import SETUP, build, by_setup, named, sampled
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

    def cells(group: list[Record]) -> Sequence[Any]:
        decode, prefill = decode_share(group), prefill_share(group)
        tpot = stats.inverse(decode_tok_per_s(group), 1e3)
        ttft = sampled([r for r in group if r.kind == "latency"], "ttft_s", factor=1e3)
        return (
            _ms(group, "decode_busy_s"),
            _busy_s(group, "decode_kernels"),
            tpot,
            decode,
            verdict(decode) or "-",
            _ms(group, "prefill_busy_s"),
            ttft,
            prefill,
            verdict(prefill) or "-",
        )

    columns = [
        Column("device time of a step", "ms"),
        Column("kernels of a step"),
        Column("TPOT", "ms"),
        Column("share of TPOT"),
        Column("decode", numeric=False),
        Column("device time of the first token", "ms"),
        Column("TTFT", "ms"),
        Column("share of TTFT"),
        Column("prefill", numeric=False),
    ]
    grid = build(
        "hostbound", "Host or device", profiled, ("busy", "latency"), ("context",), columns, cells
    )
    return _or_why(grid, rows, "decode_busy_s", "no reading")


def _ms(rows: Sequence[Record], name: str) -> Estimate:
    busy_s = _busy_s(rows, name)
    return stats.scaled(busy_s, 1e3) if busy_s.value is not None else busy_s


def tables(rows: Sequence[Record]) -> list[Table]:
    """The table, where any arm was profiled."""
    return [grid] if (grid := table(rows)).rows else []


def sentences(rows: Sequence[Record]) -> list[str]:
    """For each model and setup at its longest context: who waits for whom."""
    lines, longest = [], _longest(rows)
    for where, group in longest.items():
        share, busy_s = decode_share(group), _busy_s(group, "decode_busy_s")
        if share.value is None:
            continue
        prefill = verdict(prefill_share(group)) or "not measured"
        lines.append(
            f"{_name(where, list(longest))} at {group[0].key['context']} tokens: the device works "
            f"{short(busy_s.value * 1e3)} ms of a decode step, {short(share.value)} of its time "
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


def decode_share(rows: Sequence[Record]) -> Estimate:
    """Device-busy time of a decode step over TPOT, of one arm's busy and latency rows."""
    return _share(decode_tok_per_s(rows), _busy_s(rows, "decode_busy_s"))


def prefill_share(rows: Sequence[Record]) -> Estimate:
    """Device-busy time of a call of one token over TTFT."""
    ttft = sampled([r for r in rows if r.kind == "latency"], "ttft_s")
    return _share(stats.inverse(ttft), _busy_s(rows, "prefill_busy_s"))


def _share(per_s: Estimate, busy_s: Estimate) -> Estimate:
    if busy_s.value is None:
        return busy_s
    return stats.scaled(per_s, busy_s.value) if per_s.value is not None else per_s


def _busy_s(rows: Sequence[Record], name: str) -> Estimate:
    """A reading of the busy row (s, or a count), or why there is none."""
    for row in reversed([r for r in rows if r.kind == "busy"]):
        value = row.value(name)
        if value is not None and value > 0:
            return reading(value)
        reason = "not resolved" if value is not None else row.missing.get(name, "no reading")
        return stats.missing(f"not measured: {reason}")
    return stats.missing("not measured: no profiled call")


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
            reading(number),
            reading(seconds / number * 1e6),
            reading(seconds * 1e6),
            reading(seconds / whole),
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


def reading(value: float) -> Estimate:
    """A value that was profiled once."""
    return stats.exact(value, "profiler")
