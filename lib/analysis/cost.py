"""What a token costs: dollars from the time and the energy of whole calls, at given prices.

Nothing is assumed: without a price there is no column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib import stats
from lib.analysis.setups import build, sampled
from lib.files import ParamsError
from lib.records.record import Record
from lib.show.table import Column, Table
from lib.stats import Estimate

JOULES_PER_KWH = 3.6e6
KINDS = ("latency", "batch", "energy")


@dataclass(frozen=True)
class Prices:
    """USD for an hour of the GPU and for a kWh; None where none is given."""

    gpu_hour_usd: float | None = None
    kwh_usd: float | None = None

    def __post_init__(self) -> None:
        for name, price in vars(self).items():
            if price is not None and not 0 < price < math.inf:
                raise ParamsError(f"{name.upper()} is {price:g}; a price is a positive number")

    @property
    def given(self) -> bool:
        """Whether there is any price to count with."""
        return self.gpu_hour_usd is not None or self.kwh_usd is not None


def table(rows: Sequence[Record], prices: Prices) -> Table:
    """Costs per model, set-up, context, length and batch; the formulas are its notes."""
    calls = [
        r
        for r in rows
        if r.kind == "environment"
        or (
            r.kind in KINDS
            and (r.key.get("new_tokens") or 0) > 1
            and r.key.get("decoding") in ("greedy", None)
        )
    ]
    batches = {r.key.get("batch") for r in calls if r.kind != "environment"}
    fields = ("context", "new_tokens", *(["batch"] if len(batches) > 1 else []))

    def cells(group: list[Record]) -> Sequence[Any]:
        requests = group[0].key.get("batch") or 1
        tokens = requests * group[0].key["new_tokens"]
        hour_usd = prices.gpu_hour_usd and prices.gpu_hour_usd * (group[0].key.get("devices") or 1)
        timed = [r for r in group if r.kind != "energy"] or group
        call_s = sampled(timed, "e2e_s")
        call_j = sampled([r for r in group if r.kind == "energy"], "energy_j")
        costs = []
        if prices.gpu_hour_usd is not None:
            costs.append(usd_per_million_tokens(call_s, tokens, hour_usd))
            costs.append(usd_per_thousand_requests(call_s, requests, hour_usd))
        if prices.kwh_usd is not None:
            costs.append(energy_usd_per_million_tokens(call_j, tokens, prices.kwh_usd))
        return costs

    several = any(r.key.get("devices") for r in calls)
    sharded = ["where a model is sharded, every one of its GPUs is paid"] if several else []
    columns, notes = [], []
    if prices.gpu_hour_usd is not None:
        columns += [
            Column("GPU time, 10^6 output tokens", "USD"),
            Column("GPU time, 1,000 requests", "USD"),
        ]
        notes += [
            f"GPU time at c = {prices.gpu_hour_usd:g} USD an hour: c / 3600 x t / (b g) x 10^6 for "
            "10^6 output tokens, c / 3600 x t / b x 1000 for 1,000 requests of this context and "
            "length; t is the end-to-end latency (s) of a call of b requests with g new tokens "
            "each, prefill included",
            *sharded,
            "the GPU is paid while it works and not while it waits; a service that is idle half of "
            "the time pays twice as much",
        ]
    if prices.kwh_usd is not None:
        columns.append(Column("energy, 10^6 output tokens", "USD"))
        notes.append(
            f"energy at {prices.kwh_usd:g} USD per kWh: {prices.kwh_usd:g} x E / (b g) x "
            "10^6 / 3.6 x 10^6 J per kWh; E is the gross energy (J) of the GPU board in a "
            "call, without host and cooling; the price of a rented hour includes it"
        )
    grid = build("money", "Cost", calls, KINDS, fields, columns, cells)
    return replace(grid, notes=(*grid.notes, *notes))


def usd_per_million_tokens(call_s: Estimate, tokens: int, gpu_hour_usd: float) -> Estimate:
    """USD of GPU time for 10^6 output tokens; a call takes `call_s` for `tokens` of them in all."""
    return stats.scaled(call_s, gpu_hour_usd / 3600 / tokens * 1e6)


def usd_per_thousand_requests(call_s: Estimate, requests: int, gpu_hour_usd: float) -> Estimate:
    """USD of GPU time for 1,000 requests; a call serves `requests` at once."""
    return stats.scaled(call_s, gpu_hour_usd / 3600 / requests * 1e3)


def energy_usd_per_million_tokens(call_j: Estimate, tokens: int, kwh_usd: float) -> Estimate:
    """USD of energy for 10^6 output tokens; a call takes `call_j` for `tokens` of them in all."""
    return stats.scaled(call_j, kwh_usd / JOULES_PER_KWH / tokens * 1e6)
