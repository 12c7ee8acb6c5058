"""Figures: rows -> Axes. Samples are points behind the estimate, one colour per model everywhere.

Setups of one model, such as its stacks, keep the colour and differ in line style. Rows that failed
are not drawn. `show` displays a figure with alternative text and a caption that are computed from
the data.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from lib.records.jobs import slug
from lib.records.kinds import listed_models, model_order
from lib.records.record import NO_ARM, Record, environments
from lib.show.page import data_link
from lib.show.table import csv_text
from lib.show.wording import short

PALETTE = sns.color_palette("colorblind", 10)
PICTURE = Markup(
    '<figure class="picture" id="{0}">{1}<figcaption><b>{2}.</b> {3}. <span class="tools">'
    '<a download="{0}.csv" href="{4}" aria-label="CSV of {2}" data-shows="CSV"></a></span>'
    "</figcaption></figure>"
)
EMPTY_IN = 1.5  # height of a figure that has nothing to draw
STYLE = {
    "figure.dpi": 110, "savefig.dpi": 110, "figure.figsize": (7.2, 4.0), "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.9", "legend.frameon": False, "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}  # fmt: skip
BOUND = ", bound"  # ends the name of a line that is a bound
RING = 10  # points; larger marks stand around a point of another line
LABEL_POINTS = 8
# From the start of a name, not from under it, to its line.
LEADER = {"arrowstyle": "-", "lw": 0.5, "alpha": 0.5, "shrinkA": 0, "relpos": (0, 0.5)}
PIXELS = 96 / 72  # of a point
INK = {"#000000": "currentColor", "#e6e6e6": "var(--rule)", "#ffffff": "var(--paper)"} | {
    grey: "var(--muted)" for grey in ("#4d4d4d", "#595959", "#808080", "#999999")
}  # text and axes, the grid, what hides a line, notes
HUES = frozenset(mpl.colors.to_hex(shade) for shade in PALETTE)
# How much of a colour of PALETTE is left beside the page's ink, in per cent: names in it are text,
# and have a contrast of 4.5 in both themes.
LEFT = {"text": 45, "": 75}
STYLE_ITEM = re.compile(r"([\w-]+): ([^;]+)")
PLACES = {"d", "x", "y", "width", "height", "transform"}
DECIMALS = re.compile(r"-?\d+\.\d+")
PATH_LETTER = re.compile(r"\s*([A-Za-z])\s*")
REFERENCE = re.compile(r'(?:url\(#|href="#)([\w-]+)')
SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
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


def logarithmic(ax: Axes, *, both: bool = False) -> None:
    """A logarithmic axis of values whose ticks are plain numbers: 20, 50, 100, fewer where it is
    long; `both` axes are so."""
    for name in ("x", "y") if both else ("y",):
        getattr(ax, f"set_{name}scale")("log")
        ax.autoscale(axis=name)
        axis = getattr(ax, f"{name}axis")
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 3) if high > 100 * low else (1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def labelled(ax: Axes, title: str, x: str, y: str, legend: bool = True) -> Axes:
    """Title, axes with units from zero, the contexts as ticks, legend outside the data."""
    ax.set(title=title, xlabel=x, ylabel=y)
    if x.startswith("context"):
        ticks = sorted({int(value) for line in ax.get_lines() for value in line.get_xdata()})
        ax.set_xticks(ticks, apart(ticks))
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


def apart(ticks: Sequence[int], share: float = 0.07) -> list[str]:
    """Labels of ticks, those left out that would touch their right neighbour."""
    least = share * (ticks[-1] - ticks[0]) if ticks else 0
    pairs = zip(ticks, [*ticks[1:], float("inf")], strict=False)
    return [str(tick) if after - tick > least else "" for tick, after in pairs]


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
    measured = [r for r in rows if r.kind not in NO_ARM]
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
            if r.kind != "serving"  # its samples are requests, of the window and around it
            for name, s in r.samples.items()
            if name not in ("warmup_s", "token_s", "itl_s") and not name.endswith("_by_s")
        }
    )
    n = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") if counts else ""
    dates = sorted({e["date"] for i, e in envs.items() if i in used and e.get("date")})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
    return "; ".join(filter(None, ["; ".join(sorted(cards)), "; ".join(sorted(setups)), n, when]))


def html(ax: Axes, rows: Sequence[Record], kinds: Sequence[str] = (), *, note: str = "") -> Markup:
    """The figure as HTML that needs no other file; the same rows give the same bytes.

    Its caption is the `note`, or about the rows of these `kinds`, or all. Where there is nothing to
    draw, a line says so.
    """
    title = ax.get_title()
    if not (drawn := points(ax)):
        plt.close(ax.figure)
        return Markup('<p class="note">{}: not measured.</p>').format(title)
    text, csv = describe(ax), csv_text(drawn)
    ax.set_title("")  # the caption has it
    label_ends(ax)
    picture = svg(ax, text)
    plt.close(ax.figure)
    name = f"figure-{slug(title)}"
    return PICTURE.format(
        name, picture, title, note or caption(rows, kinds), data_link(csv.encode())
    )


def points(ax: Axes) -> list[dict[str, Any]]:
    """What is drawn: each point of a series that has a name, each part of a bar."""
    x, y = ax.get_xlabel() or "x", ax.get_ylabel() or "y"
    lines = [
        {"series": line.get_label(), x: float(at), y: float(value)}
        for line in ax.get_lines()
        if not line.get_label().startswith("_")
        for at, value in line.get_xydata()
    ]
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    return lines + [
        {"series": container.get_label(), "bar": name, x: float(bar.get_width())}
        for container in ax.containers
        for name, bar in zip(names, container, strict=False)
    ]


def svg(ax: Axes, text: str) -> Markup:
    """The figure of the axes as an <svg> for a page, with its alternative text.

    Black is the page's own ink, so that it follows the theme; styles are attributes, since the
    page's policy allows no others; nothing in it has an id but what it refers to itself.
    """
    picture = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": text}):
        ax.figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(picture.getvalue())
    root.remove(root.find(f"{{{SVG}}}metadata"))
    for part in root.iter(f"{{{SVG}}}defs"):  # a style sheet, whose two rules the root has below
        for sheet in part.findall(f"{{{SVG}}}style"):
            part.remove(sheet)
    used = set(REFERENCE.findall(picture.getvalue()))
    for tag in root.iter():
        for name, value in STYLE_ITEM.findall(tag.attrib.pop("style", "")):
            if name == "font":
                tag.set("font-size", re.search(r"[\d.]+px", value)[0])
            elif name != "font-family":
                tag.set(name, _themed(value, "text" if tag.tag == f"{{{SVG}}}text" else ""))
        if tag.get("id") not in used:
            tag.attrib.pop("id", None)
        if tag.get("transform", "").startswith("rotate(-0 "):
            del tag.attrib["transform"]
        for name in PLACES & tag.attrib.keys():
            tag.set(name, DECIMALS.sub(_tenth, tag.get(name)))
        if path := tag.get("d"):
            tag.set("d", PATH_LETTER.sub(r"\1", path))
    _, _, width, height = root.get("viewBox").split()
    root.attrib |= {"class": "figure", "role": "img", "aria-label": text, "fill": "currentColor"}
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt"}
    pixels = {"width": float(width) * PIXELS, "height": float(height) * PIXELS}
    root.attrib |= {name: f"{size:.0f}" for name, size in pixels.items()}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _tenth(number: re.Match[str]) -> str:
    """A length in points to a tenth, which is finer than a screen."""
    return f"{round(float(number[0]), 1) + 0:g}"  # -0.0 + 0 is 0.0


def _themed(value: str, what: str) -> str:
    """A colour of matplotlib as one that is readable in both themes of the page."""
    if value in HUES:
        return f"color-mix(in srgb, {value} {LEFT[what]}%, var(--ink))"
    return INK.get(value, value)


def label_ends(ax: Axes) -> None:
    """Names at the ends of the lines, in their colours, in place of a legend; bounds once a colour.

    Where other things than lines have names, the legend stays.
    """
    legend = ax.get_legend()
    lines = [x for x in ax.get_lines() if not x.get_label().startswith("_") and len(x.get_xdata())]
    if legend is None or ax.containers or not lines:
        return
    ends: dict[tuple[str, Any], tuple[float, float, float]] = {}
    to_axes = ax.transData + ax.transAxes.inverted()
    for line in lines:
        if line.get_markersize() > RING:  # a mark on a line that has its name
            continue
        name = line.get_label()
        if name.endswith(BOUND):
            name = f"{name.split(' (')[0].removesuffix(BOUND)}{BOUND}"
        x, y = to_axes.transform(line.get_xydata()[-1])
        ends.setdefault((name, line.get_color()), (y, x, y))
    legend.remove()
    gap = LABEL_POINTS * 1.25 / (72 * ax.figure.get_figheight() * 0.75)
    places = sorted(ends.items(), key=lambda item: item[1])
    heights: list[float] = []
    for _, (y, *_) in places:  # from below, each above the one before
        heights.append(max(y, heights[-1] + gap) if heights else y)
    limit = 1.0
    for at in reversed(range(len(heights))):  # what was pushed out at the top comes down again
        heights[at] = min(heights[at], limit)
        limit = heights[at] - gap
    above = [*(key for key, _ in places[1:]), ("", None)]
    for height, ((name, color), (_, x, y)), (upper, its) in zip(
        heights, places, above, strict=True
    ):
        model, comma, rest = name.partition(", ")  # is said once of neighbours in its colour
        same = comma and its == color and upper.startswith(f"{model}, ")
        rest = f"({rest}" if model.count("(") > model.count(")") else rest
        ax.annotate(
            f"    {rest}" if same else name, (x, y),
            (1.02, height), xycoords="axes fraction", textcoords="axes fraction",
            color=color, fontsize=LABEL_POINTS, va="center", annotation_clip=False,
            arrowprops=LEADER | {"color": color} if x > 0.4 else None,  # longer ones only confuse
        )  # fmt: skip


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
