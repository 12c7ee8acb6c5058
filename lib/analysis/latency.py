"""How fast calls are: TTFT, throughput and ITL as table, figures and sentences, the A/A check, and
what the definitions of other tools make of the same token stamps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes

from lib import stats
from lib.analysis import host_bound, metrics
from lib.analysis.metrics import _itl_ms, decode_tok_per_s
from lib.analysis.setups import Group, build, by_setup, points_and_line, sampled, with_sample
from lib.records.record import Record, select
from lib.show import wording
from lib.show.figure import HOLLOW, axes, color, labelled, style
from lib.show.table import Column, Table, of_lines


def table(rows: Sequence[Record]) -> Table:
    """TTFT, end-to-end time, output and decode throughput, ITL: per model and context."""
    greedy = [r for r in rows if r.key.get("decoding") in ("greedy", None)]
    marked = any(r.kind == "latency" and r.samples.get("decode_s") for r in greedy)

    def cells(group: list[Record]) -> Sequence[Any]:
        calls = [r for r in group if r.kind == "latency"]
        failed = [r for r in calls if r.error]
        main = min((n for r in calls if (n := r.key.get("new_tokens") or 1) > 1), default=1)
        ones = select(calls, new_tokens=1) or failed
        whole = select(calls, new_tokens=main) or failed
        e2e = sampled(whole, "e2e_s", factor=1e3)
        gaps = [
            gap
            for r in group
            if r.kind == "itl"
            for call in r.samples.get("token_s", ())
            for gap in stats.gaps(call)
        ]
        return (
            sampled(ones, "ttft_s", factor=1e3),
            main,
            e2e,
            sampled(whole, "e2e_s", 95, 1e3),
            stats.inverse(e2e, main * 1e3),
            metrics.decode_tok_per_s(group),
            *([metrics.marked_tok_per_s(group)] if marked else []),
            _itl_ms(group, gaps),
        )

    columns = [
        Column("TTFT", "ms"),
        Column("new tokens", numeric=False),
        Column("p50", "ms"),
        Column("p95 or max of n", "ms"),
        Column("output throughput", "tok/s"),
        Column("decode throughput", "tok/s"),
        *([Column("decode by device clock", "tok/s")] if marked else []),
        Column("ITL", "ms"),
    ]
    grid = build(
        "latency",
        "Latency and throughput",
        greedy,
        ("latency", "itl"),
        ("context",),
        columns,
        cells,
    )
    return replace(grid, notes=(*grid.notes, *_slower_when_longer(grid)))


def _slower_when_longer(table: Table) -> list[str]:
    """What no prefill can cause: a token takes more time in long calls than in short ones."""
    titles = [column.title for column in table.columns]
    whole, decode = (titles.index(f"{what} throughput") for what in ("output", "decode"))
    rates = [(row[whole].value, row[decode].value) for row in table.rows]
    slower = sum(None not in pair and pair[1] < pair[0] for pair in rates)
    note = (
        f"decode throughput below output throughput in {slower} of {len(rates)} rows: long "
        "calls took more for a token, which no prefill causes; the host did not keep its speed"
    )
    return [note] if slower else []


def conclusion(rows: Sequence[Record]) -> str:
    """TTFT, throughput and its change with context, for each model; who waits; the A/A check."""
    lines = []
    for group in by_setup(rows, "latency"):
        name, whole = group.label, [r for r in group.rows if r.samples.get("e2e_s")]
        tokens = min((r.key["new_tokens"] for r in whole), default=None)
        if tokens is None:
            lines.append(f"{name}: only first tokens were timed, so no throughput is stated.")
            continue
        headline = {r.key["context"]: r for r in select(whole, new_tokens=tokens)}
        first, last = min(headline), max(headline)
        output = stats.inverse(stats.median(headline[last].samples["e2e_s"]), tokens)
        at = select(group.rows, context=last)
        ones = [r.samples["ttft_s"] for r in select(at, new_tokens=1) if r.samples.get("ttft_s")]
        first_token = stats.median(ones[0]) if ones else stats.missing("no arm")
        decode = wording.number(decode_tok_per_s(at), "tok/s")
        lines.append(
            f"{name} at {last} tokens of context and {tokens} new tokens: TTFT "
            f"{wording.number(stats.scaled(first_token, 1e3), 'ms')}; output throughput "
            f"{wording.number(output, 'tok/s')}; decode alone {decode}."
        )
        if first != last:
            ratio = stats.ratio(*(headline[c].samples["e2e_s"] for c in (first, last)))
            lines.append(
                wording.compared(
                    f"Output throughput of {name} at {last}", {f"{first} tokens": ratio}
                )
            )
    return wording.bullets(
        [*lines, *host_bound.sentences(rows), *_aa_checks(rows), *wording.cautions(rows)]
    )


def aa(rows: Sequence[Record]) -> str:
    """The A/A checks alone."""
    return wording.bullets(_aa_checks(rows) or ["No arm was measured against itself."])


def _aa_checks(rows: Sequence[Record]) -> list[str]:
    return [_aa(group, row) for group in by_setup(rows, "aa") for row in group.rows]


def _aa(group: Group, row: Record) -> str:
    """Whether two halves of one arm look alike, as they must: in random order, and as measured."""
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
        f"ratio contains 1 in {share.value:.0%} of {share.n} random halvings, {held}; second "
        f"half against first: {order}."
    )


@dataclass(frozen=True)
class Definition:
    """How a tool turns a call's token stamps (s since its start) and duration into a number."""

    name: str
    formula: str
    unit: str
    of: Callable[[Sequence[float], float], float]


