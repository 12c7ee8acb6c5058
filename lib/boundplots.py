"""Figures of the bounds: decode throughput under what its bytes allow, and the memory's streams."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from lib import machine, roofline
from lib.groups import named
from lib.records.record import Record, select
from lib.show.figure import PALETTE, axes, color, labelled, logarithmic, style


def bound(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Decode throughput with its interval at each context, under the bound of its bytes."""
    ax = axes(ax)
    groups: dict[tuple, list[roofline.Arm]] = {}
    for arm in roofline.arms(rows):
        groups.setdefault((arm.model, *arm.setup, arm.batch), []).append(arm)
    names = named(list(groups), ("batch",))
    for where, arms in groups.items():
        label, shade = names[where].label, color(where[0])
        known = [a for a in arms if a.steps_per_s.value is not None]
        for a in known:
            ends = (a.steps_per_s.low, a.steps_per_s.high)
            if None not in ends:  # noise may leave an end open
                ax.plot(
                    [a.context] * 2, [a.batch * end for end in ends], lw=4, alpha=0.3, color=shade
                )
        if known:
            ax.plot(
                [a.context for a in known],
                [a.batch * a.steps_per_s.value for a in known],
                ls=style(names[where].place),
                marker=".",
                color=shade,
                label=label,
            )
        limited = [a for a in arms if a.bound_per_s]
        if limited:
            ax.plot(
                [a.context for a in limited],
                [a.batch * a.bound_per_s for a in limited],
                ":",
                color=shade,
                label=f"{label}, bound",
            )
    labelled(ax, "Decode throughput under its bound", "context (tokens)", "tokens per second")
    if groups:  # a share of the bound is the same distance everywhere
        logarithmic(ax)
    return ax


def ceilings(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Bandwidth of every shape that moves memory, all repetitions, beside the datasheet's."""
    found = select(rows, "ceilings")
    shapes = machine.streams(found[-1]) if found else {}
    ax = axes(ax, figsize=(7.2, 1.2 + 0.3 * len(shapes)))
    for place, (name, samples) in enumerate(shapes.items()):
        rates = [rate / 1e9 for rate in samples]
        ax.plot(rates, [place] * len(rates), "o", ms=4, alpha=0.35, color=PALETTE[0])
        ax.plot(max(rates), place, "|", ms=14, mew=2, color=PALETTE[0], label=name)
    stated = machine.limits(rows)[found[-1].env_id].sheet.memory_bytes_per_s if found else None
    if stated:
        ax.axvline(stated / 1e9, ls=":", color="0.3", label="datasheet")
    ax.set_yticks(range(len(shapes)), list(shapes))
    labelled(ax, "Bandwidth by shape", "GB/s (10^9 bytes a second)", "", legend=False)
    ax.set_ylim(max(len(shapes), 1) - 0.5, -0.5)
    ax.set_xlim(left=0)
    return ax
