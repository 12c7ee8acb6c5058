"""Active Parameter Efficiency: the four formulas of section 3.6 of arXiv 2508.16700.

Each divides a measured quantity by the active parameters in billions (or the peak memory in GB of
10^9 bytes). The interval is that of the measured quantity, scaled: a parameter count has no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lib.records.record import Record, select
from lib.show.table import Column, Table, build, frame, sampled
from lib.stats import Estimate, inverse, missing, scaled

KINDS = ("latency", "memory-paper", "energy")
TIMED = ("latency", "energy")
SAME = ("model", "weights", "dtype")  # what a trace and the arm that it explains share
COLUMNS = (
    Column("APE-TPOT", "tok/s per 10^9"), Column("APE-1/TTFT", "1/s per 10^9"),
    Column("APE-energy", "tok/J per 10^9"), Column("TPOT/GB", "tok/s per GB"),
)  # fmt: skip


@dataclass(frozen=True)
class Ape:
    """Each field is an Estimate; units in the name. The paper's names are in the comments."""

    tok_per_s_per_b: Estimate  # APE-TPOT
    inverse_ttft_per_s_per_b: Estimate  # APE-1/TTFT
    tok_per_j_per_b: Estimate  # APE-Energy
    tok_per_s_per_gb: Estimate  # TPOT/GB


def ape(
    *,
    active_params: int,
    output_tok_per_s: Estimate,
    ttft_s: Estimate,
    tok_per_j: Estimate,
    peak_bytes: int | None,
) -> Ape:
    """The four formulas; a missing input leaves its own formula missing, with the reason."""
    if active_params <= 0:
        raise ValueError(f"active parameters must be positive, got {active_params}")
    per_b = 1e9 / active_params
    return Ape(
        tok_per_s_per_b=scaled(output_tok_per_s, per_b),
        inverse_ttft_per_s_per_b=scaled(inverse(ttft_s), per_b),
        tok_per_j_per_b=scaled(tok_per_j, per_b),
        tok_per_s_per_gb=(
            missing("no peak memory was measured")
            if peak_bytes is None
            else scaled(output_tok_per_s, 1e9 / peak_bytes)
        ),
    )


def of_rows(rows: Sequence[Record], active_params: int) -> Ape:
    """The four quotients of one model in one setup at one context, from its headline length.

    Throughput, TTFT, energy and memory must be of the same stack: the rows are those of one setup.
    The peak is that of the experts implementation that was timed: memory may be measured for
    others too. What is missing because a row failed says how it failed.
    """
    failed = [r for r in rows if r.error]
    ttft = sampled(select(rows, "latency", new_tokens=1) or failed, "ttft_s")
    lengths = {
        kind: [r.key["new_tokens"] for r in select(rows, kind) if r.key["new_tokens"] > 1]
        for kind in KINDS
    }
    tokens = next((min(found) for found in lengths.values() if found), 1)
    whole = select(rows, "latency", new_tokens=tokens)
    e2e, timed = sampled(whole, "e2e_s"), {r.key.get("experts") for r in whole}
    joules = sampled(select(rows, "energy", new_tokens=tokens), "energy_j")
    peaks = [
        r.value("peak_bytes")
        for r in select(rows, "memory-paper", new_tokens=tokens)
        if r.key.get("experts") in timed
    ]
    return ape(
        active_params=active_params,
        output_tok_per_s=inverse(e2e, tokens),
        ttft_s=ttft,
        tok_per_j=inverse(joules, tokens),
        peak_bytes=peaks[-1] if peaks else None,
    )


def nominal(rows: Sequence[Record]) -> dict[str, int]:
    """Active parameters by architecture, for each model with a card among the rows."""
    return {r.key["model"]: r.values["active_params"] for r in rows if r.kind == "card"}


def realised(rows: Sequence[Record], arm: Record) -> int | None:
    """Active parameters as traced for the model and experts of this arm; None without a trace.

    A stack may decode with another implementation of the experts than it prefills with, so that
    the trace must be of the one that decodes.
    """
    wanted = {name: arm.key.get(name) for name in SAME}
    traced = [
        r.value("active_params_realised")
        for r in select(rows, "trace", batch=1, **wanted)
        if _same_experts(r, arm)
    ]
    return next((count for count in reversed(traced) if count), None)


def _same_experts(trace: Record, arm: Record) -> bool:
    told = [row.value("decode_experts") for row in (trace, arm)]
    if None in told:
        return trace.key.get("experts") == arm.key.get("experts")
    return told[0] == told[1]


def table(rows: Sequence[Record]) -> pd.DataFrame:
    """The four quotients per model and context, with intervals: on nominal active parameters, and
    below them on realised ones where the experts of the model were traced."""
    return frame(quotients(rows))


def quotients(rows: Sequence[Record]) -> Table:
    """`table` as data. What was measured for its memory only has no quotient, and no row."""
    active = nominal(rows)
    where = (*SAME, "experts", "stack", "context")
    timed = {_place(r, where) for r in rows if r.kind in TIMED}
    kept = [r for r in rows if r.kind != "memory-paper" or _place(r, where) in timed]
    columns = [Column("parameters", numeric=False), Column("active", "10^9"), *COLUMNS]

    def made(name: str, count: Any, method: str) -> Table:
        def cells(group: list[Record]) -> Sequence[Any]:
            found = count(group)
            if not found:
                return ()
            per_b = of_rows(group, found)
            counted = Estimate(found / 1e9, n=1, method=method)
            return (name, counted, *(getattr(per_b, f) for f in Ape.__dataclass_fields__))

        return build(
            "ape", "Active Parameter Efficiency", kept, KINDS, ("context",), columns, cells
        )

    def traced(group: list[Record]) -> int | None:
        return next((realised(rows, r) for r in group if r.kind == "latency" and not r.error), None)

    first = made("nominal", lambda group: active.get(group[0].key["model"]), "counted")
    second = made("realised", traced, "traced")
    pairs = zip(first.rows, second.rows, strict=True)
    both = [row for pair in pairs for row in pair if len(row) == len(first.columns)]
    return replace(first, rows=tuple(both))


def _place(row: Record, where: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.key.get(name) for name in where)


def experts_table(rows: Sequence[Record]) -> pd.DataFrame:
    """Output throughput of the arms of the experts ablation per active 10^9 parameters, nominal
    and realised in the implementation of each arm."""
    active = nominal(rows)

    def cells(group: list[Record]) -> Sequence[Estimate]:
        rate = inverse(sampled(group, "e2e_s"), group[0].key["new_tokens"] or 1)
        counts = {"counted": active.get(group[0].key["model"]), "traced": realised(rows, group[0])}
        found = [
            missing(f"not {method}") if not n else Estimate(n / 1e9, n=1, method=method)
            for method, n in counts.items()
        ]
        return (rate, *found, *(scaled(rate, 1 / a.value) if a.value else a for a in found))

    columns = [
        Column("output throughput", "tok/s"),
        Column("active, nominal", "10^9"),
        Column("active, realised", "10^9"),
        Column("APE-TPOT, nominal", "tok/s per 10^9"),
        Column("APE-TPOT, realised", "tok/s per 10^9"),
    ]
    return frame(
        build(
            "ape-experts",
            "APE of experts implementations",
            rows,
            ("ablation-experts",),
            ("context",),
            columns,
            cells,
        )
    )
