"""Looking at a result set by hand: rows of what exists, and a panel that offers nothing else."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from lib.analysis import efficiency, frame, latency
from lib.analysis.energy import figures as energy
from lib.analysis.memory import figures as memory
from lib.files import ParamsError, unknown
from lib.records.record import Record, select
from lib.show import figure

if TYPE_CHECKING:
    from ipywidgets import VBox

FIGURES = {
    "throughput": latency.throughput,
    "ttft": latency.ttft,
    "energy": energy.figure,
    "memory": memory.memory_ledger,
    "efficiency": efficiency.figure,
}


def draw(metric: str, rows: Sequence[Record]) -> None:
    """Show one of FIGURES."""
    if metric not in FIGURES:
        raise unknown("metric", metric, FIGURES)
    own = [row for row in rows if row.kind != "trace"]  # of whatever stack, for the caption of none
    figure.show(FIGURES[metric](rows), own)


def browse(folder: str | Path) -> str | None:
    """Show every number of a result set, to search, sort and page through; what has a value first.

    Where itables is not installed, which only a JupyterLab needs, a sentence says so instead.
    """
    numbers = frame.frame(folder)
    numbers = numbers.iloc[numbers["value"].isna().argsort(kind="stable")]
    numbers = numbers.astype(object).where(numbers.notna(), "")  # its reason has a column
    try:
        import itables
    except ImportError:
        return f"{len(numbers):,} numbers; install itables to search and sort them here"
    itables.init_notebook_mode(all_interactive=False, connected=False)  # its script goes along
    return itables.show(numbers, connected=False, maxBytes=0, showIndex=False)


def stacks_of(rows: Sequence[Record], model: str) -> list[str]:
    """The stacks on which calls of a model were timed, and not withheld."""
    calls = (r for r in select(rows, "latency", model=model) if not r.error)
    timed = [r for r in calls if r.samples.get("e2e_s")]
    return list(dict.fromkeys(str(r.key.get("stack")) for r in timed))


def pick(
    rows: Sequence[Record], model: str, stack: str, context: int | None = None
) -> list[Record]:
    """Rows of one model on one stack, with its card, its traces and the environments.

    What is not among the rows is an error that lists what is.
    """
    models = [name for name in figure.models_of(rows) if stacks_of(rows, name)]
    if model not in models:
        raise unknown("model", model, models)
    if stack not in stacks_of(rows, model):
        raise unknown(f"stack of {model}", stack, stacks_of(rows, model))
    mine = [
        r
        for r in select(rows, model=model)
        if r.key.get("stack") == stack or r.kind in ("card", "trace")
    ]
    contexts = sorted({r.key["context"] for r in mine if r.samples.get("e2e_s")})
    if context is not None and context not in contexts:
        known = ", ".join(map(str, contexts))
        raise ParamsError(f"no calls of {model} on {stack} at context {context}; there are {known}")
    return [*select(rows, "environment"), *mine]


def metrics_of(rows: Sequence[Record], model: str, stack: str) -> list[str]:
    """The metrics of FIGURES that have something to draw of a model on a stack."""
    mine, names = pick(rows, model, stack), []
    for name, draw_it in FIGURES.items():
        ax = draw_it(mine)
        names += [name] if figure.points(ax) else []
        plt.close(ax.figure)
    return names


def panel(rows: Sequence[Record]) -> VBox:
    """Three lists to choose from, of what the rows hold, over the figure of the choice."""
    import ipywidgets

    @functools.cache  # each name costs a drawing, and the lists ask again with every choice
    def names_of(model: str, stack: str) -> list[str]:
        return metrics_of(rows, model, stack)

    models = [name for name in figure.models_of(rows) if stacks_of(rows, name)]
    model = ipywidgets.Dropdown(options=models, description="model")
    stack = ipywidgets.Dropdown(options=stacks_of(rows, model.value), description="stack")
    metric = ipywidgets.Dropdown(options=names_of(model.value, stack.value), description="metric")

    def offer_stacks(change: object) -> None:
        stack.options = stacks_of(rows, model.value)
        offer_metrics(change)

    def offer_metrics(change: object) -> None:
        names = names_of(model.value, stack.value)
        if list(metric.options) != names:
            kept = metric.value if metric.value in names else names[0]
            metric.options = names
            metric.value = kept

    def show(model: str, stack: str, metric: str) -> None:
        # The lists follow each other a moment later.
        if stack in stacks_of(rows, model) and metric in names_of(model, stack):
            plt.close("all")
            draw(metric, pick(rows, model, stack))

    model.observe(offer_stacks, names="value")
    stack.observe(offer_metrics, names="value")
    shown = ipywidgets.interactive_output(show, {"model": model, "stack": stack, "metric": metric})
    return ipywidgets.VBox([ipywidgets.HBox([model, stack, metric]), shown])