DEFINITIONS = (
    Definition("paper TPOT", "g / T", "tok/s", lambda stamps, end_s: len(stamps) / end_s),
    Definition("GuideLLM TPOT", "T / g", "ms", lambda stamps, end_s: 1e3 * end_s / len(stamps)),
    Definition("vLLM TPOT, AIPerf ITL", "(T - t1) / (g - 1)", "ms",
               lambda stamps, end_s: 1e3 * (end_s - stamps[0]) / (len(stamps) - 1)),
    Definition("vLLM ITL", "median of t[i+1] - t[i]", "ms",
               lambda stamps, end_s: 1e3 * statistics.median(stats.gaps(stamps))),
    Definition("nearest to llama-bench tg", "(g - 1) / (T - t1)", "tok/s",
               lambda stamps, end_s: (len(stamps) - 1) / (end_s - stamps[0])),
)  # fmt: skip


def formulas() -> Table:
    """Which formula stands behind which name; T is the call's time, t1 its first token's."""
    lines = [{"name": d.name, "formula": d.formula, "unit": d.unit} for d in DEFINITIONS]
    return of_lines("formulas", "Formulas", lines)


def definitions_table(rows: Sequence[Record]) -> Table:
    """Every definition on the stamped calls of each model and context: the median over calls."""

    def cells(group: list[Record]) -> list[stats.Estimate]:
        row = group[-1]
        stamps, ends_s = (row.samples.get(name) or [] for name in ("token_s", "e2e_s"))
        if row.error or not stamps or len(stamps) != len(ends_s):
            why = f"failed: {row.error}" if row.error else "not measured: no time of the call"
            return [stats.missing(why)] * len(DEFINITIONS)
        calls = list(zip(stamps, ends_s, strict=True))
        return [stats.median([d.of(stamps, end_s) for stamps, end_s in calls]) for d in DEFINITIONS]

    stamped = [r for r in rows if r.kind == "environment" or r.error or len(_first_call(r)) > 1]
    columns = [Column(d.name, d.unit) for d in DEFINITIONS]
    return build(
        "crosswalk", "Definitions", stamped, ("itl",), ("context", "new_tokens"), columns, cells
    )


def _first_call(row: Record) -> Sequence[float]:
    return (row.samples.get("token_s") or [[]])[0]


def throughput(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Output throughput (prefill included) and decode throughput (slope) against context."""
    ax = axes(ax)
    for group in by_setup(rows, "latency"):
        lengths = [r.key["new_tokens"] for r in group.rows if r.samples.get("e2e_s")]
        whole = with_sample(group, "e2e_s", new_tokens=min(lengths, default=0))
        speeds = [[min(lengths) / t for t in r.samples["e2e_s"]] for r in whole]
        points_and_line(ax, group, whole, speeds, ", output")
        contexts = [r.key["context"] for r in whole]
        slopes = [
            metrics.decode_tok_per_s([r for r in group.rows if r.key["context"] == c]).value
            for c in contexts
        ]
        if contexts and None not in slopes:
            ax.plot(
                contexts,
                slopes,
                ls=style(group.place),
                color=color(group.model),
                label=f"{group.label}, decode only",
                **HOLLOW,
            )
    return labelled(ax, "Throughput against context", "context (tokens)", "tokens per second")


def ttft(rows: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Time to first token against context."""
    ax = axes(ax)
    for group in by_setup(rows, "latency"):
        ones = with_sample(group, "ttft_s", new_tokens=1)
        points_and_line(ax, group, ones, [[1e3 * t for t in r.samples["ttft_s"]] for r in ones])
    return labelled(ax, "Time to first token against context", "context (tokens)", "TTFT (ms)")


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
    return labelled(ax, "Inter-token latency along a call", "token of the call", "ITL (ms)")
