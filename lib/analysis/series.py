"""The rows that stand for a published model: those of one configuration, and samples and ratios of
its arms; where there are none, the reason."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib import stats
from lib.analysis.setups import values_of
from lib.records.record import Record, record_id, require_comparable, select
from lib.stats import Estimate

BASE_KINDS = ("latency", "memory-paper", "energy", "card")


@dataclass(frozen=True)
class Series:
    """The rows of one model in one configuration; `reason` says why it lacks rows."""

    rows: tuple[Record, ...] = ()
    reason: str = ""

    def one(self, kind: str, **key: Any) -> Record | None:
        """The last row of a kind with these key fields."""
        return next(reversed(select(self.rows, kind, **key)), None)

    def label(self, kind: str | None = None) -> str:
        """What the numbers were measured with: weights, experts, stack, dtype."""
        row = next((r for r in self.rows if kind in (None, r.kind) and r.key.get("stack")), None)
        if row is None:
            return ""
        experts = row.key.get("experts") or "none"
        parts = [f"{row.key.get('weights')} weights", row.key["stack"], str(row.key.get("dtype"))]
        return ", ".join(parts + ([f"experts {experts}"] if experts != "none" else []))


def configuration(
    rows: Sequence[Record],
    envs: dict[str, dict[str, Any]],
    published: dict[str, Any],
    kinds: Sequence[str],
    free: Sequence[str] = (),
) -> Series:
    """Rows of the given kinds that share GPU, weights, dtype, stack and experts.

    Stack and dtype must be the paper's. Among several sets the one with the most arms is taken,
    then checkpoint weights before random ones; `free` names what the arms are meant to change.
    """
    fields = [f for f in ("weights", "dtype", "stack", "experts") if f not in free]
    setup = {f: published[f] for f in ("dtype", "stack") if f not in free}
    groups: dict[tuple, list[Record]] = {}
    dtype = setup.get("dtype")  # other formats of a model have cards of their own
    cards = [
        r
        for r in rows
        if r.kind == "card" and (dtype is None or r.key.get("dtype") in (None, dtype))
    ]
    for row in rows:
        key = row.key
        if row.kind not in kinds or row.kind == "card" or key.get("batch", 1) not in (1, None):
            continue
        if any(key.get(name) != value for name, value in setup.items()):
            continue
        if row.kind in BASE_KINDS and key.get("decoding") not in ("greedy", None):
            continue
        gpu = envs.get(row.env_id or "", {}).get("gpu")
        groups.setdefault((str(gpu), *(str(key.get(f)) for f in fields)), []).append(row)
    if not groups:
        names = " or ".join(kind for kind in kinds if kind != "card")
        what = " in ".join(str(setup[f]) for f in ("stack", "dtype") if f in setup)
        return Series((), f"not measured: no {names} row" + (f" with {what}" if what else ""))

    def rank(item: tuple[tuple, list[Record]]) -> tuple:
        arms = sum(r.error is None for r in item[1])
        return (arms, item[1][0].key.get("weights") == "checkpoint", item[0])

    return Series(tuple(cards + max(groups.items(), key=rank)[1]))


def samples(
    series: Series, kind: str, name: str, context: int, new_tokens: int
) -> tuple[list[float], str]:
    """Raw repetitions of one arm, or an empty list and the reason."""
    row = series.one(kind, context=context, new_tokens=new_tokens)
    if row is None:
        what = f"no {kind} row at {context} context and {new_tokens} new tokens"
        return [], series.reason or f"not measured: {what}"
    if row.error:
        return [], f"failed: {row.error}"
    reason = row.missing.get(name) or row.missing.get(name.removesuffix("_j")) or f"no {name}"
    values = values_of(row, name)
    return values, "" if values else f"not measured: {reason}"


def estimate(repetitions: tuple[list[float], str], q: float = 50, factor: float = 1.0) -> Estimate:
    """The q-th percentile of what `samples` returned, in another unit, or its reason."""
    values, reason = repetitions
    return stats.scaled(stats.percentile(values, q), factor) if values else stats.missing(reason)


def pair_ratio(
    pair: tuple[Series, Series],
    envs: dict[str, dict[str, Any]],
    kind: str,
    name: str,
    arm: tuple[int, int],
    differ: Sequence[str] = (),
) -> Estimate:
    """Ratio of medians of a sample of two models, refused where the rows are not comparable.

    `differ` names what may differ because it is the point, such as the stack of one model.
    """
    rows = [s.one(kind, context=arm[0], new_tokens=arm[1]) for s in pair]
    repetitions = [samples(s, kind, name, *arm) for s in pair]
    for values, reason in repetitions:
        if not values:
            return stats.missing(reason)
    try:
        require_comparable(rows, envs, differ=differ)
    except ValueError as error:
        return stats.missing(str(error))
    return visit_ratio(*rows, name)


def over_common(
    a: Mapping[str, float], b: Mapping[str, float]
) -> tuple[list[str], Estimate | None]:
    """The visits that both sides have, each {visit: value}, and from two on one side over the other
    over these visits."""
    common = [visit for visit in a if visit in b]
    return common, stats.over_visits([a[x] / b[x] for x in common]) if len(common) > 1 else None


def visit_ratio(a: Record, b: Record, name: str) -> Estimate:
    """Ratio of medians of a sample of two rows, paired within each visit that both have.

    Of one such visit it is bootstrapped within it. Without any it is the ratio of what all visits
    of each say, so that no visit is chosen.
    """
    sides = [
        {one.visit: one for one in (row, *row.others) if values_of(one, name)} or {"": row}
        for row in (a, b)
    ]
    medians = (
        {at: statistics.median(values) for at, x in side.items() if (values := values_of(x, name))}
        for side in sides
    )
    common, ratio = over_common(*medians)
    if common:
        sides = [{visit: side[visit] for visit in common} for side in sides]
    if ratio is None:
        samples = [[values_of(row, name) for row in side.values()] for side in sides]
        if max(map(len, samples)) == 1:
            ratio = stats.ratio(*(values for (values,) in samples))
        else:
            ratio = stats.quotient(*map(stats.of_visits, samples))
    return replace(ratio, records=tuple(record_id(row) for side in sides for row in side.values()))
