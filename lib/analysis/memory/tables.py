"""Tables of memory: peaks, the ledger's parts, growth per token, and predictions beside them.

The arithmetic is in `analysis.memory.ledger`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lib import stats
from lib.analysis import bounds
from lib.analysis.memory.ledger import (
    CLOSED_SHARE,
    KINDS,
    OLD,
    PARTS,
    above_bytes,
    card_of,
    difference,
    ledger,
)
from lib.analysis.metrics import shown_in
from lib.analysis.setups import build
from lib.records.kinds import PROTOCOLS
from lib.records.record import Record
from lib.show.table import Column, Table, of_lines
from lib.stats import Estimate

NOTES = (
    "First use: what libraries keep after their first call, and the prompt. Behind windows: the "
    "prompt that sliding layers keep alive until the first decode step. Experts: what the experts "
    "of a layer add, where the peak is theirs. Activations: what else is alive at the peak, "
    "attention included. Padding: blocks larger than was asked for. Slack: reserved and not in "
    "use at the peak. CUDA context: what was in use beside the allocator before the call",
    f"closed: what the sum leaves unexplained is at most {CLOSED_SHARE:.0%} of what is in use",
)
UNTOLD = (
    "where no place of the peak is given, cache and logits are those held after the call, "
    "which need not be alive at the peak"
)


def table(rows: Sequence[Record]) -> Table:
    """Peak memory and what it consists of, per model, protocol and context.

    In GB (10^9 bytes), or in MB (10^6 bytes) where no peak reaches one GB.
    """
    unit, size = _unit(rows)
    columns = [
        (Column(m.title, unit), replace(m.of, factor=1 / size)) for m in shown_in("memory")
    ] + [(Column("source", numeric=False), lambda group: group[-1].value("memory_source") or "")]
    return build("memory", "Memory", rows, KINDS, ("context", "new_tokens", "protocol"), columns)


def expected(card: Any, contexts: Sequence[int], new_tokens: int) -> Table:
    """Before measuring: the cache that the architecture implies, in MB of 10^6 bytes.

    Where the card cannot compute it, the reason.
    """
    lines = []
    for context in contexts:
        size = bounds.counted(partial(card.kv_bytes, context + new_tokens))
        cells = {"KV cache computed (MB)": stats.scaled(size, 1e-6)}
        lines.append({"context (tokens)": context, **cells})
    return of_lines("kv-expected", "The cache by architecture", lines)


def prediction_table(predicted: Mapping[tuple, int | str]) -> Table:
    """What `predict` returned, for reading, in MB of 10^6 bytes."""
    lines = [
        {
            "context (tokens)": context,
            "experts": name,
            "protocol": PROTOCOLS[kind],
            "peak above baseline, predicted (MB)": stats.missing(size)
            if isinstance(size, str)
            else stats.exact(size / 1e6, "predicted"),
        }
        for (kind, name, context), size in predicted.items()
    ]
    return of_lines("peak-expected", "The peak by shapes alone", lines)


def parts(rows: Sequence[Record]) -> Table:
    """Parts, their sum, what NVML says and the residual, per model, protocol and context.

    In GB (10^9 bytes), the residual in MB (10^6), or all in MB where no peak reaches one GB.
    """
    unit, size = _unit(rows)

    def cells(group: list[Record]) -> Sequence[Any]:
        book = ledger(group[-1], card_of(rows, group[-1]))
        why, left = book.open_reason, book.residual_bytes
        share = None if left is None else 100 * left / book.used_bytes
        verdict = {None: "–", True: "yes", False: "no"}[book.closed]
        return (
            *(read(book.parts[n], book.reasons[n], 1 / size) for n in PARTS),
            read(book.sum_bytes, why, 1 / size),
            read(book.used_bytes, book.reasons["used_bytes"], 1 / size),
            read(left, why, 1e-6),
            read(share, why),
            verdict,
            book.source or "–",
            group[-1].value("peak_in") or "–",
        )

    columns = [
        *(Column(title, unit) for title in PARTS.values()),
        Column("sum", unit),
        Column("in use by NVML", unit),
        Column("residual", "MB"),
        Column("residual", "%"),
        Column("closed", numeric=False),
        Column("source", numeric=False),
        Column("peak in", numeric=False),
    ]
    book = _built("memory-ledger", "Memory ledger", rows, columns, cells)
    return _with_notes(book, *NOTES, UNTOLD)


def _with_notes(table: Table, *notes: str) -> Table:
    return replace(table, notes=(*table.notes, *notes))


def predicted(rows: Sequence[Record]) -> Table:
    """The peak above the baseline that shapes alone predict, beside what the allocator counted.

    `asked for` leaves out what the allocator adds by handing out larger blocks.
    """
    unit, size = _unit(rows)

    def cells(group: list[Record]) -> Sequence[Any]:
        row = group[-1]
        forecast, above = row.value("predicted_bytes"), above_bytes(row)
        asked = difference(row.value("requested_peak_bytes"), row.value("requested_baseline_bytes"))
        why = row.missing.get("predicted_bytes", OLD)
        unasked = row.missing.get("reserved_bytes", OLD)
        return (
            read(forecast, why, 1 / size),
            read(above, "no peak", 1 / size),
            read(asked, unasked, 1 / size),
            read(_ratio(above, forecast), why),
            read(_ratio(asked, forecast), unasked if forecast else why),
        )

    columns = [
        Column("predicted", unit),
        Column("measured", unit),
        Column("asked for", unit),
        Column("measured / predicted"),
        Column("asked for / predicted"),
    ]
    return _built(
        "memory-predicted",
        "Peak above the baseline, predicted before it was measured",
        [
            r
            for r in rows
            if r.kind == "environment" or "predicted_bytes" in {*r.values, *r.missing}
        ],
        columns,
        cells,
    )


def _built(
    name: str,
    title: str,
    rows: Sequence[Record],
    columns: Sequence[Column],
    cells: Callable[[list[Record]], Sequence[Any]],
) -> Table:
    return build(name, title, rows, KINDS, ("context", "protocol"), columns, cells)


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def per_token(rows: Sequence[Record]) -> Table:
    """How cache and peak grow with the context: Theil-Sen slopes in bytes per token.

    The cache's points are the cached tokens of both protocols, so that a sweep of three contexts
    has an interval. A sliding layer stops growing at its window, which the first token does not
    show.
    """
    dynamic = [r for r in rows if r.key.get("cache") in ("dynamic", None) and not r.error]

    def cells(group: list[Record]) -> Sequence[Any]:
        first = (card_of(rows, group[-1]) or {}).get("kv_bytes_per_token")
        held, card = (_points(group, n) for n in ("kv_tensor_bytes", "kv_card_bytes"))
        equal = sum(
            r.value("kv_tensor_bytes") == r.value("kv_card_bytes") is not None for r in group
        )
        return (
            _slope(held),
            _slope(card),
            read(first, "no model card with a cache"),
            f"{equal} of {len(group)}",
            *(_slope(_above(group, k)) for k in KINDS),
        )

    columns = [
        Column("KV held", "B/token"),
        Column("KV by the card", "B/token"),
        Column("KV of the first token", "B/token"),
        Column("held = card to the byte", numeric=False),
        Column("peak, the paper's protocol", "B/token"),
        Column("peak, generate()", "B/token"),
    ]
    return build(
        "memory-per-token", "Memory per token of context", dynamic, KINDS, (), columns, cells
    )


def _points(group: Sequence[Record], name: str) -> set[tuple[int, int]]:
    less = {"memory-paper": 0, "memory": 1}  # generate() never caches the last token it returns
    return {
        (r.key["context"] + r.key["new_tokens"] - less[r.kind], r.values[name])
        for r in group
        if r.value(name) is not None
    }


def _above(group: Sequence[Record], kind: str) -> set[tuple[int, int]]:
    return {
        (r.key["context"], above_bytes(r))
        for r in group
        if r.kind == kind and above_bytes(r) is not None
    }


def _slope(points: set[tuple[int, int]]) -> Estimate:
    ordered = sorted(points)
    slope = stats.slope([x for x, _ in ordered], [y for _, y in ordered])
    return stats.missing(f"not measured: {slope.reason}") if slope.value is None else slope


def read(size: float | None, reason: str, factor: float = 1.0) -> Estimate:
    """One reading in another unit, or why there is none."""
    if size is None:
        return stats.missing(f"not measured: {reason}")
    return stats.exact(size * factor)


def _unit(rows: Sequence[Record]) -> tuple[str, float]:
    peaks = [r.value("peak_bytes") or 0 for r in rows if r.kind in KINDS]
    return ("GB", 1e9) if max(peaks, default=0) >= 1e9 else ("MB", 1e6)
