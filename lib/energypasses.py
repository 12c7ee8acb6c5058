"""A second pass over the models, the last one first: does the energy of a call repeat?

Blocks of one pass share the card, its temperature and the model's place in the queue; a second pass
shares none of these. What it finds over what the first found is the reproducibility of the whole
measurement, which the spread of blocks cannot show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lib import stats
from lib.grid import Column, Table, build
from lib.records import Record, record_id, select
from lib.stats import Estimate

AGAIN = "energy-again"  # kind of the rows of the second pass
PASSES = ("energy", AGAIN)


def per_1k(rows: Sequence[Record], kind: str) -> Estimate:
    """Joules per 1,000 generated tokens in one pass: mean over blocks."""
    found = select(rows, kind)
    if not found:
        return stats.missing(f"not measured: no {'second' if kind == AGAIN else 'first'} pass")
    row = found[-1]
    values = row.samples.get("energy_j") or []
    if not values:
        reason = row.error or row.missing.get("energy_j") or "no block"
        return stats.missing(f"failed: {reason}" if row.error else f"not measured: {reason}")
    found = stats.mean([1e3 * joules / row.key["new_tokens"] for joules in values])
    return replace(found, records=(record_id(row),))


def compared(rows: Sequence[Record]) -> tuple[Estimate, Estimate, Estimate]:
    """The first pass, the second, and the second over the first, of the rows of one cell."""
    first, second = (per_1k(rows, kind) for kind in PASSES)
    return first, second, stats.quotient(second, first)


def table(rows: Sequence[Record]) -> Table:
    """Each cell of the second pass beside the first; no rows where there was no second."""
    again = {_cell(r) for r in select(rows, AGAIN)}
    kept = [r for r in rows if r.kind not in PASSES or _cell(r) in again]

    columns = [Column("J/1K tokens, first pass", "J"), Column("J/1K tokens, second pass", "J"),
               Column("second / first")]  # fmt: skip
    return build("energy-passes", "Energy, two passes", kept, PASSES, ("context", "new_tokens"),
                 columns, compared)  # fmt: skip


def _cell(row: Record) -> tuple[Any, ...]:
    return tuple(row.key.get(name) for name in ("model", "stack", "context", "new_tokens"))
