"""Figures: rows -> Axes. Samples are points behind the estimate, one colour per model everywhere.

Setups of one model, such as its stacks, keep the colour and differ in line style. Rows that failed
are not drawn. `show` displays a figure with alternative text and a caption that are computed from
the data.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from lib.records.kinds import listed_models, model_order
from lib.records.record import Record, environments
from lib.show.wording import short

PALETTE = sns.color_palette("colorblind", 10)
EMPTY_IN = 1.5  # height of a figure that has nothing to draw
STYLE = {
    "figure.dpi": 110, "savefig.dpi": 110, "figure.figsize": (7.2, 4.0), "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.9", "legend.frameon": False, "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}  # fmt: skip
# Of setups, in turn; dotted is left to bounds.
STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1)))
HOLLOW = {"marker": "o", "ms": 4, "mfc": "white", "lw": 1}  # of the second quantity in a figure


def axes(ax: Axes | None = None, **size: Any) -> Axes:
    """The given axes, or new ones in the workbook's style."""
    if ax is not None:
        return ax
    mpl.rcParams.update(STYLE)
    return plt.subplots(**size)[1]


def color(model: str) -> tuple[float, float, float]:
    """The model's colour: its place in params/models.yaml, or a hash of an unlisted name."""
    place, name = model_order(model)
    if model not in listed_models():
        place = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return PALETTE[place % len(PALETTE)]


def models_of(rows: Iterable[Record]) -> list[str]:
    """Model names in the order of params/models.yaml."""
    return sorted({r.key["model"] for r in rows if r.key.get("model")}, key=model_order)


def style(place: int) -> Any:
    """The line style of a setup by its place, see `analysis.setups`."""
    return STYLES[place % len(STYLES)]


def curves(
    lines: Iterable[tuple[str, str, str, Sequence[float], Sequence[float]]],
    title: str,
    x: str,
    y: str,
    ax: Axes | None = None,
) -> Axes:
    """Published lines: each a label, the model it is of, a line style, and its x and y."""
    ax = axes(ax)
    for label, model, style, at, values in lines:
        ax.plot(at, values, style, marker=".", color=color(model), label=label)
    return labelled(ax, title, x, y)


def logarithmic(ax: Axes) -> None:
    """A logarithmic axis of values whose ticks are plain numbers: 20, 50, 100."""
    ax.set_yscale("log")
    ax.autoscale(axis="y")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def labelled(ax: Axes, title: str, x: str, y: str, legend: bool = True) -> Axes:
    """Title, axes with units from zero, the contexts as ticks, legend outside the data."""
    ax.set(title=title, xlabel=x, ylabel=y)
    if x.startswith("context"):
        ax.set_xticks(sorted({int(value) for line in ax.get_lines() for value in line.get_xdata()}))
    if ax.get_lines() and ax.get_ylim()[0] > 0:
        ax.set_ylim(bottom=0)
    handles, _ = ax.get_legend_handles_labels()
    if legend and handles:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    if not handles:
        ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)
        ax.set(xticks=[], yticks=[])
        ax.figure.set_figheight(EMPTY_IN)
    return ax


def describe(ax: Axes) -> str:
    """Alternative text: what is drawn, and where each labelled series starts and ends."""
    parts = [f"{ax.get_title()}; {ax.get_ylabel() or 'arms'} against {ax.get_xlabel()}."]
    for line in ax.get_lines():
        if not line.get_label().startswith("_") and len(line.get_xdata()):
            x, y = line.get_xdata(), line.get_ydata()
            ends = [f"{short(float(y[i]))} at {x[i]:g}" for i in (0, -1)]
            value = " to ".join(dict.fromkeys(ends)) if ax.get_ylabel() else short(x[0])
            parts.append(f"{line.get_label()}: {value}.")
    for container in ax.containers:
        widths = ", ".join(short(bar.get_width()) for bar in container)
        parts.append(f"{container.get_label()}: {widths}.")
    return " ".join(parts + [text.get_text() for text in ax.texts])


def caption(rows: Sequence[Record], kinds: Sequence[str] = ()) -> str:
    """Hardware, weights, dtype, stack, repetitions and dates, as far as the rows tell: those of
    these kinds, where a figure shows no others."""
    measured = [r for r in rows if r.kind not in ("environment", "card")]
    measured = [r for r in measured if r.kind in kinds] if kinds else measured
    if kinds and not measured:
        return "not measured"
    envs = environments(rows)
    used = {r.env_id for r in measured}
    cards = {e.get("gpu") or e.get("cpu") for i, e in envs.items() if i in used} - {None}
    setups = {
        f"{r.key.get('weights')} weights, {r.key.get('dtype')}, {r.key.get('stack')}"
        for r in measured
        if r.key.get("stack") and not r.error
    }
    counts = sorted(
        {
            len(s)
            for r in measured
            for name, s in r.samples.items()
            if name not in ("warmup_s", "token_s", "itl_s") and not name.endswith("_by_s")
        }
    )
    n = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") if counts else ""
    dates = sorted({e["date"] for i, e in envs.items() if i in used and e.get("date")})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
    return "; ".join(filter(None, ["; ".join(sorted(cards)), "; ".join(sorted(setups)), n, when]))


def html(ax: Axes, rows: Sequence[Record], kinds: Sequence[str] = ()) -> Markup:
    """The figure as HTML that needs no other file; the same rows give the same bytes.

    Its caption is about the rows of these `kinds`, or all.
    """
    picture = io.BytesIO()
    ax.figure.savefig(picture, format="png", metadata={"Software": None})
    plt.close(ax.figure)
    data = base64.b64encode(picture.getvalue()).decode()
    return Markup(
        '<figure class="picture"><img class="figure" alt="{}" src="data:image/png;base64,{}">'
        "<figcaption>{}. {}.</figcaption></figure>"
    ).format(describe(ax), data, ax.get_title(), caption(rows, kinds))


def show(ax: Axes, rows: Sequence[Record], source: str = "", *, kinds: Sequence[str] = ()) -> None:
    """Display the figure with its alternative text, and its caption under it.

    The caption is about the rows of these `kinds`, or all. A figure without rows names the
    `source` of its numbers instead.
    """
    from IPython.display import Markdown, display

    figure = ax.figure
    display(figure, metadata={"image/png": {"alt": describe(ax)}})
    display(Markdown(f"*{ax.get_title()}. {source or caption(rows, kinds)}.*"))
    plt.close(figure)
