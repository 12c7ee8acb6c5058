"""Figures: rows -> Axes. Samples are points behind the estimate, one colour per model everywhere.

`show` displays a figure with alternative text and a caption that are computed from the data.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes

from lib import ledger, params, stats, tables
from lib.records import Record, environments, select

PALETTE = sns.color_palette("colorblind", 10)
STYLE = {
    "figure.dpi": 110, "savefig.dpi": 110, "figure.figsize": (7.2, 4.0), "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.9", "legend.frameon": False, "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}  # fmt: skip
PARTS = {"kv_tensor_bytes": "KV cache", "logits_bytes": "logits held",
         "workspace_bytes": "workspace"}  # fmt: skip
PROTOCOLS = {"memory-paper": "the paper's protocol", "memory": "generate()"}


def axes(ax: Axes | None = None, **size: Any) -> Axes:
    """The given axes, or new ones in the workbook's style."""
    if ax is not None:
        return ax
    mpl.rcParams.update(STYLE)
    return plt.subplots(**size)[1]


def color(model: str) -> tuple[float, float, float]:
    """The model's colour: its place in params/models.yaml, or a hash of an unlisted name."""
    place, name = params.model_order(model)
    if model not in params.listed_models():
        place = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return PALETTE[place % len(PALETTE)]


def models_of(rows: Iterable[Record]) -> list[str]:
    """Model names in the order of params/models.yaml."""
    return sorted({r.key["model"] for r in rows if r.key.get("model")}, key=params.model_order)


