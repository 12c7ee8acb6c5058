"""Active Parameter Efficiency: the four quotients of section 3.6 of arXiv 2508.16700, per model.

Each divides a measured quantity by the active parameters in billions (or the peak memory in GB of
10^9 bytes). The interval is that of the measured quantity, scaled: a parameter count has no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes

from lib.analysis import metrics
from lib.analysis.metrics import Ape
from lib.analysis.setups import build, by_setup, points_and_line, sampled, setup_of, with_sample
from lib.records.kinds import model_order
from lib.records.record import Record, environments, select
from lib.show import wording
from lib.show.figure import axes, labelled
from lib.show.table import Column, Table
from lib.show.wording import _named
from lib.stats import Estimate, inverse

KINDS = ("latency", "memory-paper", "energy")
TIMED = ("latency", "energy")
SAME = ("model", "weights", "dtype")  # what a trace and the arm that it explains share
COLUMNS = (
    Column("APE-TPOT", "tok/s per 10^9"), Column("APE-1/TTFT", "1/s per 10^9"),
    Column("APE-energy", "tok/J per 10^9"), Column("TPOT/GB", "tok/s per GB"),
)  # fmt: skip


def table(rows: Sequence[Record]) -> Table:
    """The four quotients per model and context, with intervals: on nominal active parameters, and
    below them on realised ones where the experts of the model were traced.

    What was measured for its memory only has no quotient, and no row.
    """
    active = nominal(rows)
    where = (*SAME, "experts", "stack", "context")
    timed = {_place(r, where) for r in rows if r.kind in TIMED}
    usable = [r for r in rows if r.kind != "memory-paper" or _place(r, where) in timed]
    columns = [Column("parameters", numeric=False), Column("active", "10^9"), *COLUMNS]

    def grid(name: str, count: Any, method: str) -> Table:
        def cells(group: list[Record]) -> Sequence[Any]:
            params = count(group)
            if not params:
                return ()
            per_b = of_rows(group, params)
            billions = Estimate(params / 1e9, n=1, method=method)
            return (name, billions, *(getattr(per_b, f) for f in Ape.__dataclass_fields__))

        return build(
            "ape", "Active Parameter Efficiency", usable, KINDS, ("context",), columns, cells
        )

    def traced(group: list[Record]) -> int | None:
        return next((realised(rows, r) for r in group if r.kind == "latency" and not r.error), None)

    first = grid("nominal", lambda group: active.get(group[0].key["model"]), "counted")
    second = grid("realised", traced, "traced")
    pairs = zip(first.rows, second.rows, strict=True)
    both = [row for pair in pairs for row in pair if len(row) == len(first.columns)]
    return replace(first, rows=tuple(both))


def _place(row: Record, where: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.key.get(name) for name in where)


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
    tokens = next((min(counts) for counts in lengths.values() if counts), 1)
    whole = select(rows, "latency", new_tokens=tokens)
    e2e, timed = sampled(whole, "e2e_s"), {r.key.get("experts") for r in whole}
    joules = sampled(select(rows, "energy", new_tokens=tokens), "energy_j")
    peaks = [
        r.value("peak_bytes")
        for r in select(rows, "memory-paper", new_tokens=tokens)
        if r.key.get("experts") in timed
    ]
    return metrics.ape(
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
    same = {name: arm.key.get(name) for name in SAME}
    traced = [
        r.value("active_params_realised")
        for r in select(rows, "trace", batch=1, **same)
        if _same_experts(r, arm)
    ]
    return next((count for count in reversed(traced) if count), None)


def _same_experts(trace: Record, arm: Record) -> bool:
    implementations = [row.value("decode_experts") for row in (trace, arm)]
    if None in implementations:
        return trace.key.get("experts") == arm.key.get("experts")
    return implementations[0] == implementations[1]


def conclusion(rows: Sequence[Record], context: int) -> str:
    """The four APE quotients of each model, on each of its stacks, at one context."""
    active, lines = nominal(rows), []
    at = [r for r in rows if r.kind == "environment" or r.key.get("context") == context]
    timed = {(g.model, g.setup) for g in by_setup(at, TIMED)}
    envs = environments(rows)
    groups = by_setup(
        [r for r in at if r.kind not in KINDS or (r.key["model"], setup_of(r, envs)) in timed],
        KINDS,
    )
    for group in (g for g in groups if g.model in active):
        count = active[group.model]
        quotients = of_rows(group.rows, count)
        lines.append(
            f"{group.label} at {context} tokens, per billion of its {count / 1e9:.3g} billion "
            f"active parameters: {wording.number(quotients.tok_per_s_per_b, 'tok/s')}; "
            f"{_named(quotients.inverse_ttft_per_s_per_b, 'first tokens per second')}; "
            f"{_named(quotients.tok_per_j_per_b, 'tokens per joule')}. Per GB of peak memory: "
            f"{wording.number(quotients.tok_per_s_per_gb, 'tok/s')}."
        )
    for model in sorted(active.keys() - {g.model for g in groups}, key=model_order):
        contexts = sorted(
            {
                r.key["context"]
                for r in rows
                if r.key.get("context") and r.key.get("model") == model and not r.error
            }
        )
        lines.append(f"{model}: nothing measured at {context} tokens; measured: {contexts}.")
    return wording.bullets([*lines, *wording.cautions(rows)])


def figure(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """APE-TPOT, output tokens per second and billion active parameters, against context."""
    ax = axes(ax)
    active = {r.key["model"]: r.values["active_params"] for r in rows if r.kind == "card"}
    for group in (g for g in by_setup(rows, "latency") if g.model in active):
        lengths = [r.key["new_tokens"] for r in group.rows if r.samples.get("e2e_s")]
        tokens = min(lengths, default=0)
        arms = with_sample(group, "e2e_s", new_tokens=tokens)
        per_b = 1e9 * tokens / active[group.model]
        points_and_line(ax, group, arms, [[per_b / t for t in r.samples["e2e_s"]] for r in arms])
    return labelled(
        ax, "APE-TPOT against context", "context (tokens)", "tok/s per 10^9 active parameters"
    )
