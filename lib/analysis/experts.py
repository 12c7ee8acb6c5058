"""Which experts a decode token used, how many parameters that makes, and throughput by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lib import stats
from lib.analysis import bounds
from lib.analysis.efficiency import ACTIVE, of_active, with_card
from lib.analysis.estimators import Reading
from lib.analysis.metrics import METRICS
from lib.analysis.rows import Rows
from lib.analysis.setups import build
from lib.records.record import Record
from lib.show.table import Column, Table
from lib.stats import Estimate


def table(rows: Sequence[Record]) -> Table:
    """What a decode step really uses: active parameters, experts and bytes, per arm and batch.

    In 10^9 parameters and GB, or 10^6 and MB where no model has 10^8 active parameters.
    """
    largest = max(
        (r.value("active_params_nominal") or 0 for r in rows if r.kind == "trace"), default=0
    )
    count, size, scale = ("10^9", "GB", 1e-9) if largest >= 1e8 else ("10^6", "MB", 1e-6)
    fields = {
        "active_params_nominal": ("active, nominal", count, scale),
        "active_params_realised": ("active, realised", count, scale),
        "experts_chosen_decode": ("experts chosen in a step", "", 1),
        "experts_touched_decode": ("experts touched in a step", "", 1),
        "experts_touched_prefill": ("experts touched in the prefill", "", 1),
        "routing_entropy_bits": ("routing entropy", "bits", 1),
        "decode_bytes": ("a step must read", size, scale),
        "decode_bytes_realised": ("with the experts used", size, scale),
    }

    columns = [
        (Column("decode runs", numeric=False), lambda g: g[-1].value("decode_experts") or "-"),
        *(
            (Column(title, unit), Reading(name, ("trace",), factor, note=True))
            for name, (title, unit, factor) in fields.items()
        ),
        (Column("a step moves", size), lambda g: _moved(g[-1], rows, scale)),
    ]
    grid = build(
        "trace", "What a step really reads", rows, ("trace",), ("context", "batch"), columns
    )
    note = (
        "a step moves what it reads, and the copies that it makes of experts; touched: set to NaN, "
        "the expert's weights make the output NaN; parameters are those of one decode token, "
        "experts are means over layers"
    )
    return replace(grid, notes=(*grid.notes, note))


def _moved(trace: Record, rows: Sequence[Record], scale: float) -> Estimate:
    """Bytes that a step moves: with the experts used, and with copies."""
    if None in (trace.value("decode_bytes"), trace.value("decode_bytes_realised")):
        return stats.missing(f"failed: {trace.error}" if trace.error else "not traced")
    beyond, reason = bounds.moved_beyond(trace, rows)
    if beyond is None:
        return stats.missing(reason)
    return stats.exact((trace.value("decode_bytes") + beyond) * scale, "traced and profiled")


def experts_table(rows: Sequence[Record]) -> Table:
    """Output throughput of the arms of the experts ablation per active 10^9 parameters, nominal
    and realised in the implementation of each arm."""
    rows, output, quotient = Rows.of(rows), METRICS["output"], METRICS["ape_tpot"]

    def cells(group: list[Record]) -> list[Estimate]:
        rows_with_card = with_card(rows, group)
        counts = [metric.of(rows_with_card) for metric in ACTIVE.values()]
        return [
            output.of(group),
            *counts,
            *(of_active(quotient, metric, rows_with_card) for metric in ACTIVE.values()),
        ]

    columns = [output.column, *(metric.column for metric in ACTIVE.values())]
    columns += [Column(f"{quotient.title}, {name}", quotient.unit) for name in ACTIVE]
    title, kinds = "APE of experts implementations", ("ablation-experts",)
    return build("ape-experts", title, rows, kinds, ("context",), columns, cells)
