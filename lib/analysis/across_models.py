"""Models against each other, within one stack at a time, and what another stack changes.

Statements about the study's stack come first. A ratio never mixes stacks, number formats, sources
of weights or GPUs, unless the stack is the point.
"""

from __future__ import annotations

from collections.abc import Sequence

from lib.analysis import stacks
from lib.analysis.metrics import BETWEEN_MODELS, Metric, Shape, longest
from lib.analysis.rows import Rows
from lib.analysis.setups import Group, failures, setup_order
from lib.records.record import Record, machines_differ, require_comparable, shared_gpu
from lib.show.wording import bullets, cautions, compared, short
from lib.stats import Estimate


def models(rows: Sequence[Record]) -> str:
    """Every model against the first in throughput, TTFT and energy, at the longest common context;
    then what each other stack changes for a model, and what failed.

    Models may differ in their weights' source only where all are labelled; GPU, dtype and stack
    must agree, otherwise the sentence says why nothing is compared.
    """
    rows = Rows.of(rows)
    lines = [line for metric in BETWEEN_MODELS for line in _between_models(rows, metric)]
    failed = failures(rows, list(dict.fromkeys(metric.kinds[0] for metric in BETWEEN_MODELS)))
    return bullets([*lines, *stacks.between_stacks(rows), *failed, *cautions(rows)])


def _between_models(rows: Rows, metric: Metric) -> list[str]:
    groups = metric.groups(rows)
    if len({g.model for g in groups}) < 2:
        return [f"{metric.lead}: fewer than two models measured, so none are compared."]
    alike: dict[tuple[str, ...], list[Group]] = {}
    for group in sorted(groups, key=lambda g: setup_order(g.setup)):
        alike.setdefault(group.but("experts"), []).append(group)
    shared = [
        sorted(mine, key=groups.index)
        for mine in alike.values()
        if len({g.model for g in mine}) > 1
    ]
    lines: list[str] = []
    earlier: dict[tuple, tuple[str, Shape, Estimate]] = {}
    for mine in shared:
        firsts = [g for g in mine if g.model == mine[0].model]
        lines += [
            _pair(metric, a, b, earlier, rows) for a in firsts for b in mine if b.model != a.model
        ]
    compared = {g.model for mine in shared for g in mine}
    return lines + _left_out(rows, metric, groups, compared)


def _left_out(rows: Rows, metric: Metric, groups: Sequence[Group], compared: set[str]) -> list[str]:
    """Why models are compared with none: all of them, or each that is left over."""
    if not compared:
        return [f"{metric.lead}: not compared; {_difference(rows, groups)}."]
    others = [g for g in groups if g.model in compared]
    return [
        f"{metric.lead} of {g.label}: not compared; {_difference(rows, [*others, g])}."
        for g in groups
        if g.model not in compared
    ]


def _difference(rows: Rows, groups: Sequence[Group]) -> str:
    try:
        require_comparable([g.rows[-1] for g in groups], rows.environments)
    except ValueError as error:
        return str(error)
    return "they share no setup"


def _pair(
    metric: Metric,
    a: Group,
    b: Group,
    earlier: dict[tuple, tuple[str, Shape, Estimate]],
    rows: Rows,
) -> str:
    """One model against another; on a further stack, whether that changes the order."""
    common = metric.shapes(a) & metric.shapes(b)
    if not common:
        return f"{metric.lead}: {a.label} and {b.label} share no context and length."
    pair = (a.model, a.but("stack"), b.model, b.but("stack"))
    stack, shape, before = earlier.get(pair, ("", None, None))
    shape = shape if shape in common else longest(common)
    arms = [metric.arm(group, shape) for group in (a, b)]
    if reason := shared_gpu([row for arm in arms for row in arm], rows.environments):
        return f"{metric.lead}: {a.label} and {b.label} are not compared; {reason}."
    ratio = metric.ratio(*arms)
    what = f"At {shape[0]} tokens, {metric.title} of {a.label}"
    sentence = compared(what, {b.label: ratio})
    if machines_differ([arm[-1] for arm in arms], rows.environments):
        sentence = f"{sentence[:-1]}; measured on different machines."
    if not before:
        earlier[pair] = (a.of("stack"), shape, ratio)
        return sentence
    if earlier[pair][1] != shape or None in (ratio.resolved_from(), before.resolved_from()):
        return sentence
    return f"{sentence[:-1]}; on {stack} {short(before.value)} times: {_change(before, ratio)}."


def _change(before: Estimate, after: Estimate) -> str:
    if not (before.resolved_from() and after.resolved_from()):
        same = before.resolved_from() == after.resolved_from()
        return "resolved on neither" if same else "resolved on one of the two stacks only"
    return "the order holds" if (before.value > 1) == (after.value > 1) else "the order turns round"
