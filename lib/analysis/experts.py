"""Which experts a decode token used, how many parameters that makes, and throughput by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lib import stats
from lib.analysis import efficiency
from lib.analysis.metrics import _reading
from lib.analysis.setups import build, sampled
from lib.records.record import Record
from lib.show.table import Column, Table
from lib.stats import Estimate, inverse, missing, scaled


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
        "decode_bytes_realised": ("a step reads", size, scale),
    }

    def cells(group: list[Record]) -> Sequence[Any]:
        row = group[-1]
        note = row.value("note")
        values = [_reading(row, name, factor) for name, (_, _, factor) in fields.items()]
        if note:
            values = [e if e.value is not None else stats.missing(note) for e in values]
        return (row.value("decode_experts") or "-", *values)

    columns = [
        Column("decode runs", numeric=False),
        *(Column(title, unit) for title, unit, _ in fields.values()),
    ]
    grid = build(
        "trace", "What a step really reads", rows, ("trace",), ("context", "batch"), columns, cells
    )
    note = (
        "touched: set to NaN, the expert's weights make the output NaN; parameters are those "
        "of one decode token, experts are means over layers"
    )
    return replace(grid, notes=(*grid.notes, note))


def experts_table(rows: Sequence[Record]) -> Table:
    """Output throughput of the arms of the experts ablation per active 10^9 parameters, nominal
    and realised in the implementation of each arm."""
    active = efficiency.nominal(rows)

    def cells(group: list[Record]) -> Sequence[Estimate]:
        rate = inverse(sampled(group, "e2e_s"), group[0].key["new_tokens"] or 1)
        counts = {
            "counted": active.get(group[0].key["model"]),
            "traced": efficiency.realised(rows, group[0]),
        }
        params = [
            missing(f"not {method}") if not n else Estimate(n / 1e9, n=1, method=method)
            for method, n in counts.items()
        ]
        return (rate, *params, *(scaled(rate, 1 / a.value) if a.value else a for a in params))

    columns = [
        Column("output throughput", "tok/s"),
        Column("active, nominal", "10^9"),
        Column("active, realised", "10^9"),
        Column("APE-TPOT, nominal", "tok/s per 10^9"),
        Column("APE-TPOT, realised", "tok/s per 10^9"),
    ]
    title = "APE of experts implementations"
    return build("ape-experts", title, rows, ("ablation-experts",), ("context",), columns, cells)
