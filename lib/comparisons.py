"""Models against each other, within one stack at a time, and what another stack changes.

Statements about the study's stack come first. A ratio never mixes stacks, number formats, sources
of weights or GPUs, unless the stack is the point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lib import stats
from lib.claims import failures
from lib.groups import Group, by_setup, setup_order
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record, environments, machines_differ, require_comparable, select
from lib.show.wording import bullets, cautions, ratio_sentence, short
from lib.stats import Estimate

Shape = tuple[int, int]  # context, new tokens


@dataclass(frozen=True)
class Quantity:
    """What is compared: a sample of a kind of rows; `inverted` where less time is more of it."""

    title: str
    kind: str
    sample: str
    inverted: bool = False

    def groups(self, rows: Sequence[Record]) -> list[Group]:
        """The rows that have it, by model and setup."""
        found = [r for r in rows if r.kind == "environment" or r.samples.get(self.sample)]
        return by_setup(found, self.kind)

    def row(self, group: Group, shape: Shape) -> Record:
        """The last row of a group of a context and length."""
        return select(group.rows, context=shape[0], new_tokens=shape[1])[-1]

    def ratio(self, a: Group, b: Group, shape: Shape) -> Estimate:
        """The quantity of one group over that of another, of the same context and length."""
        a_s, b_s = (self.row(group, shape).samples[self.sample] for group in (a, b))
        return stats.ratio(b_s, a_s) if self.inverted else stats.ratio(a_s, b_s)


QUANTITIES = (
    Quantity("Output throughput", "latency", "e2e_s", inverted=True),
    Quantity("TTFT", "latency", "ttft_s"),
    Quantity("Energy per token", "energy", "energy_j"),
)


def models(rows: Sequence[Record]) -> str:
    """Every model against the first in throughput, TTFT and energy, at the longest common context;
    then what each other stack changes for a model, and what failed.

    Models may differ in their weights' source only where all are labelled; GPU, dtype and stack
    must agree, otherwise the sentence says why nothing is compared.
    """
    lines = [line for quantity in QUANTITIES for line in _between_models(rows, quantity)]
    failed = failures(rows, [quantity.kind for quantity in QUANTITIES])
    return bullets([*lines, *between_stacks(rows), *failed, *cautions(rows)])


def _between_models(rows: Sequence[Record], quantity: Quantity) -> list[str]:
    groups = quantity.groups(rows)
    if len({g.model for g in groups}) < 2:
        return [f"{quantity.title}: fewer than two models measured, so none are compared."]
    alike: dict[tuple[str, ...], list[Group]] = {}
    for group in sorted(groups, key=lambda g: setup_order(g.setup)):
        alike.setdefault(group.but("experts"), []).append(group)
    shared = [
        sorted(mine, key=groups.index)
        for mine in alike.values()
        if len({g.model for g in mine}) > 1
    ]
    envs = environments(rows)
    lines: list[str] = []
    said: dict[tuple, tuple[str, Shape, Estimate]] = {}
    for mine in shared:
        firsts = [g for g in mine if g.model == mine[0].model]
        lines += [
            _pair(quantity, a, b, said, envs) for a in firsts for b in mine if b.model != a.model
        ]
    compared = {g.model for mine in shared for g in mine}
    return lines + _left_out(rows, quantity, groups, compared)


def _left_out(
    rows: Sequence[Record], quantity: Quantity, groups: Sequence[Group], compared: set[str]
) -> list[str]:
    """Why models are compared with none: all of them, or each that is left over."""
    if not compared:
        return [f"{quantity.title}: not compared; {_difference(rows, groups)}."]
    others = [g for g in groups if g.model in compared]
    return [
        f"{quantity.title} of {g.label}: not compared; {_difference(rows, [*others, g])}."
        for g in groups
        if g.model not in compared
    ]


def _difference(rows: Sequence[Record], groups: Sequence[Group]) -> str:
    try:
        require_comparable([g.rows[-1] for g in groups], environments(rows))
    except ValueError as error:
        return str(error)
    return "they share no setup"


def _pair(
    quantity: Quantity,
    a: Group,
    b: Group,
    said: dict[tuple, tuple[str, Shape, Estimate]],
    envs: dict[str, dict[str, Any]],
) -> str:
    """One model against another; on a further stack, whether that changes the order."""
    common = _shapes(a) & _shapes(b)
    if not common:
        return f"{quantity.title}: {a.label} and {b.label} share no context and length."
    pair = (a.model, a.but("stack"), b.model, b.but("stack"))
    stack, shape, before = said.get(pair, ("", None, None))
    shape = shape if shape in common else _longest(common)
    ratio = quantity.ratio(a, b, shape)
    what = f"At {shape[0]} tokens, {_lower_first(quantity.title)}"
    sentence = ratio_sentence(a.label, b.label, what, ratio)
    if machines_differ([quantity.row(group, shape) for group in (a, b)], envs):
        sentence = f"{sentence[:-1]}; measured on different machines."
    if not before:
        said[pair] = (a.of("stack"), shape, ratio)
        return sentence
    if said[pair][1] != shape or None in (ratio.resolved_from(), before.resolved_from()):
        return sentence
    return f"{sentence[:-1]}; on {stack} {short(before.value)} times: {_change(before, ratio)}."


def _change(before: Estimate, after: Estimate) -> str:
    if not (before.resolved_from() and after.resolved_from()):
        same = before.resolved_from() == after.resolved_from()
        return "resolved on neither" if same else "resolved on one of the two stacks only"
    return "the order holds" if (before.value > 1) == (after.value > 1) else "the order turns round"


def between_stacks(rows: Sequence[Record]) -> list[str]:
    """Each model on each further stack against itself on the study's, all else being equal."""
    found: dict[str, list[str]] = {}
    for quantity in QUANTITIES:
        groups = quantity.groups(rows)
        study = {(g.model, g.but("stack")): g for g in groups if g.of("stack") == STUDY_STACK}
        for group in groups:
            base = study.get((group.model, group.but("stack")))
            common = _shapes(group) & _shapes(base) if base else set()
            if common and base is not group:
                shape = _longest(common)
                times = _times(quantity.ratio(group, base, shape))
                found.setdefault(group.label, []).append(
                    f"{_lower_first(quantity.title)} at {shape[0]} tokens {times}"
                )
    return [f"{label} against {STUDY_STACK}: {'; '.join(parts)}." for label, parts in found.items()]


def _times(ratio: Estimate) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{short(ratio.value)} times, without an interval ({ratio.reason})"
    ends = f"[{short(ratio.low)}, {short(ratio.high)}]"
    if not ratio.resolved_from():
        return f"no difference resolved ({ends})"
    return f"{short(ratio.value)} times {ends}"


def _shapes(group: Group) -> set[Shape]:
    return {(r.key["context"], r.key["new_tokens"]) for r in group.rows}


def _longest(shapes: set[Shape]) -> Shape:
    """The longest context, and there the fewest new tokens."""
    return max(shapes, key=lambda shape: (shape[0], -shape[1]))


def _lower_first(text: str) -> str:
    return text if text.isupper() else text[0].lower() + text[1:]
