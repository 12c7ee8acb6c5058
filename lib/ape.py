"""Active Parameter Efficiency: the four formulas of section 3.6 of arXiv 2508.16700.

Each divides a measured quantity by the active parameters in billions (or the peak memory in GB of
10^9 bytes). The interval is that of the measured quantity, scaled: a parameter count has no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lib.grid import Column, build, frame, sampled
from lib.records import Record, select
from lib.stats import Estimate, inverse, missing, scaled

KINDS = ("latency", "memory-paper", "energy")
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
    """The four quotients of one model at one context, from its rows of the headline length.

    The peak is that of the experts implementation that was timed: memory may be measured for
    others too.
    """
    ttft = sampled(select(rows, "latency", new_tokens=1), "ttft_s")
    lengths = [r.key["new_tokens"] for r in rows if r.key["new_tokens"] > 1]
    tokens = min(lengths, default=1)
    whole = select(rows, "latency", new_tokens=tokens)
    e2e, timed = sampled(whole, "e2e_s"), {r.key.get("experts") for r in whole}
    joules = sampled(select(rows, "energy", new_tokens=tokens), "energy_j")
    peaks = [r.value("peak_bytes") for r in select(rows, "memory-paper", new_tokens=tokens)
             if r.key.get("experts") in timed]  # fmt: skip
    return ape(
        active_params=active_params,
        output_tok_per_s=inverse(e2e, tokens),
        ttft_s=ttft,
        tok_per_j=inverse(joules, tokens),
        peak_bytes=peaks[-1] if peaks else None,
    )


def table(rows: Sequence[Record]) -> pd.DataFrame:
    """The four quotients on nominal active parameters, per model and context, with intervals."""
    active = {r.key["model"]: r.values["active_params"] for r in rows if r.kind == "card"}
    columns = [Column("active", "10^9"), *COLUMNS]

    def cells(group: list[Record]) -> Sequence[Estimate]:
        count = active[group[0].key["model"]]
        counted = Estimate(count / 1e9, n=1, method="counted")
        quotients = of_rows(group, count)
        return (counted, *(getattr(quotients, name) for name in Ape.__dataclass_fields__))

    return frame(build("ape", "Active Parameter Efficiency", rows, KINDS, ("context",), columns,
                       cells))  # fmt: skip
