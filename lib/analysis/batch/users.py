"""Throughput of a GPU against that of each user: the first figure of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes

from lib import stats
from lib.analysis import bounds
from lib.analysis.batch import points
from lib.analysis.batch.points import Point
from lib.analysis.metrics import METRICS
from lib.analysis.routers import WEIGHTS, is_drawn, of_drawn
from lib.analysis.rows import SETUP
from lib.records.record import Record
from lib.show.figure import BOUND, axes, color, labelled, logarithmic, style
from lib.stacks.registry import STACKS


def figure(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Throughput of the GPU against that of each user, of every stack and number format.

    A point is a batch and is numbered by it; those of one user come from single calls. Leads, whose
    logits were not checked at their batch, are faint. Dotted is what the bytes of a step allow.
    """
    ax, drawn = axes(ax, figsize=(8, 4.6)), False
    batches = [p for p in points.points(rows) if is_drawn(p.setup[WEIGHTS])]
    lines = points.by_line([*batches, *_singles(rows, {(p.model, p.context) for p in batches})])
    names, stacks = _short_names(list(lines)), list(STACKS)
    for where, line in lines.items():
        dots = [p for p in line if p.per_user.value is not None]
        if not dots:
            continue
        drawn, shade, stack = True, color(where[0]), where[1 + SETUP.index("stack")].split()[0]
        dashes = style(stacks.index(stack) if stack in stacks else len(stacks))
        at = [p.per_user.value for p in dots], [p.total.value for p in dots]
        ax.plot(*at, ls=dashes, lw=1, alpha=0.6, color=shade, label=names[where])
        for p in dots:
            ax.plot(
                [p.per_user.value],
                [p.total.value],
                marker=f"${p.batch}$",
                ms=6 + 3 * len(str(p.batch)),
                mew=0.3,
                alpha=1 if p.gated else 0.35,
                color=shade,
            )
    dtypes = {(where[0], where[1 + SETUP.index("dtype")]) for where in lines}
    for (model, dtype), arms in _bounds(batches).items():
        at = [a.bound_per_s for a in arms], [a.batch * a.bound_per_s for a in arms]
        form = f" {dtype}" if sum(name == model for name, _ in dtypes) > 1 else ""
        ax.plot(*at, ":", lw=1, color=color(model), label=f"{model}{form}{BOUND}")
    labelled(
        ax,
        "Throughput of all users and of each",
        "tok/s for each user",
        "tok/s of all users",
    )
    if drawn:
        logarithmic(ax, both=True)
    return ax


def _short_names(lines: Sequence[tuple]) -> dict[tuple, str]:
    """Model and stack of each line, the number format where it is not bfloat16, the GPUs where some
    are of several, and the context where that does not tell two lines apart."""
    at = 1 + SETUP.index("gpu")
    shown = any(" x " in where[at] for where in lines)

    def short_name(where: tuple) -> str:
        setup = dict(zip(SETUP, where[1:], strict=False))
        dtype = "" if setup["dtype"] == "bfloat16" else f" {setup['dtype']}"
        every = " every expert" if setup["experts"] == "all_experts" else ""
        gpus = f", {setup['gpu']}" if shown else ""
        return f"{where[0]}, {setup['stack']}{dtype}{every}{gpus}"

    names = {where: short_name(where) for where in lines}
    several = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {
        where: f"{name} at {where[-1]:,}" if name in several else name
        for where, name in names.items()
    }


def _bounds(batches: Sequence[Point]) -> dict[tuple[str, str], list[bounds.Arm]]:
    """Of each model and number format the arms of one setup and context whose bound is known, by
    batch: those of the line with the most batches."""
    lines: dict[tuple[str, str], list[bounds.Arm]] = {}
    for line in points.by_line(batches).values():
        arms = [p.arm for p in line if p.arm and p.arm.bound_per_s]
        of = line[0].model, line[0].setup[SETUP.index("dtype")]
        if len(arms) > max(1, len(lines.get(of, ()))):
            lines[of] = arms
    return lines


def _singles(rows: Sequence[Record], places: set[tuple[str, int]]) -> Iterator[Point]:
    """Single calls of engines as batches of one, at the contexts where batches were measured."""
    decode, none = METRICS["decode"], stats.missing("not measured")
    for group in filter(of_drawn, decode.groups(rows)):
        for context, length in sorted(decode.shapes(group)):
            rate = decode.of(decode.arm(group, (context, length)))
            if (group.model, context) in places and rate.value is not None:
                yield Point(group.model, group.setup, context, 1, rate, rate, none, none, None, "")
