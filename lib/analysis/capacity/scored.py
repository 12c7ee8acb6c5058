"""Scored predictions for reading: tables, the figure, the report's section, and the page in Git."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from lib import files, stats
from lib.analysis.capacity import registry, score
from lib.analysis.rows import Rows
from lib.files import ROOT
from lib.records import jobs, store
from lib.records.kinds import STUDY_STACK, model_order
from lib.records.record import Record
from lib.show import figure
from lib.show.figure import axes, color, labelled
from lib.show.table import Column, Number, Table, Verdict
from lib.stacks.registry import STACKS
from lib.stats import Estimate

NAMES = {
    score.DECODE: "decode (tok/s)",
    score.TTFT: "TTFT (s)",
    score.DECODE_J: "J per 1,000 decoded",
    score.CALL_J: "J per 1,000, whole call",
}
TITLES = {"gpu": "GPU", "metric": "quantity", "bound": "said to wait for", "beyond": "shape"}
WRONG = "What the model did not know: errors by what a cell was said to wait for"
GAINED = "What another card gained: cells over the same places of the card learned from"
HIT, MISS = Verdict("covered", "", "✓", "holds"), Verdict("missed", "", "✗", "fails", 1)
NOT_COUNTED = ("?", "untestable", 2)
CELL_IN, EDGE_IN, GAP = (
    0.08,
    1.4,
    2,
)  # height of a cell and of all else in the figure; cells between
TIMES = (0.25, 0.5, 0.8, 1, 1.25, 2, 4)  # ticks of measured / predicted
SECTION = Markup("""<section>
<h2 id="predicted">Predicted first, measured afterwards</h2>
<p>A small model, fitted to rows of H100s, predicted these cells with 90&nbsp;% intervals before
they were measured here; the file has not changed since. Lines are the intervals, dots what was
measured, both over the prediction; hollow dots lie outside.</p>
""")


def figures_table(name: str, title: str, groups: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each group of cells: how many are covered, widths and errors."""
    own = [n for n in groups[0] if n not in score.figures(())] if groups else []
    columns = (
        *(Column(TITLES.get(n, n), numeric=False) for n in own),
        Column("cells"), Column("covered"), Column("median half-width", "%"),
        Column("median error", "%"), Column("median signed error", "%"),
    )  # fmt: skip
    rows = tuple(
        (
            *(_text(n, group[n]) for n in own),
            group["cells"],
            f"{group['covered']} ({group['coverage']:.0%})" if group["cells"] else "–",
            *(_percent(group[n]) for n in
              ("median_half_width", "median_error", "median_signed_error")),
        )
        for group in groups
    )  # fmt: skip
    return Table(name, title, columns, rows)


def gain_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each group of `score.gains`."""
    texts = [n for n in groups[0] if n not in ("cells", "predicted", "measured")] if groups else []
    columns = (
        *(Column(TITLES.get(name, name), numeric=False) for name in texts),
        Column("cells"), Column("predicted", "times"), Column("measured", "times"),
    )  # fmt: skip
    rows = tuple(
        (
            *(_text(name, group[name]) for name in texts),
            group["cells"],
            *(Number(stats.exact(group[name], "median")) for name in ("predicted", "measured")),
        )
        for group in groups
    )
    notes = ("medians; of tokens a second more than 1 is faster, of seconds and joules less",)
    return Table("predicted-gains", GAINED, columns, rows, notes)


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "beyond the rows" if value else "within the rows"
    return NAMES.get(value, f"{value:,}" if isinstance(value, int) else str(value))


def _percent(share: float | None) -> Number:
    missing = share is None
    return Number(
        stats.missing("no cell counts") if missing else stats.exact(100 * share, "median"),
        decimals=1,
    )


def target_table(data: Mapping[str, Any]) -> Table:
    """What was fixed at registration, and whether it was reached."""
    words = {True: "reached", False: "not reached", None: "nothing measured"}
    rows = tuple(
        (
            one["of"],
            one["what"],
            f"{'at least' if one['what'] == 'coverage' else 'at most'} {one['target']:.0%}",
            "–" if one["value"] is None else f"{one['value']:.1%}",
            words[one["met"]],
        )
        for one in data["target"]
    )
    titles = ("cells", "what", "fixed at registration", "measured cells", "verdict")
    columns = tuple(Column(title, numeric=False) for title in titles)
    return Table("predicted-target", "Against the target", columns, rows)


def error_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Every measured cell: predicted, measured, the error, and whether the interval covers it."""
    columns = (
        *(Column(title, numeric=False) for title in ("model", "GPU", "stack")),
        Column("context", "tokens"), Column("batch"), Column("quantity", numeric=False),
        Column("predicted"), Column("measured"), Column("error", "%"),
        Column("interval", numeric=False),
    )  # fmt: skip
    rows = tuple(
        (
            f"{line['model']}, {line['form']}",
            line["gpu"],
            line["stack"],
            line["context"],
            line["batch"],
            NAMES[line["metric"]],
            _predicted(line),
            _measured(line),
            _percent(line["error"]) if "error" in line else stats.missing(line["missing"]),
            _verdict(line),
        )
        for line in lines
        if line["measured"] is not None
    )
    notes = (
        "error: predicted / measured - 1; intervals of predictions hold at 90 %",
        "a first token of one user is one prediction for all stacks of the library; where it was "
        "measured on several, each counts",
    )
    return Table("predicted-errors", "Predicted and measured", columns, rows, notes)


