"""Active Parameter Efficiency: the four quotients of section 3.6 of arXiv 2508.16700, per model.

Each divides a measured quantity by the active parameters in billions (or the peak memory in GB of
10^9 bytes). The interval is that of the measured quantity, scaled: a parameter count has no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes

from lib.analysis.estimators import SAME
from lib.analysis.metrics import METRICS, Metric, shown_in
from lib.analysis.rows import Rows
from lib.analysis.setups import CONTEXT, build, by_setup, points_and_line, whole_calls
from lib.records.kinds import model_order
from lib.records.record import Record
from lib.show import wording
from lib.show.figure import axes, labelled
from lib.show.table import Column, Table
from lib.show.wording import _named
from lib.stats import Estimate

KINDS = ("latency", "memory-paper", "energy")
TIMED = ("latency", "energy")
ACTIVE = {"nominal": METRICS["active"], "realised": METRICS["active_realised"]}


def table(rows: Sequence[Record]) -> Table:
    """The four quotients per model and context, with intervals: on nominal active parameters, and
    below them on realised ones where the experts of the model were traced.

    What was measured for its memory only has no quotient, and no row.
    """
    rows = Rows.of(rows)
    where = (*SAME, "experts", "stack", "context")
    timed = {_place(r, where) for r in rows.of_kinds(TIMED)}
    usable = rows.where(lambda r: r.kind != "memory-paper" or _place(r, where) in timed)
    columns = [Column("parameters", numeric=False), Column("active", ACTIVE["nominal"].unit)]
    columns += [metric.column for metric in shown_in("ape")]

    def grid(name: str) -> Table:
        def cells(group: list[Record]) -> Sequence[Any]:
            rows_with_card = with_card(rows, group)
            count = ACTIVE[name].of(rows_with_card)
            if count.value is None:
                return ()
            return (
                name,
                count,
                *(of_active(m, ACTIVE[name], rows_with_card) for m in shown_in("ape")),
            )

        return build(
            "ape", "Active Parameter Efficiency", usable, KINDS, ("context",), columns, cells
        )

    first, second = (grid(name) for name in ACTIVE)
    pairs = zip(first.rows, second.rows, strict=True)
    both = [row for pair in pairs for row in pair if len(row) == len(first.columns)]
    return replace(first, rows=tuple(both))


def _place(row: Record, where: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.key.get(name) for name in where)


def with_card(rows: Rows, group: Sequence[Record]) -> list[Record]:
    """Rows of one model with its card and its traces."""
    model = group[0].key["model"]
    beside = (r for r in rows.of_kinds(("card", "trace")) if r.key.get("model") == model)
    return [*(r for r in beside if r not in group), *group]


def of_active(metric: Metric, active: Metric, rows: Sequence[Record]) -> Estimate:
    """A quotient on these active parameters; one that is by something else stays what it is."""
    if metric.of.by is ACTIVE["nominal"].of:
        return replace(metric.of, by=active.of)(rows)
    return metric.of(rows)


def nominal(rows: Sequence[Record]) -> dict[str, float]:
    """Active parameters by architecture (10^9), for each model with a card among the rows."""
    return {r.key["model"]: ACTIVE["nominal"].of([r]).value for r in Rows.of(rows).of_kinds("card")}


def conclusion(rows: Sequence[Record], context: int) -> str:
    """The four APE quotients of each model, on each of its stacks, at one context."""
    rows, lines = Rows.of(rows), []
    active = nominal(rows)
    at = rows.where(lambda r: r.key.get("context") == context)
    timed = {(g.model, g.setup) for g in by_setup(at, TIMED)}
    # Before they are named: a setup that was measured for its memory only tells nobody apart.
    usable = at.where(lambda r: r.kind not in KINDS or (r.key["model"], at.setup(r)) in timed)
    groups = by_setup(usable, KINDS)
    for group in (g for g in groups if g.model in active):
        rows_with_card = with_card(rows, group.rows)
        speed, first, joule, memory = (metric.of(rows_with_card) for metric in shown_in("ape"))
        lines.append(
            f"{group.label} at {context} tokens, per billion of its {active[group.model]:.3g} "
            f"billion active parameters: {wording.number(speed, 'tok/s')}; "
            f"{_named(first, 'first tokens per second')}; "
            f"{_named(joule, 'tokens per joule')}. Per GB of peak memory: "
            f"{wording.number(memory, 'tok/s')}."
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
    active, metric = nominal(rows), METRICS["ape_tpot"]
    for group in (g for g in by_setup(rows, "latency") if g.model in active):
        arms = whole_calls(group)
        speeds = [METRICS["output"].of.each(row) for row in arms]
        per_billion = [[speed / active[group.model] for speed in mine] for mine in speeds]
        points_and_line(ax, group, arms, per_billion)
    return labelled(ax, f"{metric.title} against context", CONTEXT, metric.header)