def throughput(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Output throughput (prefill included) and decode throughput (slope) against context."""
    ax = axes(ax)
    for model in models_of(rows):
        mine = select(rows, "latency", model=model)
        lengths = [r.key["new_tokens"] for r in mine if r.key["new_tokens"] > 1]
        if not lengths:
            continue
        whole = [r for r in mine if r.key["new_tokens"] == min(lengths)]
        whole = sorted(whole, key=lambda r: r.key["context"])
        speeds = [[min(lengths) / t for t in r.samples["e2e_s"]] for r in whole]
        points_and_line(ax, whole, speeds, model, f"{model}, output")
        contexts = [r.key["context"] for r in whole]
        slopes = [tables.decode_tok_per_s([r for r in mine if r.key["context"] == c]).value
                  for c in contexts]  # fmt: skip
        if None not in slopes:
            ax.plot(contexts, slopes, "--", color=color(model), label=f"{model}, decode only")
    return labelled(ax, "Throughput against context", "context (tokens)", "tokens per second")


def ttft(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Time to first token against context."""
    ax = axes(ax)
    for model in models_of(rows):
        ones = sorted(select(rows, "latency", model=model, new_tokens=1),
                      key=lambda r: r.key["context"])  # fmt: skip
        times = [[1e3 * t for t in r.samples["ttft_s"]] for r in ones]
        points_and_line(ax, ones, times, model, model)
    return labelled(ax, "Time to first token against context", "context (tokens)", "TTFT (ms)")


def token_times(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Inter-token latency along one stamped call per context (the first call of each)."""
    ax = axes(ax)
    stamped = sorted(select(rows, "itl"), key=lambda r: r.key["context"])
    for row in stamped:
        gaps = [1e3 * gap for gap in stats.gaps(row.samples["token_s"][0])]
        ax.plot(range(2, len(gaps) + 2), gaps, lw=1, label=f"context {row.key['context']}")
    return labelled(ax, "Inter-token latency along a call", "token of the call", "ITL (ms)")


def memory_parts(rows: Sequence[Record], kind: str, ax: Axes | None = None) -> Axes:
    """What the peak above the baseline consists of, at each context (MB, 10^6 bytes)."""
    arms = sorted((r for r in rows if r.kind == kind and r.value("workspace_bytes") is not None),
                  key=lambda r: (params.model_order(r.key["model"]), str(r.key["experts"]),
                                 r.key["context"]))  # fmt: skip
    ax = axes(ax, figsize=(7.2, 1.4 + 0.32 * len(arms)))
    several = len({(r.key["model"], r.key["experts"]) for r in arms}) > len(models_of(arms))
    names = [
        f"{r.key['model']}{', ' + r.key['experts'] if several else ''}, {r.key['context']}"
        for r in arms
    ]
    left = [0.0] * len(arms)
    for number, (field, label) in enumerate(PARTS.items() if arms else ()):
        sizes = [max(r.values[field], 0) / 1e6 for r in arms]
        ax.barh(names, sizes, left=left, color=PALETTE[number], label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    ax.invert_yaxis()
    return labelled(ax, f"Peak above baseline, {PROTOCOLS[kind]}", "MB (10^6 bytes)", "")


def memory_ledger(
    rows: Sequence[Record], ax: Axes | None = None, kind: str = "memory-paper"
) -> Axes:
    """Everything beside the weights, part by part, and how far the sum is from what NVML says.

    The weights (named with their size at each bar) would hide the rest. GB are 10^9 bytes.
    """
    made = [(row, book) for row, book in ledger.of_rows(rows) if row.kind == kind]
    ax = axes(ax, figsize=(9.6, 1.6 + 0.3 * len(made)))
    left = [0.0] * len(made)
    shown = {n: title for n, title in ledger.PARTS.items() if n != "weights"}
    for number, (name, label) in enumerate(shown.items() if made else ()):
        sizes = [max(book.parts[name] or 0, 0) / 1e9 for _, book in made]
        if any(sizes):
            ax.barh(range(len(made)), sizes, left=left, color=PALETTE[number], label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, (_, book) in enumerate(made):
        ax.text(left[place], place, _closing(book), va="center", fontsize=7)
    ax.set_yticks(range(len(made)), [_arm_and_weights(row, book) for row, book in made])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.5 * max([*left, 1e-9]))
    reasons = dict.fromkeys(book.open_reason for _, book in made if book.closed is None)
    below = "".join(f"\nnot closed: {reason}" for reason in reasons)
    return labelled(ax, f"Memory beside the weights, {PROTOCOLS[kind]}", f"GB (10^9 bytes){below}",
                    "")  # fmt: skip


def _closing(book: ledger.Ledger) -> str:
    """What the sum of the parts lacks of what NVML says."""
    left = book.residual_bytes
    if left is None:
        return " not closed"
    return f" {left / 1e6:+.1f} MB to NVML ({left / book.used_bytes:+.2%})"


def _arm_and_weights(row: Record, book: ledger.Ledger) -> str:
    experts = "" if row.key.get("experts") == "none" else f", {row.key.get('experts')}"
    size = book.parts["weights"]
    weights = "weights ?" if size is None else f"weights {tables.short(size / 1e9)} GB"
    return f"{row.key['model']}{experts}, {row.key['context']} ({weights})"


def energy(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Gross joules per 1,000 generated tokens: the counter, and the paper's estimator beside it."""
    ax = axes(ax)
    for model in models_of(rows):
        arms = sorted((r for r in select(rows, "energy", model=model) if "energy_j" in r.samples),
                      key=lambda r: r.key["context"])  # fmt: skip
        estimators = (("energy_j", "-", "counter"), ("paper_energy_j", ":", "paper's"))
        for name, style, label in estimators:
            per_1k = [[1e3 * j / r.key["new_tokens"] for j in r.samples[name]] for r in arms]
            points_and_line(ax, arms, per_1k, model, f"{model}, {label}", style)
    return labelled(ax, "Energy per 1,000 generated tokens", "context (tokens)", "J (GPU board)")


def ablation(rows: Sequence[Record], field: str, ax: Axes | None = None) -> Axes:
    """Output throughput of each arm; an arm that failed says so in its place."""
    ax = axes(ax, figsize=(7.2, 1.2 + 0.4 * len(rows)))
    names = [str(r.key.get(field)) for r in rows]
    for place, row in enumerate(rows):
        if row.error:
            ax.text(0.02, place, f"failed: {row.error[:70]}", va="center", fontsize=8,
                    transform=ax.get_yaxis_transform())  # fmt: skip
            continue
        speeds = [row.key["new_tokens"] / t for t in row.samples["e2e_s"]]
        ax.plot(speeds, [place] * len(speeds), "o", ms=4, alpha=0.35, color=color(row.key["model"]))
        ax.plot(stats.median(speeds).value, place, "|", ms=18, mew=2, color=color(row.key["model"]),
                label=names[place])  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    labelled(ax, f"Ablation: {field}", "output throughput (tokens per second)", "", legend=False)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.set_xlim(left=0)
    return ax


def efficiency(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """APE-TPOT, output tokens per second and billion active parameters, against context."""
    ax = axes(ax)
    for card in {r.key["model"]: r for r in rows if r.kind == "card"}.values():
        model, active = card.key["model"], card.values["active_params"]
        mine = [r for r in select(rows, "latency", model=model) if "e2e_s" in r.samples]
        tokens = min((r.key["new_tokens"] for r in mine), default=0)
        arms = sorted(select(mine, new_tokens=tokens), key=lambda r: r.key["context"])
        values = [[tokens / t * 1e9 / active for t in r.samples["e2e_s"]] for r in arms]
        points_and_line(ax, arms, values, model, model)
    return labelled(ax, "APE-TPOT against context", "context (tokens)",
                    "tok/s per 10^9 active parameters")  # fmt: skip


def ladder(rungs: Sequence[Any], title: str, ax: Axes | None = None) -> Axes:
    """Rungs of `lib.ladder`: a ratio with its interval each; one not measured says why."""
    ax = axes(ax, figsize=(9.5, 1.1 + 0.42 * len(rungs)))
    colors = {"paper": "0.35", "measured": PALETTE[0], "bytes": PALETTE[2]}
    said = []
    for place, rung in enumerate(rungs):
        ratio, shade = rung.ratio, colors[rung.origin]
        if ratio.value is None:
            ax.text(0.02, place, ratio.reason, va="center", fontsize=8, color="0.35",
                    bbox={"fc": "white", "ec": "none", "pad": 1},
                    transform=ax.get_yaxis_transform())  # fmt: skip
            said.append("")
            continue
        if ratio.low is not None and ratio.high is not None:
            ax.plot([ratio.low, ratio.high], [place, place], color=shade, lw=2, alpha=0.6)
        ax.plot(ratio.value, place, "o", ms=7, color=shade, label=rung.name)
        said.append(f"{ratio.value:.2f}×")
    labelled(ax, title, "ratio of throughputs", "", legend=False)
    ax.axvline(1, color="0.6", lw=1, ls=":")
    ax.set_yticks(range(len(rungs)), [rung.name for rung in rungs])
    ax.set_ylim(max(len(rungs), 1) - 0.5, -0.5)
    ax.set_xlim(left=0)
    right = ax.secondary_yaxis("right")
    right.set_yticks(range(len(rungs)), said)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    return ax


def curves(lines: Iterable[tuple[str, str, str, Sequence[float], Sequence[float]]], title: str,
           x: str, y: str, ax: Axes | None = None) -> Axes:  # fmt: skip
    """Published lines: each a label, the model it is of, a line style, and its x and y."""
    ax = axes(ax)
    for label, model, style, at, values in lines:
        ax.plot(at, values, style, marker=".", color=color(model), label=label)
    return labelled(ax, title, x, y)


def points_and_line(ax: Axes, rows: Sequence[Record], samples: Sequence[Sequence[float]],
                    model: str, label: str, style: str = "-") -> None:  # fmt: skip
    """Every repetition as a faint point, the medians as a line, over the rows' contexts."""
    contexts = [r.key["context"] for r in rows]
    for context, values in zip(contexts, samples, strict=True):
        ax.plot([context] * len(values), values, "o", ms=3.5, alpha=0.3, color=color(model))
    medians = [stats.median(values).value for values in samples]
    if medians:
        ax.plot(contexts, medians, style, marker=".", color=color(model), label=label)


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
    return ax


def describe(ax: Axes) -> str:
    """Alternative text: what is drawn, and where each labelled series starts and ends."""
    parts = [f"{ax.get_title()}; {ax.get_ylabel() or 'arms'} against {ax.get_xlabel()}."]
    for line in ax.get_lines():
        if not line.get_label().startswith("_") and len(line.get_xdata()):
            x, y = line.get_xdata(), line.get_ydata()
            ends = [f"{tables.short(float(y[i]))} at {x[i]:g}" for i in (0, -1)]
            value = " to ".join(dict.fromkeys(ends)) if ax.get_ylabel() else tables.short(x[0])
            parts.append(f"{line.get_label()}: {value}.")
    for container in ax.containers:
        widths = ", ".join(tables.short(bar.get_width()) for bar in container)
        parts.append(f"{container.get_label()}: {widths}.")
    return " ".join(parts + [text.get_text() for text in ax.texts])


def caption(rows: Sequence[Record]) -> str:
    """Hardware, weights, dtype, stack and repetitions, computed from the rows."""
    measured = [r for r in rows if r.kind not in ("environment", "card")]
    envs = environments(rows)
    keyed = [r for r in measured if r.key.get("model")]
    used = {r.env_id for r in measured}
    cards = {e.get("gpu") or e.get("cpu") for i, e in envs.items() if i in used} - {None}
    setups = {f"{r.key.get('weights')} weights, {r.key.get('dtype')}, {r.key.get('stack')}"
              for r in keyed if not r.error}  # fmt: skip
    counts = sorted({len(s) for r in measured for name, s in r.samples.items()
                     if name not in ("warmup_s", "token_s")})  # fmt: skip
    n = f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") if counts else ""
    return "; ".join(filter(None, ["; ".join(sorted(cards)), "; ".join(sorted(setups)), n]))


def html(ax: Axes, rows: Sequence[Record]) -> str:
    """The figure as HTML that needs no other file; the same rows give the same bytes."""
    picture = io.BytesIO()
    ax.figure.savefig(picture, format="png", metadata={"Software": None})
    plt.close(ax.figure)
    data = base64.b64encode(picture.getvalue()).decode()
    return (f'<figure class="picture"><img class="figure" alt="{escape(describe(ax))}" '
            f'src="data:image/png;base64,{data}"><figcaption>{escape(ax.get_title())}. '
            f"{escape(caption(rows))}.</figcaption></figure>")  # fmt: skip


def show(ax: Axes, rows: Sequence[Record], source: str = "") -> None:
    """Display the figure with its alternative text, and its caption under it.

    A figure without rows names the `source` of its numbers instead.
    """
    from IPython.display import Markdown, display

    figure = ax.figure
    display(figure, metadata={"image/png": {"alt": describe(ax)}})
    display(Markdown(f"*{ax.get_title()}. {source or caption(rows)}.*"))
    plt.close(figure)