def _predicted(line: Mapping[str, Any]) -> Estimate:
    if line["predicted"] is None:
        return stats.missing(line["missing"])
    ends = (line["low"], line["high"])
    return Estimate(line["predicted"], *ends, 1, "registered", level=0.9)


def _measured(line: Mapping[str, Any]) -> Estimate:
    ends = (line["measured_low"], line["measured_high"])
    own = {name: line[name] for name in ("n", "method", "level")}
    visits = line["n"] if "visits" in line["method"] else 0
    return Estimate(line["measured"], *ends, **own, visits=visits)


def _verdict(line: Mapping[str, Any]) -> Verdict:
    if score.counts(line):
        return HIT if line["covered"] else MISS
    return Verdict("not counted", line.get("outside") or line["missing"], *NOT_COUNTED)


def errors(lines: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Measured over predicted of every cell that counts, with the interval, by quantity and stack;
    the colour is the model's."""
    mine = [line for line in lines if score.counts(line)]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in sorted(mine, key=lambda x: (list(NAMES).index(x["metric"]), x["stack"])):
        groups.setdefault((line["metric"], line["stack"]), []).append(line)
    ax = axes(ax, figsize=(9, EDGE_IN + CELL_IN * (len(mine) + GAP * max(len(groups), 1))))
    labels, ticks, at = set(), [], -1
    for group in groups.values():
        ordered = sorted(group, key=lambda x: (x["gpu"], model_order(x["model"]), x["context"]))
        ticks.append(at + (len(group) + 1) / 2)
        for line in ordered:
            at, shade = at + 1, color(line["model"])
            ends = [line[end] / line["predicted"] for end in ("low", "high")]
            ax.plot(ends, [at, at], lw=2, alpha=0.3, color=shade)
            new = line["model"] not in labels
            labels.add(line["model"])
            ax.plot(
                line["measured"] / line["predicted"],
                at,
                ls="",
                marker="o",
                ms=4,
                color=shade,
                mfc=shade if line["covered"] else "none",
                label=line["model"] if new else None,
            )
        at += GAP
    labelled(ax, "Measured over predicted", "measured / predicted", "")
    if groups:
        ax.axvline(1, color="0.5", lw=0.8)
        ax.set_xscale("log", base=2)
        ax.set_xticks(TIMES, [f"{times:g}" for times in TIMES])
        names = [f"{NAMES[metric].split(' (')[0]}, {stack}" for metric, stack in groups]
        ax.set_yticks(ticks, names)
        ax.set_ylim(at - GAP + 1, -1)
    return ax


def sentence(lines: Sequence[Mapping[str, Any]]) -> str:
    """How many cells are covered, and how far decoding was off."""
    one, eager, others = (
        score.figures(x for x in lines if (x["stack"] == STUDY_STACK) in stacks)
        for stacks in ((True, False), (True,), (False,))
    )
    if not one["cells"]:
        return "No cell that counts has been measured yet."
    text = (
        f"{one['covered']} of {one['cells']} measured cells lie in their interval "
        f"({one['coverage']:.0%}), with a median half-width of {one['median_half_width']:.0%} and "
        f"a median error of {one['median_error']:.1%}"
    )
    if one["median_decode_error"] is not None:
        text += f"; of decoding it is {one['median_decode_error']:.1%}"
    if eager["cells"] and others["cells"]:
        text += (
            f". Of the {eager['cells']} on hf-eager, where the host decides, "
            f"{eager['coverage']:.0%} are covered; of the {others['cells']} others "
            f"{others['coverage']:.0%}"
        )
    cards = score.by(lines, "gpu")
    told = (
        f"{x['covered']} of {x['cells']} on {gpu} ({x['coverage']:.0%})"
        for (gpu,), x in cards.items()
    )
    return f"{text}." + (f" By card: {', '.join(told)}." if len(cards) > 1 else "")


def section(rows: Sequence[Record], entries: Sequence[jobs.Job], source: Path) -> Markup:
    """The report's section; empty where no registered cell was measured.

    Of a released set the sentence is that of all released sets together, as the page in Git has it;
    figure and tables are of its own cards.
    """
    if registry.newest() is None:
        return Markup("")
    note = "Hollow dots lie outside their interval"
    if files.resolve(source).parent == store.RELEASED:
        data = read()
        lines, note = data["cells"], f"{note}; rows of {_sets(data)}"
    else:
        lines = score.lines_of(rows, entries)
    gpus = {env.get("gpu") for env in Rows.of(rows).environments.values()}
    own = [line for line in lines if line["gpu"] in gpus]
    grid = error_table(own)
    if not grid.rows:
        return Markup("")
    worst = figures_table("predicted-wrong", WRONG, score.not_known(own))
    folds = [table for table in (worst, gain_table(score.gains(own)), grid) if table.rows]
    folded = Markup('<details class="more"><summary>{}, {} rows</summary>{}</details>')
    return Markup("").join(
        [
            SECTION,
            Markup("<p>{}</p>").format(sentence(lines)),
            figure.html(errors(own), [], note=note),
            *(folded.format(x.title, len(x.rows), x.html()) for x in folds),
            Markup("</section>\n"),
        ]
    )


# --- the page in Git


def page(data: Mapping[str, Any]) -> str:
    """The scored predictions in Markdown."""
    told, lines, registered = data["summary"], data["cells"], data["registered"]
    sets = _sets(data)
    held = [f"{x['cells']} said {x['said']!r}, {'held' if x['held'] else 'did not hold'}"
            for x in told["memory"]]  # fmt: skip
    places = next(told[name] for name in told if name.startswith("by gpu"))
    grids = [
        target_table(told),
        figures_table("all", "All, and hf-eager apart", [
            {"cells of": name, **told[name]} for name in ("all", "without hf-eager", "hf-eager")
        ]),
        figures_table("places", "By model and context", places),
        figures_table("stacks", "By stack", told["by stack"]),
        figures_table("metrics", "By quantity", told["by metric"]),
        figures_table("wrong", WRONG, told["not_known"]),
        gain_table(told["gains"]),
        error_table(lines),
    ]  # fmt: skip
    parts = [
        f"# Predictions of {registered['file'].removesuffix('-capacity.json')}, scored",
        sentence(lines),
        f"Registered at {registered['at']} by commit `{registered['commit'][:12]}` in "
        f"`{registered['file']}` (sha256 `{registered['sha256'][:16]}`), which nothing changes. "
        f"Measured: {sets}. `make score` writes this page again.",
        f"Measured first, and so not counted: {told['measured_first']} numbers. Not measured: "
        f"{told['not_measured']:,} of {len(lines):,}; each has its reason in the JSON file.",
        " ".join(filter(None, (_mean(told), _once(lines)))),
        f"Memory: {'; '.join(held)}." if held else "Memory: nothing measured.",
        *(f"## {x.title}\n\n{_body(x)}" for x in grids if x.rows),
    ]
    return "\n\n".join(parts) + "\n"


def _sets(data: Mapping[str, Any]) -> str:
    return " and ".join(f"{one['folder']} ({one['rows']:,} rows)" for one in data["sets"])


def _mean(told: Mapping[str, Any]) -> str:
    mean = told["mean_coverage_of_models_and_contexts"]
    start = "Cells of one model and context are not independent; the mean of their coverages is "
    return f"{start}{'not measured' if mean is None else f'{mean:.0%}'}."


def _once(lines: Sequence[Mapping[str, Any]]) -> str:
    """The coverage with the first tokens of captured stacks left out, which repeat a prediction."""
    one = score.figures(
        line
        for line in lines
        if (line["metric"], line["batch"]) != (score.TTFT, 1) or not STACKS[line["stack"]].captured
    )
    if not one["cells"]:
        return ""
    count = f"{one['covered']} of {one['cells']} cells are covered ({one['coverage']:.0%})"
    return (
        "A first token of one user is one prediction for all stacks of the library: counted once, "
        f"on hf-eager, {count}."
    )


def _body(table: Table) -> str:
    """A table in Markdown without its title."""
    return table.markdown().partition("\n\n")[2]


def text(data: Mapping[str, Any]) -> str:
    """The data as JSON, a cell a line; of one that was not measured its place and the reason, for
    what was predicted there stands in the registered file."""
    head = json.dumps({k: v for k, v in data.items() if k != "cells"}, indent=1, ensure_ascii=False)
    lines = [
        {name: line[name] for name in (*score.PLACE, "metric", "measured", "missing")}
        if line["measured"] is None
        else line
        for line in data["cells"]
    ]
    cells = ",\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    return f'{head[:-2]},\n "cells": [\n{cells}\n]}}\n'


def path(root: Path = ROOT) -> Path:
    """The scored file beside the newest registered one."""
    file = score.question(root).file
    return file.with_name(f"{file.stem}-scored.json")


def read() -> dict[str, Any]:
    """The scored predictions in Git; without cells where nothing was scored yet."""
    file = path()
    if not file.exists():
        return {"sets": [], "cells": []}
    return json.loads(file.read_text(encoding="utf-8"))


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Score result sets and write the JSON file and its page, by default beside the registered
    file."""
    target = path() if out is None else out / path().name
    store.refuse_released(target)
    files.require_room(target.parent)
    data = score.build(folders)
    files.write_text(target, text(data))
    files.write_text(target.with_suffix(".md"), page(data))
    return target
