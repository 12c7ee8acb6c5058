"""What one change at a time does to a call: table, figure, conclusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes

from lib import stats
from lib.analysis.rows import SETUP, Rows, objections
from lib.analysis.setups import by_setup, sampled, setups
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record, record_id
from lib.show import wording
from lib.show.figure import axes, color, labelled
from lib.show.table import Column, Table
from lib.stats import Estimate

BASE_ARMS = {"decoding": "greedy", "precision": "bfloat16", "stack": STUDY_STACK}
# The field of the key that an ablation changes, in the order of the tables.
CHANGED = {
    "decoding": "decoding", "context": "context", "precision": "dtype", "experts": "experts",
    "stack": "stack",
}  # fmt: skip
WARNS = "a row warns of "
SENTENCE_ORDER = ("decoding", "context", "stack", "experts", "precision")


def table(rows: Sequence[Record], name: str) -> Table:
    """One-change arms against their base arm: time, throughput, ratio of throughput, verdict.

    `name` is decoding, context, precision, experts or stack. The base arm is greedy, bfloat16 or
    hf-eager, the shortest context, or the first arm where none of these is among the rows.
    """
    kind, changed = f"ablation-{name}", CHANGED[name]
    groups = by_setup(rows, kind, without=(changed,), failed=True)
    differ = [f for f in SETUP if len({g.of(f) for g in groups}) > 1]
    built = []
    for group in groups:
        arms = list(group.rows)
        if name == "context":
            arms.sort(key=lambda r: r.key.get("context") or 0)
        base = next((r for r in arms if r.key.get(changed) == BASE_ARMS.get(name)), arms[0])
        setup = [group.of(f) for f in differ]
        built += [_ablation_row(row, base, changed, setup) for row in arms]
    columns = (
        Column("model", numeric=False),
        *(Column(f, numeric=False) for f in differ),
        Column(changed, numeric=False),
        Column("p50", "s"),
        Column("output throughput", "tok/s"),
        Column("throughput / base arm"),
        Column("verdict", numeric=False),
    )
    arms = [r for r in rows if r.kind == kind]
    _, notes = setups(arms, Rows.of(rows))
    fixed = _fixed(arms, [f for f in ("context", "new_tokens", "decoding") if f != changed])
    return Table(kind, f"Ablation: {name}", columns, tuple(built), (*fixed, *notes))


def _ablation_row(row: Record, base: Record, changed: str, setup: Sequence[str]) -> tuple[Any, ...]:
    arm, time_s = row.key.get(changed), sampled([row], "e2e_s")
    rate = stats.inverse(time_s, row.key.get("new_tokens") or 1)
    start = (row.key.get("model"), *setup, arm, time_s, rate)
    if time_s.value is None:
        return (*start, stats.missing(time_s.reason), time_s.reason)
    if row is base:
        return (*start, Estimate(1.0, n=rate.n, method="the base arm"), "base arm")
    ratio = replace(
        stats.ratio(base.samples.get("e2e_s") or [], row.samples["e2e_s"]),
        records=(record_id(row), record_id(base)),
    )
    if codes := objections([row, base]):
        return (*start, ratio, f"not judged: {WARNS}{codes}")
    return (*start, ratio, wording.verdict(ratio, "faster", "slower"))


def _fixed(rows: Sequence[Record], fields: Sequence[str]) -> list[str]:
    shared = {f: {r.key.get(f) for r in rows} for f in fields}
    text = [f"{f.replace('_', ' ')} {next(iter(v))}" for f, v in shared.items() if len(v) == 1]
    return [", ".join(text)] if text else []


def conclusion(rows: Sequence[Record]) -> str:
    """Each arm against the first of its ablation that worked: throughput ratio, or its error."""
    lines = []
    for name in SENTENCE_ORDER:
        field = CHANGED[name]
        groups = by_setup(rows, f"ablation-{name}", without=(field,), failed=True)
        for group in groups:
            of = f" of {group.label}" if len(groups) > 1 else ""
            worked = [r for r in group.rows if not r.error]
            for row in group.rows:
                title = f"{field} {row.key.get(field)}{of}"
                if row.error:
                    lines.append(f"{title} failed: {row.error}.")
                elif row is not worked[0]:
                    ratio = stats.ratio(worked[0].samples["e2e_s"], row.samples["e2e_s"])
                    if codes := objections([worked[0], row]):
                        ratio = replace(ratio, low=None, high=None, reason=f"{WARNS}{codes}")
                    reference = str(worked[0].key.get(field))
                    lines.append(
                        wording.compared(f"Output throughput of {title}", {reference: ratio})
                    )
            if len(worked) < 2:
                lines.append(f"{name}{of}: {len(worked)} arm(s) ran, so nothing is compared.")
        if not groups:
            lines.append(f"{name}: 0 arm(s) ran, so nothing is compared.")
    return wording.bullets([*lines, *wording.cautions(rows)])


def figure(rows: Sequence[Record], field: str, ax: Axes | None = None) -> Axes:
    """Output throughput of each arm; an arm that failed says so in its place."""
    kinds = list(dict.fromkeys(r.kind for r in rows if r.kind.startswith("ablation")))
    groups = by_setup(rows, kinds, without=(field,), failed=True)
    arms = [(group, row) for group in groups for row in group.rows]
    ax = axes(ax, figsize=(7.2, 1.2 + 0.4 * len(arms)))
    names = [f"{f'{g.label}, ' if len(groups) > 1 else ''}{r.key.get(field)}" for g, r in arms]
    for place, (_, row) in enumerate(arms):
        if row.error:
            ax.text(
                0.02,
                place,
                f"failed: {row.error[:70]}",
                va="center",
                fontsize=8,
                transform=ax.get_yaxis_transform(),
            )
            continue
        speeds = [row.key["new_tokens"] / t for t in row.samples["e2e_s"]]
        ax.plot(speeds, [place] * len(speeds), "o", ms=4, alpha=0.35, color=color(row.key["model"]))
        ax.plot(
            stats.median(speeds).value,
            place,
            "|",
            ms=18,
            mew=2,
            color=color(row.key["model"]),
            label=names[place],
        )
    ax.set_yticks(range(len(names)), names)
    labelled(ax, f"Ablation: {field}", "output throughput (tokens per second)", "", legend=False)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.set_xlim(left=0)
    return ax
