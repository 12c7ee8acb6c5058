"""Growing batches, read from rows: throughput of all and of each, energy, experts, the knee.

Throughput and energy of a token are slopes over two lengths, so that the prefill is in neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib import stats
from lib.analysis import bounds
from lib.analysis.energy import quantities
from lib.analysis.estimators import decode_tok_per_s
from lib.analysis.rows import Rows
from lib.analysis.setups import SETUP, Name, grouped, named
from lib.records.kinds import STAND_IN
from lib.records.record import Record
from lib.show.wording import short
from lib.stats import Estimate

KINDS = ("batch", "batch-energy")
FIELDS = ("context", "batch")
CHECKED = ("model", "weights", "dtype", "engine", *FIELDS)  # what a gate and a batch share
GAIN = 1.5
RULE = (
    "knee: the largest batch up to which each doubling of the batch raised the throughput of "
    f"all sequences at least {GAIN:g} times, or by so noisy a factor that this is not excluded "
    "and a further doubling decides"
)


@dataclass(frozen=True)
class Point:
    """One model in one setup at one batch.

    `per_user` and `total` are tokens a second of one and of all sequences; `token_j` joules of a
    decoded token; `call_token_j` those of a whole call, with its prefill, for each generated one.
    One whose logits were not checked at this batch is not `gated`: a lead, and no result.
    """

    model: str
    setup: tuple[str, ...]
    context: int
    batch: int
    per_user: Estimate
    total: Estimate
    token_j: Estimate
    call_token_j: Estimate
    arm: bounds.Arm | None
    error: str
    gated: bool = True

    @property
    def line(self) -> tuple[Any, ...]:
        """What points of one line share: model, setup and context."""
        return (self.model, *self.setup, self.context)

    @property
    def tokens_per_j(self) -> Estimate:
        """Decoded tokens for a joule."""
        return stats.inverse(self.token_j)

    def experts(self, name: str) -> Estimate:
        """Distinct experts of a layer in a step: `chosen` by the router, or `touched`."""
        if self.arm is None or not self.arm.traced:
            return stats.missing(self.arm.realised_reason if self.arm else "not measured")
        value = self.arm.traced.get(f"experts_{name}_decode")
        if value is None:
            return stats.missing(self.arm.traced.get("note") or "the router's choice is not told")
        return Estimate(value, n=1, method="traced, mean over layers", reason="one step")

    def mbu(self, *, realised: bool, datasheet: bool = False) -> Estimate:
        """Bytes of a step x steps a second / bandwidth."""
        if self.arm is None:
            return stats.missing("the bytes of a step are not known")
        return self.arm.mbu(realised=realised, datasheet=datasheet)


def points(rows: Sequence[Record]) -> list[Point]:
    """Every batch that was tried, in the order of the table."""
    return [point for point, _ in pointed(rows)]


def pointed(rows: Sequence[Record]) -> list[tuple[Point, list[Record]]]:
    """Every point with the rows that it was made from."""
    return Rows.of(rows).once(_every_point)


def _every_point(rows: Rows) -> list[tuple[Point, list[Record]]]:
    arms = {(a.model, a.setup, a.context, a.batch): a for a in bounds.arms(rows, "batch")}
    passed = checked(rows)
    return [
        (replace(_point(where, group, arms.get(where)), gated=is_gated(group[0], passed)), group)
        for where, group in grouped(rows, KINDS, FIELDS).items()
    ]


def results(rows: Sequence[Record]) -> tuple[Rows, Rows]:
    """The rows that a choice may rest on, and the leads beside them, whose logits were not checked;
    an engine's stand-in weights are neither."""
    rows = Rows.of(rows).where(lambda r: r.key.get("weights") != STAND_IN)
    passed = checked(rows)
    leads = {id(r) for r in rows if r.kind in KINDS and not is_gated(r, passed)}
    return rows.where(lambda r: id(r) not in leads), rows.where(lambda r: id(r) in leads)


def checked(rows: Sequence[Record]) -> set[tuple]:
    """Where a gate passed."""
    gates = [r for r in rows if r.kind == "gate" and not r.error]
    return {tuple(r.key.get(name) for name in CHECKED) for r in gates}


def is_gated(row: Record, passed: set[tuple]) -> bool:
    """Whether a gate passed at the row's batch; rows of loaded nets are not written without one."""
    return not row.key.get("engine") or tuple(row.key.get(name) for name in CHECKED) in passed


