"""Figures of energy: joules against context and length, and how they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from lib import stats
from lib.analysis.energy import quantities
from lib.analysis.metrics import METRICS
from lib.analysis.setups import CONTEXT, Group, by_setup, points_and_line, with_sample
from lib.hardware import readouts
from lib.records import store
from lib.records.record import Record
from lib.show.figure import HOLLOW, PALETTE, axes, color, labelled, style

LENGTHS_S = (0.4, 0.8, 1.6, 3.2, 6.4, 12.8)


def figure(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Gross joules per 1,000 generated tokens: the counter, and the paper's estimator beside it."""
    ax = axes(ax)
    estimators = (("j_per_1k", "counter", {}), ("j_per_1k_paper", "paper's", HOLLOW))
    for group in by_setup(rows, "energy"):
        for name, label, drawn in estimators:
            metric = METRICS[name]
            arms = [r for r in with_sample(group, metric.of.name) if "energy_j" in r.samples]
            per_1k = [metric.of.each(r) for r in arms]
            points_and_line(ax, group, arms, per_1k, f", {label}", **drawn)
    return labelled(ax, "Energy per 1,000 generated tokens", CONTEXT, "J (GPU board)")


def parts(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Joules of a call against its new tokens: every block, and the line through them."""
    ax = axes(ax)
    pairs = [
        (group, sorted({r.key["context"] for r in group.rows if r.kind == "energy-slope"}))
        for group in by_setup(rows, quantities.LENGTHS)
    ]
    sloped = [(group, context) for group, contexts in pairs for context in contexts]
    several = sum(bool(contexts) for _, contexts in pairs) > 1
    for number, (group, context) in enumerate(sloped):
        label, drawn = _drawn(group, number, several)
        arms = [r for r in group.rows if r.key["context"] == context and r.samples.get("energy_j")]
        for row in arms:
            values = row.samples["energy_j"]
            ax.plot(
                [row.key["new_tokens"]] * len(values),
                values,
                "o",
                ms=3.5,
                alpha=0.4,
                color=drawn["color"],
            )
        prefill, token = quantities.split(arms)
        if prefill.value is not None:
            ends = [1, max(r.key["new_tokens"] for r in arms)]
            ax.plot(
                ends,
                [prefill.value + token.value * (g - 1) for g in ends],
                label=f"{label}context {context}",
                **drawn,
            )
    return labelled(ax, "Energy of a call against its length", "new tokens", "J (GPU board)")


def blocks(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Every block in the order in which it was measured, over the mean of its cell: drift shows."""
    ax = axes(ax)
    groups = by_setup(rows, "energy")
    cells = [(group, r) for group in groups for r in group.rows if r.value("places")]
    for number, (group, row) in enumerate(cells):
        values = row.samples["energy_j"]
        mean = stats.mean(values).value
        off = [100 * (value / mean - 1) for value in values]
        label, drawn = _drawn(group, number, len(groups) > 1)
        ax.plot(
            range(1, len(off) + 1),
            off,
            marker=".",
            label=f"{label}context {row.key['context']}",
            **drawn,
        )
    return labelled(ax, "Blocks in the order of measurement", "block", "off the mean (%)")


def _drawn(group: Group, number: int, several: bool) -> tuple[str, dict[str, Any]]:
    """How a line's label starts, and how it is drawn: by its model and setup if there are several,
    else by its number."""
    if several:
        return f"{group.label}, ", {"color": color(group.model), "ls": style(group.place)}
    return "", {"color": PALETTE[number % len(PALETTE)]}


def instrument(rows: Sequence[Record], folder: str | Path, ax: Axes | None = None) -> Axes:
    """The three readouts of one board against time: idle, a constant load, idle, square waves."""
    ax = axes(ax)
    trace = recorded(rows, folder, "instrument")
    for number, (field, name) in enumerate(readouts.NAMES.items() if trace else ()):
        times, watts = readouts.power(trace, field)
        ax.plot(times, watts, lw=1, color=PALETTE[number], drawstyle="steps-post", label=name)
    return labelled(ax, "One load, three readouts", "time (s)", "power (W)")


def recorded(rows: Sequence[Record], folder: str | Path, kind: str = "energy") -> list[dict]:
    """The first trace that a row of this kind names, or none."""
    for row in rows:
        names = row.value("traces") or [row.value("trace")]
        if row.kind == kind and names[0]:
            return store.read_trace(Path(folder) / names[0])
    return []


def estimator_error(trace: Sequence[dict[str, Any]], ax: Axes | None = None) -> Axes:
    """Error of four estimators against the length of the window: a point for each phase.

    Lines join the largest absolute errors. Errors are against the interpolated counter.
    """
    ax = axes(ax)
    by_estimator = quantities.estimator_errors(trace, LENGTHS_S)
    for number, (name, by_length) in enumerate(by_estimator.items()):
        shift = 1 + 0.05 * (number - 1.5)
        for length_s, errors in by_length.items():
            ax.plot(
                [length_s * shift] * len(errors),
                [100 * abs(e) for e in errors],
                "o",
                ms=2.5,
                alpha=0.25,
                color=PALETTE[number],
            )
        if by_length:
            worst = [100 * max(map(abs, errors)) for errors in by_length.values()]
            ax.plot(
                [s * shift for s in by_length],
                worst,
                "-",
                color=PALETTE[number],
                label=f"{quantities.ERRORS[name][0]}, worst phase",
            )
    labelled(
        ax,
        "Error of an estimator against the length of the window",
        "window (s)",
        "error against the interpolated counter (%)",
    )
    if trace:
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(LENGTHS_S, [f"{s:g}" for s in LENGTHS_S], minor=False)
        ax.set_ylim(bottom=1e-3)
    return ax
