"""Figures of load curves, and their section of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from lib.analysis.metrics import METRICS
from lib.analysis.serving import clients, tables
from lib.analysis.serving.reading import KIND
from lib.records.record import Record
from lib.show.figure import HOLLOW, axes, color, html, labelled, logarithmic, style

SECTION = Markup("""<section>
<h2 id="serving">Servers under load</h2>
<p>Each server is loaded from one user to saturation, then by Poisson arrivals at a share of the
most that it gave. A latency counts from the instant at which a request was due, whether or not the
client was late, and an error is a miss of goodput. Joules are of the same window as the tokens.
A load of users is a closed loop: each has one request in flight.</p>
""")
Value = Callable[[Record], float | None]


def throughput(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Output tokens a second of all users against their number."""
    ax = axes(ax)
    _draw(ax, rows, _users, _of("served_output"))
    return _by_users(labelled(ax, "Throughput under load", "users", "output tokens per second"))


def latency(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Median TTFT against output throughput; hollow points are rates, where requests may queue."""
    ax = axes(ax)
    rate, ttft = _of("served_output"), _of("served_ttft")
    has_points = _draw(ax, rows, rate, ttft)
    _draw(ax, rows, rate, ttft, "poisson", ", Poisson arrivals", HOLLOW | {"ls": ""})
    labelled(ax, "Latency against throughput", "output tokens per second of all", "TTFT (ms)")
    if has_points:
        logarithmic(ax)
    return ax


def energy(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Joules for 1,000 output tokens against the users; hollow is what an idle board would draw."""
    ax = axes(ax)
    joules, share = _of("served_j_per_1k"), _of("served_idle_share")

    def idle(row: Record) -> float | None:
        both = joules(row), share(row)
        return None if None in both else both[0] * both[1] / 100

    has_points = _draw(ax, rows, _users, joules)
    _draw(ax, rows, _users, idle, "closed", ", of it idle power", HOLLOW)
    labelled(ax, "Energy under load", "users", "J per 1,000 output tokens (GPU board)")
    if has_points:
        logarithmic(ax)
    return _by_users(ax)


def _of(metric: str) -> Value:
    return lambda row: METRICS[metric].of([row]).value


def _users(row: Record) -> float | None:
    return row.key["batch"]


def _draw(
    ax: Axes,
    rows: Sequence[Record],
    x: Value,
    y: Value,
    law: str = "closed",
    what: str = "",
    look: dict[str, Any] | None = None,
) -> bool:
    """One line a curve through the loads of a law; whether there was any point."""
    has_points = False
    for line in tables.lines(rows):
        points = [(x(row), y(row)) for row in line.loads(law)]
        points = [point for point in points if None not in point]
        if points:
            has_points = True
            own = {"marker": ".", "ls": style(line.name.place)} | (look or {})
            ax.plot(*zip(*points, strict=True), color=color(line.model),
                    label=f"{line.name.label}{what}", **own)  # fmt: skip
    return has_points


def _by_users(ax: Axes) -> Axes:
    """Doublings of users are the same distance."""
    counts = sorted({int(x) for line in ax.get_lines() for x in line.get_xdata()})
    if counts:
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [str(count) for count in counts])
    return ax


def section(rows: Sequence[Record]) -> Markup:
    """The report's section: figures, tables, and which clients can be trusted; empty where no
    server was loaded."""
    grids = tables.tables(rows)
    if not grids:
        return Markup("")
    drawn = [draw(rows) for draw in (throughput, latency, energy)]
    pieces = [html(ax, rows, (KIND,)) for ax in drawn if ax.get_lines()]
    folded = Markup('<details class="more"><summary>{}, {} rows</summary>{}</details>')
    pieces += [folded.format(grid.title, len(grid.rows), grid.html()) for grid in grids]
    pieces.append(clients.table().html())
    return Markup("").join([SECTION, *pieces, Markup("</section>\n")])