def _point(where: tuple, group: Sequence[Record], arm: bounds.Arm | None) -> Point:
    batch, calls = where[-1], [r for r in group if r.kind == "batch"]
    error = next((r.error for r in calls if r.error), "")
    if error:
        failed = stats.missing("failed")
        return Point(*where, failed, failed, failed, failed, None, error)
    per_user = decode_tok_per_s(calls)
    token_j, call_token_j = _joules([r for r in group if r.kind == "batch-energy"], batch)
    total = stats.scaled(per_user, batch)
    return Point(*where, per_user, total, token_j, call_token_j, arm, "")


def _joules(rows: Sequence[Record], batch: int) -> tuple[Estimate, Estimate]:
    """Joules of a decoded token, and of a whole call of the longest length for each token."""
    measured = [r for r in rows if r.samples.get("energy_j")]
    if not measured:
        reasons = [f"failed: {r.error}" for r in rows if r.error]
        reasons += [f"not measured: {r.missing['energy_j']}" for r in rows if r.missing]
        none = stats.missing(reasons[0] if reasons else "not measured")
        return none, none
    longest = max(measured, key=lambda r: r.key["new_tokens"])
    whole = stats.scaled(
        stats.mean(longest.samples["energy_j"]), 1 / (batch * longest.key["new_tokens"])
    )
    _, step = quantities.split(measured, KINDS)
    if step.value is not None and step.value <= 0:
        return stats.missing("not resolved: noise hides the energy of decoding"), whole
    return stats.scaled(step, 1 / batch), whole


@dataclass(frozen=True)
class Knee:
    """The batch from which doubling pays less than the rule asks for, or None and the reason.

    `gain` is by how much the last doubling that was looked at raised the throughput of all.
    """

    batch: int | None
    gain: Estimate
    reason: str = ""


def knee(line: Sequence[Point]) -> Knee:
    """The knee of one line (RULE); the first doubling that surely raises by less ends the search.

    One that may have raised by less is the knee if no further doubling paid.
    """
    rates = {p.batch: p.total for p in line if p.total.value is not None}
    batch, gain = min(rates, default=0), stats.missing("no batch and its double were measured")
    doubtful: Knee | None = None
    while rates and 2 * batch in rates:
        gain = stats.quotient(rates[2 * batch], rates[batch])
        if gain.value >= GAIN:
            doubtful = None
        elif gain.resolved_from(GAIN):
            return Knee(batch, gain)
        else:
            doubtful = doubtful or Knee(batch, gain)
        batch *= 2
    if doubtful:
        return doubtful
    failed = next((f"; batch {p.batch} failed" for p in line if p.error and p.batch > batch), "")
    last = (
        f"doubling to {batch} still raised it {short(gain.value)} times"
        if gain.value
        else (gain.reason)
    )
    return Knee(None, gain, f"not reached: {last}{failed}")


def by_line(batches: Sequence[Point]) -> dict[tuple, list[Point]]:
    """Points of one model, setup and context, with ascending batches."""
    lines: dict[tuple, list[Point]] = {}
    for point in sorted(batches, key=lambda p: p.batch):
        lines.setdefault(point.line, []).append(point)
    order = list(dict.fromkeys(point.line for point in batches))
    return {line: lines[line] for line in order}


def names(lines: Iterable[tuple]) -> dict[tuple, Name]:
    """What each line is called beside the others, and its place among setups."""
    return named(list(lines), ("context",))


def rivals(point: Point) -> tuple[Any, ...]:
    """What points between which a user may choose share: all but stack, experts and batch."""
    fixed = [v for n, v in zip(SETUP, point.setup, strict=True) if n not in ("stack", "experts")]
    return (point.model, *fixed, point.context)


def front(batches: Sequence[Point]) -> list[Point]:
    """The Pareto front: no rival is as good in speed for a user and in energy, and better in one.

    Points that lack one of the two numbers, and leads, are left out.
    """
    contenders = [
        p for p in batches if p.gated and None not in (p.per_user.value, p.tokens_per_j.value)
    ]
    at = {id(p): (p.per_user.value, p.tokens_per_j.value) for p in contenders}

    def beaten(point: Point) -> bool:
        mine = at[id(point)]
        others = (at[id(p)] for p in contenders if rivals(p) == rivals(point))
        return any(o != mine and o[0] >= mine[0] and o[1] >= mine[1] for o in others)

    return [point for point in contenders if not beaten(point)]
