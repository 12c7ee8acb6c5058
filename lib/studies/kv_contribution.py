"""What the paper's "KV contribution" consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib.analysis.estimators import MIB
from lib.analysis.memory.ledger import OLD, PARTS, above_bytes, card_of, ledger
from lib.analysis.memory.tables import UNTOLD, _ratio, _with_notes, read
from lib.analysis.setups import build
from lib.records.record import Record
from lib.show.table import Column, Table
from lib.stats import Estimate
from lib.studies.study import load_published, paper_name

WITHOUT_128 = (
    "contexts from 512 on: the study's baseline at 128 tokens lacks what libraries "
    "keep after their first call"
)


def contribution(rows: Sequence[Record], published: Mapping[str, Any] | None = None) -> Table:
    """What the study's files call KV cache (peak less what was allocated before), beside the same
    difference measured here and what it consists of, in MiB (2^20 bytes)."""
    data = load_published() if published is None else published

    def reported(row: Record) -> float | None:
        name = f"kv_reported_mib/{paper_name(row.key.get('model'), data)}/{row.key.get('context')}"
        return data.get("released", {}).get(name, {}).get("value")

    def cells(group: list[Record]) -> Sequence[Any]:
        row, printed, above = group[-1], reported(group[-1]), above_bytes(group[-1])
        peak = ledger(row, card_of(rows, row))
        sizes = [peak.parts[n] for n in ("kv_behind", "activations", "padding")]
        rest = None if peak.parts["activations"] is None else sum(size or 0 for size in sizes)
        return (
            Estimate(printed, n=1, method="published", reason="a published number"),
            read(above, "no peak", 1 / MIB),
            read(_ratio(above, printed * MIB), "no peak"),
            read(row.value("predicted_bytes"), row.missing.get("predicted_bytes", OLD), 1 / MIB),
            *(read(peak.parts[n], peak.reasons[n], 1 / MIB) for n in names),
            read(rest, peak.reasons["activations"], 1 / MIB),
            row.value("peak_in") or "–",
        )

    names = ("kv", "logits", "experts")
    columns = [
        Column("published", "MiB", measured=False),
        Column("peak above baseline", "MiB"),
        Column("measured / published"),
        Column("predicted", "MiB"),
        *(Column(PARTS[n], "MiB") for n in names),
        Column("rest", "MiB"),
        Column("peak in", numeric=False),
    ]
    mine = [
        r
        for r in rows
        if r.kind == "environment"
        or (r.kind == "memory-paper" and not r.error and reported(r) is not None)
    ]
    title = "What the paper's KV contribution consists of"
    table = build("kv-contribution", title, mine, ("memory-paper",), ("context",), columns, cells)
    return _with_notes(table, WITHOUT_128, UNTOLD)
