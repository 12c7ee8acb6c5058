"""What growing batches show, as a table and in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lib import stats
from lib.analysis.batch import points
from lib.analysis.batch.points import FIELDS, GAIN, KINDS, RULE, Point
from lib.analysis.energy import quantities
from lib.analysis.setups import build
from lib.models import card as models_card
from lib.models.card import computed
from lib.records.record import Record
from lib.show.table import Column, Shown, Table, without_empty
from lib.show.wording import bullets, cautions, number, rounded, short
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


def expected(card: Any, context: int, sizes: Sequence[int], bytes_per_s: float) -> Shown:
    """Before measuring: for each batch what a step reads, and the throughput of all it allows.

    Experts are those to expect of a router that chooses evenly.
    """
    made = []
    for batch in sizes:
        found, missing = computed(step=partial(card.decode_bytes, context, batch))
        step = found.get("step")
        bound = step and batch * models_card.bound_tok_per_s(step, bytes_per_s)
        made.append(
            {
                "batch": batch,
                **(
                    {"experts of a layer": rounded(card.experts_touched(batch))}
                    if card.experts
                    else {}
                ),
                "a step reads (GB)": step and rounded(step / 1e9),
                "bound of all (tok/s)": bound and rounded(bound),
            }
            | missing
        )
    return Shown(made).set_index("batch")


def table(rows: Sequence[Record]) -> Table:
    """Per model, setup, context and batch; columns without any value leave a note instead."""
    pairs = points.pointed(rows)
    found = {id(group[0]): point for point, group in pairs}
    lines = points.by_line(list(found.values()))
    knees = {where: points.knee(line).batch for where, line in lines.items()}
    arms = [r for _, group in pairs for r in group]
    envs = [r for r in rows if r.kind == "environment"]
    made = build(
        "batch",
        "Batch",
        [*envs, *arms],
        KINDS,
        FIELDS,
        COLUMNS,
        lambda group: _cells(found[id(group[0])], knees),
    )
    notes = (*made.notes, *NOTES) if made.rows else ()
    return without_empty(Table(made.name, made.title, made.columns, made.rows, notes))


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
        point.error or ("knee" if knees[point.line] == point.batch else ""),
    )


def tables(rows: Sequence[Record]) -> list[Table]:
    """The table, where any batch was tried."""
    return [made] if (made := table(rows)).rows else []


def conclusion(rows: Sequence[Record]) -> str:
    """Each line from one user to the most: throughput, knee, energy, experts, and the front."""
    found = points.points(rows)
    lines = points.by_line(found)
    labels = {where: name.label for where, name in points.names(lines).items()}
    said = [sentence for where, mine in lines.items() for sentence in _line(labels[where], mine)]
    return bullets(
        [*said, *_front(found, labels), f"{RULE[:1].upper()}{RULE[1:]}.", *cautions(rows)]
    )


def _line(name: str, line: Sequence[Point]) -> list[str]:
    known = [p for p in line if p.total.value is not None]
    said = [f"{name}, batch {p.batch}: {p.error}." for p in line if p.error]
    said += [
        f"{name}, batch {p.batch}: {p.total.reason}."
        for p in line
        if not p.error and p.total.value is None
    ]
    if not known:
        return said
    first, best = known[0], max(known, key=lambda p: p.total.value)
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
    told = bend.reason or (
        f"batch {bend.batch}: doubling it raised the throughput {short(bend.gain.value)} times"
        f"{_unresolved(bend.gain)}"
    )
    return [
        f"{speed}.",
        f"{name}, knee: {told}.",
        *_energy(name, known),
        *_bytes(name, known),
        *said,
    ]


def _unresolved(gain: Estimate) -> str:
    if gain.resolved_from(GAIN) is not False:
        return ""
    return f", which is not resolved from {GAIN:g} ([{short(gain.low)}, {short(gain.high)}])"


def _energy(name: str, known: Sequence[Point]) -> list[str]:
    metered = [p for p in known if p.token_j.value is not None]
    ends = dict.fromkeys((metered[0].batch, metered[-1].batch)) if metered else ()
    said = [f"at batch {p.batch} {number(p.token_j, 'J')}" for p in metered if p.batch in ends]
    return [f"{name}, a decoded token: {'; '.join(said)} (GPU board, gross)."] if said else []


def _bytes(name: str, known: Sequence[Point]) -> list[str]:
    said = []
    for point in (*known[:1], *known[1:][-1:]):
        useful, real = (point.mbu(realised=which).value for which in (False, True))
        read = point.experts("touched").value
        told = [
            f"a step reads {short(read)} experts of a layer" if read else "",
            f"useful MBU {useful:.0%}" if useful else "",
            f"realised {real:.0%}" if real else "",
        ]
        if any(told):
            said.append(f"at batch {point.batch} {', '.join(filter(None, told))}")
    return [f"{name}: {'; '.join(said)} (MBU of the measured bandwidth)."] if said else []


def _front(found: Sequence[Point], labels: dict[tuple, str]) -> list[str]:
    best = points.front(found)
    if not best:
        return []
    said = [
        f"{labels[line]}, batch {', '.join(str(p.batch) for p in mine)}"
        for line, mine in points.by_line(best).items()
    ]
    return [
        f"Not dominated in speed for a user and in energy, among the choices for one model: "
        f"{'; '.join(said)}."
    ]
