"""What growing batches show, as a table and in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lib import stats
from lib.analysis import bounds
from lib.analysis.batch import points
from lib.analysis.batch.points import FIELDS, GAIN, KINDS, RULE, Point
from lib.analysis.energy import quantities
from lib.analysis.gates import in_part
from lib.analysis.setups import build
from lib.records.record import Record
from lib.show.table import Column, Table, of_lines, without_empty
from lib.show.wording import bullets, cautions, number, short
from lib.stats import Estimate

NOTES = (
    RULE,
    "throughput, TPOT and energy of decoding are slopes over new tokens, without the prefill; the "
    "whole call has it",
    "experts: distinct ones of a layer in one step, traced, means over layers; MBU with the bytes "
    "of the chosen (useful) and of the read ones (realised)",
    quantities.BOUNDARY,
)
COLUMNS = (
    Column("throughput of all", "tok/s"), Column("of each user", "tok/s"), Column("TPOT", "ms"),
    Column("J/1K tokens, decode", "J"), Column("tokens per joule, decode", "1/J"),
    Column("J/1K tokens, whole call", "J"),
    Column("experts chosen"), Column("experts read"),
    Column("useful MBU, measured"), Column("realised MBU, measured"),
    Column("useful MBU, datasheet"), Column("realised MBU, datasheet"),
    Column("remark", numeric=False),
)  # fmt: skip


def expected(card: Any, context: int, sizes: Sequence[int], bytes_per_s: float) -> Table:
    """Before measuring: for each batch what a step reads, and the throughput of all it allows.

    Experts are those to expect of a router that chooses evenly.
    """
    lines = []
    for batch in sizes:
        step = bounds.counted(partial(card.decode_bytes, context, batch))
        bound = stats.inverse(step, batch * bytes_per_s)
        chosen = {"experts of a layer": card.experts_touched(batch)} if card.experts else {}
        cells = {"a step reads (GB)": stats.scaled(step, 1e-9), "bound of all (tok/s)": bound}
        lines.append({"batch": batch, **chosen, **cells})
    return of_lines("batch-expected", "The bound before measuring", lines)


def table(rows: Sequence[Record]) -> Table:
    """Per model, setup, context and batch; columns without any value leave a note instead."""
    pairs = points.pointed(rows)
    by_group = {id(group[0]): point for point, group in pairs}
    lines = points.by_line(list(by_group.values()))
    knees = {where: points.knee(line).batch for where, line in lines.items()}
    arms = [r for _, group in pairs for r in group]
    envs = [r for r in rows if r.kind == "environment"]
    grid = build(
        "batch",
        "Batch",
        [*envs, *arms],
        KINDS,
        FIELDS,
        COLUMNS,
        lambda group: _cells(by_group[id(group[0])], knees),
    )
    notes = (*grid.notes, *NOTES, *in_part(rows)) if grid.rows else ()
    return without_empty(replace(grid, notes=notes))


def _cells(point: Point, knees: dict[tuple, int | None]) -> Sequence[Any]:
    failed = point.per_user if point.error else None
    return (
        point.total,
        point.per_user,
        stats.inverse(point.per_user, 1e3),
        stats.scaled(point.token_j, 1e3),
        point.tokens_per_j,
        stats.scaled(point.call_token_j, 1e3),
        *(failed or point.experts(name) for name in ("chosen", "touched")),
        *(
            failed or point.mbu(realised=realised, datasheet=datasheet)
            for datasheet in (False, True)
            for realised in (False, True)
        ),
        point.error or _remark(point, knees[point.line] == point.batch),
    )


def _remark(point: Point, knee: bool) -> str:
    lead = "" if point.gated else "lead: logits not checked at this batch"
    return "; ".join(filter(None, ("knee" if knee else "", lead)))


def tables(rows: Sequence[Record]) -> list[Table]:
    """The table, where any batch was tried."""
    return [grid] if (grid := table(rows)).rows else []


def conclusion(rows: Sequence[Record]) -> str:
    """Each line from one user to the most: throughput, knee, energy, experts, and the front."""
    batches = points.points(rows)
    lines = points.by_line(batches)
    labels = {where: name.label for where, name in points.names(lines).items()}
    sentences = [text for where, line in lines.items() for text in _line(labels[where], line)]
    sentences += [*_front(batches, labels), f"{RULE[:1].upper()}{RULE[1:]}."]
    return bullets([*sentences, *cautions(rows)])


def _line(name: str, line: Sequence[Point]) -> list[str]:
    successes = [p for p in line if p.total.value is not None]
    failures = [f"{name}, batch {p.batch}: {p.error}." for p in line if p.error]
    failures += [
        f"{name}, batch {p.batch}: {p.total.reason}."
        for p in line
        if not p.error and p.total.value is None
    ]
    if not successes:
        return failures
    first, best = successes[0], max(successes, key=lambda p: p.total.value)
    speed = (
        f"{name} at {first.context:,} tokens of context: at batch {first.batch} "
        f"{number(first.total, 'tok/s')}"
    )
    if best is not first:
        speed += (
            f"; the most, at batch {best.batch}, {number(best.total, 'tok/s')} in all and "
            f"{short(best.per_user.value)} for each user"
        )
    bend = points.knee(line)
    verdict = bend.reason or (
        f"batch {bend.batch}: doubling it raised the throughput {short(bend.gain.value)} times"
        f"{_unresolved(bend.gain)}"
    )
    return [
        f"{speed}.",
        f"{name}, knee: {verdict}.",
        *_energy(name, successes),
        *_bytes(name, successes),
        *failures,
    ]


def _unresolved(gain: Estimate) -> str:
    if gain.resolved_from(GAIN) is not False:
        return ""
    return f", which is not resolved from {GAIN:g} ([{short(gain.low)}, {short(gain.high)}])"


def _energy(name: str, successes: Sequence[Point]) -> list[str]:
    metered = [p for p in successes if p.token_j.value is not None]
    ends = dict.fromkeys((metered[0].batch, metered[-1].batch)) if metered else ()
    values = [f"at batch {p.batch} {number(p.token_j, 'J')}" for p in metered if p.batch in ends]
    return [f"{name}, a decoded token: {'; '.join(values)} (GPU board, gross)."] if values else []


def _bytes(name: str, successes: Sequence[Point]) -> list[str]:
    parts = []
    for point in (*successes[:1], *successes[1:][-1:]):
        useful, real = (point.mbu(realised=which).value for which in (False, True))
        count = point.experts("touched").value
        facts = [
            f"a step reads {short(count)} experts of a layer" if count else "",
            f"useful MBU {useful:.0%}" if useful else "",
            f"realised {real:.0%}" if real else "",
        ]
        if any(facts):
            parts.append(f"at batch {point.batch} {', '.join(filter(None, facts))}")
    return [f"{name}: {'; '.join(parts)} (MBU of the measured bandwidth)."] if parts else []


def _front(batches: Sequence[Point], labels: dict[tuple, str]) -> list[str]:
    best = points.front(batches)
    if not best:
        return []
    choices = [
        f"{labels[line]}, batch {', '.join(str(p.batch) for p in mine)}"
        for line, mine in points.by_line(best).items()
    ]
    return [
        f"Not dominated in speed for a user and in energy, among the choices for one model: "
        f"{'; '.join(choices)}."
    ]
