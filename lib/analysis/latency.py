"""How fast calls are: TTFT, throughput and ITL as table, figures and sentences, the A/A check, and
what the definitions of other tools make of the same token stamps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes

from lib import stats
from lib.analysis import host_bound, physics
from lib.analysis.estimators import headline
from lib.analysis.metrics import METRICS, shown_in
from lib.analysis.rows import Rows
from lib.analysis.setups import (
    CONTEXT,
    Group,
    build,
    by_setup,
    points_and_line,
    whole_calls,
    with_sample,
)
from lib.records.record import Record, select
from lib.show import wording
from lib.show.figure import HOLLOW, axes, color, labelled, style
from lib.show.table import Column, Table, of_lines

TTFT, *OTHERS = shown_in("latency")
OUTPUT, DECODE = METRICS["output"], METRICS["decode"]


def table(rows: Sequence[Record]) -> Table:
    """The metrics of calls (TTFT, throughput, ITL ...) per model and context, decoded greedily."""
    greedy = Rows.of(rows).where(lambda r: r.key.get("decoding") in ("greedy", None))

    def new_tokens(group: list[Record]) -> int:
        return headline(select(group, "latency"))

    columns = (TTFT, (Column("new tokens", numeric=False), new_tokens), *OTHERS)
    grid = build(
        "latency", "Latency and throughput", greedy, ("latency", "itl"), ("context",), columns
    )
    count = len(physics.contradictions(greedy, greedy.environments))
    return replace(grid, notes=(*grid.notes, *([physics.sentence(count)] if count else [])))


def conclusion(rows: Sequence[Record]) -> str:
    """TTFT, throughput and its change with context, for each model; who waits; the A/A check."""
    lines = []
    for group in by_setup(rows, "latency"):
        name, whole = group.label, [r for r in group.rows if r.samples.get("e2e_s")]
        tokens = min((r.key["new_tokens"] for r in whole), default=None)
        if tokens is None:
            lines.append(f"{name}: only first tokens were timed, so no throughput is stated.")
            continue
        contexts = {r.key["context"] for r in select(whole, new_tokens=tokens)}
        first, last = (select(group.rows, context=end(contexts)) for end in (min, max))
        parts = {TTFT: "TTFT", OUTPUT: "output throughput", DECODE: "decode alone"}
        values = [f"{what} {wording.number(m.of(last), m.unit)}" for m, what in parts.items()]
        lines.append(
            f"{name} at {max(contexts)} tokens of context and {tokens} new tokens: "
            f"{'; '.join(values)}."
        )
        if len(contexts) > 1:
            ratio, title = OUTPUT.ratio(last, first), OUTPUT.lead
            where = (f"{name} at {max(contexts)}", f"{min(contexts)} tokens")
            lines.append(wording.compared(f"{title} of {where[0]}", {where[1]: ratio}))
    return wording.bullets(
        [*lines, *host_bound.sentences(rows), *_aa_checks(rows), *wording.cautions(rows)]
    )


def aa(rows: Sequence[Record]) -> str:
    """The A/A checks alone."""
    return wording.bullets(_aa_checks(rows) or ["No arm was measured against itself."])


def _aa_checks(rows: Sequence[Record]) -> list[str]:
    return [_aa(group, row) for group in by_setup(rows, "aa") for row in group.rows]


def _aa(group: Group, row: Record) -> str:
    """Whether blocks and halves of one arm look alike, as they must."""
    times_s, where = row.samples["ttft_s"], f"{group.label} at {row.key['context']} tokens"
    share = stats.aa_coverage(times_s)
    if share.value is None:
        return f"A/A check of {where}: not made ({share.reason})."
    held = (
        "as it should be"
        if share.value >= stats.AA_LEAST
        else ("too few, so that intervals of ratios are too narrow for this noise")
    )
    drift = stats.aa_in_order(times_s)
    order = wording.than("", drift)
    if drift.resolved_from(1.0):
        order += (
            ", so that the arm changed while it was measured and small ratios between arms prove "
            "nothing"
        )
    return (
        f"A/A check, TTFT of {where} against itself, n = {len(times_s)}: the interval of the "
        f"ratio contains 1 in {share.value:.0%} of {share.n} pairs of neighbouring blocks, {held}; "
        f"second half against first: {order}."
    )


def formulas() -> Table:
    """Which formula stands behind which name; T is the call's time, t1 its first token's."""
    names = {"name": "title", "formula": "formula", "unit": "unit"}
    lines = [{n: getattr(m, of) for n, of in names.items()} for m in shown_in("crosswalk")]
    return of_lines("formulas", "Formulas", lines)


def definitions_table(rows: Sequence[Record]) -> Table:
    """Every definition on the stamped calls of each model and context: the median over calls."""
    stamped = Rows.of(rows).where(lambda r: r.error or len(_first_call(r)) > 1)
    fields, columns = ("context", "new_tokens"), shown_in("crosswalk")
    return build("crosswalk", "Definitions", stamped, ("itl",), fields, columns)


def _first_call(row: Record) -> Sequence[float]:
    return (row.samples.get("token_s") or [[]])[0]


def throughput(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Output throughput (prefill included) and decode throughput (slope) against context."""
    ax = axes(ax)
    for group in by_setup(rows, "latency"):
        whole = whole_calls(group)
        points_and_line(ax, group, whole, [OUTPUT.of.each(r) for r in whole], ", output")
        contexts = [r.key["context"] for r in whole]
        slopes = [DECODE.of(select(group.rows, context=c)).value for c in contexts]
        if contexts and None not in slopes:
            drawn = {"ls": style(group.place), "color": color(group.model)} | HOLLOW
            ax.plot(contexts, slopes, label=f"{group.label}, decode only", **drawn)
    return labelled(ax, "Throughput against context", CONTEXT, f"throughput ({OUTPUT.unit})")


def ttft(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Time to first token against context."""
    ax = axes(ax)
    for group in by_setup(rows, "latency"):
        ones = with_sample(group, TTFT.of.name, new_tokens=1)
        points_and_line(ax, group, ones, [TTFT.of.each(r) for r in ones])
    return labelled(ax, "Time to first token against context", CONTEXT, TTFT.header)


def token_times(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Inter-token latency along one stamped call per context (the first call of each).

    Of several models or setups, the longest context of each.
    """
    ax = axes(ax)
    groups = [(group, with_sample(group, "token_s")) for group in by_setup(rows, "itl")]
    for group, stamped in groups:
        for row in stamped if len(groups) == 1 else stamped[-1:]:
            gaps = [1e3 * gap for gap in stats.gaps(row.samples["token_s"][0])]
            label, drawn = f"context {row.key['context']}", {}
            if len(groups) > 1:
                label = f"{group.label}, {label}"
                drawn = {"color": color(group.model), "ls": style(group.place)}
            ax.plot(range(2, len(gaps) + 2), gaps, lw=1, label=label, **drawn)
    return labelled(
        ax, "Inter-token latency along a call", "token of the call", METRICS["itl"].header
    )
