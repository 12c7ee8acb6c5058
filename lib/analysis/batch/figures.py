"""Figures of growing batches, and their section of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from lib.analysis.batch import points, tables
from lib.analysis.batch.points import Point
from lib.analysis.rows import SETUP
from lib.records.kinds import STAND_IN
from lib.records.record import Record
from lib.show.figure import axes, color, html, labelled, logarithmic, style
from lib.stats import Estimate

WIDE = (10.5, 4.6)  # long names stand beside the axes
WEIGHTS = SETUP.index("weights")
SECTION = Markup("""<section>
<h2 id="batch">Batch</h2>
<p>A step reads its weights once for all sequences of a batch, so that throughput and tokens per
joule grow with the batch until arithmetic, caches and further experts cost more than is shared.
Each user gets a little less. Rings in the first figure are knees. Numbers in the second figure are
batches; faint ones are dominated: another choice for the same model is at least as good in both
respects.</p>
""")


def throughput(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Decode throughput of all sequences against the batch, with its interval; knees are ringed."""
    ax, sizes = axes(ax, figsize=WIDE), set()
    for label, dashes, shade, line in _lines(points.points(rows)):
        dots = [p for p in line if p.total.value is not None]
        sizes |= {p.batch for p in dots}
        for p in dots:
            if None not in (p.total.low, p.total.high):
                ax.plot([p.batch] * 2, [p.total.low, p.total.high], lw=4, alpha=0.3, color=shade)
        if dots:
            ax.plot(
                [p.batch for p in dots],
                [p.total.value for p in dots],
                ls=dashes,
                marker=".",
                color=shade,
                label=label,
            )
        for p in dots:
            if p.batch == points.knee(line).batch:
                ax.plot(
                    p.batch,
                    p.total.value,
                    "o",
                    ms=13,
                    mfc="none",
                    mew=1.5,
                    color=shade,
                    label=f"{label}, knee",
                )
    labelled(
        ax, "Throughput of all sequences against batch", "batch (sequences)", "tokens per second"
    )
    if sizes:  # doublings are the same distance everywhere
        logarithmic(ax)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
    return ax


def pareto(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Tokens for a joule against tokens a second for each user; points are numbered by batch.

    Both are of decoding. Points that a rival beats in one and equals in the other are faint.
    """
    ax, batches = axes(ax, figsize=WIDE), points.points(rows)
    best = {id(p) for p in points.front(batches)}
    drawn = False
    for label, dashes, shade, line in _lines(batches):
        dots = [p for p in line if None not in (p.per_user.value, p.tokens_per_j.value)]
        if not dots:
            continue
        drawn = True
        ax.plot(*_both(dots), ls=dashes, lw=1, alpha=0.5, color=shade, label=label)
        for p in dots:
            ax.plot(
                *_both([p]),
                ls="",
                marker=f"${p.batch}$",
                ms=6 + 3 * len(str(p.batch)),
                mew=0.3,
                alpha=1 if id(p) in best else 0.3,
                color=shade,
            )
            _whiskers(ax, p, shade)
    labelled(
        ax,
        "Speed for a user against energy",
        "tokens per second for each user",
        "tokens per joule, decode (GPU board)",
    )
    if drawn:
        logarithmic(ax)
    return ax


def section(rows: Sequence[Record]) -> Markup:
    """The report's section with both figures and the table; empty where no batch was tried."""
    grids = tables.tables(rows)
    if not grids:
        return Markup("")
    pieces = [html(ax, rows, points.KINDS) for ax in (throughput(rows), pareto(rows))]
    folded = Markup('<details class="more"><summary>Every batch, {} rows</summary>{}</details>')
    table = folded.format(len(grids[0].rows), grids[0].html())
    return Markup("").join([SECTION, *pieces, table, Markup("</section>\n")])


def _lines(batches: Sequence[Point]) -> Iterator[tuple[str, Any, Any, list[Point]]]:
    """Label, style, colour and points of every line."""
    lines = points.by_line([p for p in batches if p.setup[WEIGHTS] != STAND_IN])
    names = points.names(lines)
    for where, line in lines.items():
        yield names[where].label, style(names[where].place), color(where[0]), line


def _both(line: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [p.per_user.value for p in line], [p.tokens_per_j.value for p in line]


def _whiskers(ax: Axes, point: Point, shade: Any) -> None:
    """Intervals of both numbers, where they have one."""
    (x,), (y,) = _both([point])

    def ends(estimate: Estimate) -> tuple[float, float] | None:
        return None if None in (estimate.low, estimate.high) else (estimate.low, estimate.high)

    if span := ends(point.per_user):
        ax.plot(span, [y, y], lw=3, alpha=0.15, color=shade)
    if span := ends(point.tokens_per_j):
        ax.plot([x, x], span, lw=3, alpha=0.15, color=shade)
