"""The tables of a report that no paper asked for: any models, any rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib.analysis import ablations, energy, experts, latency, memory, physics
from lib.analysis.rows import Rows
from lib.records.record import Record
from lib.show.table import Table
from lib.studies import kv_contribution


def generic_tables(rows: Sequence[Record]) -> list[Table]:
    """Every generic table that has rows."""
    tables = [
        latency.table(rows),
        physics.table(rows, Rows.of(rows).environments),
        memory.tables.table(rows),
        energy.tables.table(rows),
        energy.quantities.table(rows),
        experts.table(rows),
        *(ablations.table(rows, n) for n in ablations.CHANGED),
    ]
    return [table for table in tables if table.rows]


def memory_ledgers(
    rows: Sequence[Record], published: Mapping[str, Any] | None = None
) -> list[Table]:
    """The ledger's tables that have rows."""
    tables = (
        memory.tables.parts(rows),
        kv_contribution.contribution(rows, published),
        memory.tables.per_token(rows),
        memory.tables.predicted(rows),
    )
    return [table for table in tables if table.rows]
