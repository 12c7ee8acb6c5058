"""Arms of two result sets, matched by key: ratios with intervals, and what is refused and why.

An arm is compared with the arm of the same kind and key in the other set, whatever the GPU and
the versions: those are what is compared. Everything else that differs is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import stats
from lib.analysis.ablations import CHANGED, WARNS
from lib.analysis.estimators import ONE_ROW, Sample
from lib.analysis.metrics import Metric, shown_in
from lib.analysis.rows import Rows, objections
from lib.analysis.rows import load as load_rows
from lib.analysis.setups import ARM
from lib.records import jobs
from lib.records.kinds import model_order
from lib.records.record import KEY_FIELDS, NO_ARM, Record, shared_gpu
from lib.show.wording import verdict
from lib.stats import Estimate

COMPARED = shown_in("comparison")
OF_ONE_ROW = [m for m in COMPARED if isinstance(m.of, ONE_ROW)]  # others are of all lengths
NAMES = {metric.of.name for metric in OF_ONE_ROW}  # of the samples and readings
SETUP = ("weights", "dtype", "stack", "experts", "attention", "cache")
SIDES = ("A", "B")
NOT_JUDGED = f"not judged: {WARNS}"
ENGINE = "engine_"  # what a row says of the settings of its engine
NO_SETTING = ("engine_id", "engine_start_s")


@dataclass(frozen=True)
class Side:
    """One result set: its name, merged rows, environments, and the runs that made them."""

    name: str
    rows: Sequence[Record]
    runs: tuple[dict[str, Any], ...] = ()

    @property
    def environments(self) -> dict[str, dict[str, Any]]:
        return Rows.of(self.rows).environments


@dataclass(frozen=True)
class Pair:
    """One metric of one arm on both sides; `ratio` is B / A, `warned` of what its rows warn."""

    metric: Metric
    kind: str
    key: dict[str, Any]
    a: Estimate
    b: Estimate
    ratio: Estimate
    warned: str = ""

    @property
    def verdict(self) -> str:
        """Whether B lies above or below A, or why that cannot be said."""
        if self.ratio.value == 1 and self.ratio.n == 1:
            return "equal readings"
        if self.warned and self.ratio.low is not None:
            return f"{NOT_JUDGED}{self.warned}"
        return verdict(self.ratio, "B higher", "B lower")


@dataclass(frozen=True)
class Refused:
    """An arm that is not compared: the set it is in, and the reason."""

    kind: str
    key: dict[str, Any]
    where: str
    reason: str


def load(source: str | Path) -> Side:
    """The result set of a folder. A job that cannot be read is an error."""
    runs = [run for job in jobs.find(source) if job.records for run in (job.run, *job.earlier)]
    return Side(Path(source).name, load_rows(source), tuple(runs))


def compare(a: Side, b: Side) -> tuple[list[Pair], list[Refused]]:
    """Pairs of arms that can be compared, and the others with their reasons."""
    arms = [_arms(side.rows) for side in (a, b)]
    names = sorted({*arms[0], *arms[1]}, key=_order)
    pairs, refused = [], []
    for name in names:
        ours, theirs = (by_key.get(name, []) for by_key in arms)
        kind, key = (ours or theirs)[0].kind, (ours or theirs)[0].key
        reason = _reason(ours, theirs, (a, b), arms)
        if reason:
            where = "both" if ours and theirs else "A" if ours else "B"
            refused.append(Refused(kind, key, where, reason))
            continue
        results = _pairs(ours[0], theirs[0])
        pairs += [pair for pair in results if isinstance(pair, Pair)]
        refused += [item for item in results if isinstance(item, Refused)]
    return pairs + _of_lengths(a, b), refused


def _of_lengths(a: Side, b: Side) -> list[Pair]:
    """Metrics of all lengths of an arm, such as slopes, where both sides have them."""
    pairs = []
    for metric in (m for m in COMPARED if m not in OF_ONE_ROW):
        sides = []
        for side in (a, b):
            arms: dict[tuple, list[Record]] = {}
            for row in Rows.of(side.rows).of_kinds(metric.kinds):
                fields = (row.key.get(f) for f in KEY_FIELDS if f != "new_tokens")
                arms.setdefault((row.kind, *fields), []).append(row)
            sides.append(arms)
        for name in sorted(sides[0].keys() & sides[1].keys(), key=_by_size):
            arms = [arms[name] for arms in sides]
            if any(shared_gpu(x, side.environments) for x, side in zip(arms, (a, b), strict=True)):
                continue  # told arm by arm
            ours, theirs = (metric.of(rows) for rows in arms)
            if None not in (ours.value, theirs.value):
                key = arms[0][0].key | {"new_tokens": None}
                ratio, warned = metric.ratio(*arms[::-1]), _warned(*arms[0], *arms[1])
                pairs.append(Pair(metric, name[0], key, ours, theirs, ratio, warned))
    return pairs


def _by_size(name: tuple) -> tuple:
    """The order of arms of all lengths, as `_order` is of those of one."""
    fields = [field for field in KEY_FIELDS if field != "new_tokens"]
    return _order((name[0], *(dict(zip(fields, name[1:], strict=True)).get(f) for f in KEY_FIELDS)))


def _warned(*rows: Record) -> str:
    """Of what rows warn in any visit, so that their ratio decides nothing."""
    return objections(one for row in rows for one in (row, *row.others))


def _arms(rows: Iterable[Record]) -> dict[tuple, list[Record]]:
    """Rows that hold something to compare by kind and key; several where GPUs differ."""
    arms: dict[tuple, list[Record]] = {}
    for row in rows:
        quantities = NAMES & {*row.samples, *row.values, *row.missing}
        if row.kind not in NO_ARM and (quantities or row.error):
            arms.setdefault((row.kind, *(row.key.get(f) for f in KEY_FIELDS)), []).append(row)
    return arms


def _order(name: tuple) -> tuple:
    kind, key = name[0], dict(zip(KEY_FIELDS, name[1:], strict=True))
    sizes = tuple(key[f] if isinstance(key[f], int) else -1 for f in ("context", "new_tokens"))
    return (model_order(str(key["model"])), kind, sizes, tuple(map(str, name)))


def _reason(
    ours: Sequence[Record],
    theirs: Sequence[Record],
    sides: tuple[Side, Side],
    arms: Sequence[dict[tuple, list[Record]]],
) -> str:
    """Why an arm is not compared; empty where it is."""
    for letter, side, rows in zip(SIDES, sides, (ours, theirs), strict=True):
        if len(rows) > 1:
            cards = {str(side.environments.get(r.env_id or "", {}).get("gpu")) for r in rows}
            return f"{letter} has it on several GPUs ({', '.join(sorted(cards))}): choose one"
    if not ours or not theirs:
        other = SIDES[bool(ours)]
        return _only((ours or theirs)[0], other, [r for x in arms[bool(ours)].values() for r in x])
    for letter, rows in zip(SIDES, (ours, theirs), strict=True):
        if rows[0].error:
            return f"failed in {letter}: {rows[0].error}"
    for letter, side, rows in zip(SIDES, sides, (ours, theirs), strict=True):
        if reason := shared_gpu(rows, side.environments):
            return f"{reason} in {letter}"
    sources = [
        ", ".join(str(r[0].value(n)) for n in ("model_source", "model_revision") if r[0].value(n))
        for r in (ours, theirs)
    ]
    if sources[0] != sources[1]:
        return f"weights from {sources[0] or 'unknown'} in A and {sources[1] or 'unknown'} in B"
    return ""


def _only(row: Record, other: str, rows: Sequence[Record]) -> str:
    """Why the other set has no such arm: what it has instead."""
    model, changed = row.key.get("model"), CHANGED.get(row.kind.removeprefix("ablation-"))
    alike = [r for r in rows if r.kind == row.kind and r.key.get("model") == model]
    near = [r for r in alike if all(r.key.get(f) == row.key.get(f) for f in ARM)]
    differ = [d for r in near if changed not in (d := _differences(r, row))]
    if differ:
        nearest = min(differ, key=lambda names: sum(f in SETUP for f in names))
        changes = " and ".join(f"{name} {a} instead of {b}" for name, (a, b) in nearest.items())
        return f"{other} has it with {changes}: a ratio would mix causes"
    if alike:
        return f"{other} has no such arm"
    has_model = any(r.key.get("model") == model for r in rows)
    what = f"no {row.kind} rows of {model}" if has_model else f"no rows of {model}"
    return f"{other} has {what if model else f'no {row.kind} rows'}"


def _differences(near: Record, row: Record) -> dict[str, tuple[Any, Any]]:
    """What tells two rows of one arm apart, by name: of one setup the settings of their engines."""
    pairs = {f: (near.key.get(f), row.key.get(f)) for f in SETUP}
    differ = {f: pair for f, pair in pairs.items() if pair[0] != pair[1]}
    if differ:
        return differ
    names = dict.fromkeys(n for n in (*near.values, *row.values) if n.startswith(ENGINE))
    names = [n for n in names if n not in NO_SETTING]
    pairs = {n: (near.values.get(n), row.values.get(n)) for n in names}
    settings = {n.replace("_", " "): pair for n, pair in pairs.items() if pair[0] != pair[1]}
    keys = {f: (near.key.get(f), row.key.get(f)) for f in KEY_FIELDS if f not in ARM}
    return settings or {f: pair for f, pair in keys.items() if pair[0] != pair[1]}


def _pairs(a: Record, b: Record) -> list[Pair | Refused]:
    """Every metric that both rows have; what one of them lacks is refused with its reason."""
    pairs: list[Pair | Refused] = []
    for metric in OF_ONE_ROW:
        if not any(metric.of.name in {*row.samples, *row.values, *row.missing} for row in (a, b)):
            continue
        estimates = [_estimate(row, metric) for row in (a, b)]
        without = [
            f"{metric.title} is missing in {letter}: {estimate.reason}"
            for letter, estimate in zip(SIDES, estimates, strict=True)
            if estimate.value is None
        ]
        if without:
            pairs.append(Refused(a.kind, a.key, "both", "; ".join(without)))
        else:
            ratio = _ratio(*estimates, a, b, metric)
            pairs.append(Pair(metric, a.kind, a.key, *estimates, ratio, _warned(a, b)))
    return pairs


def _estimate(row: Record, metric: Metric) -> Estimate:
    if isinstance(metric.of, Sample):
        if values := metric.of.each(row):
            return stats.median(values)
    elif (value := row.value(metric.of.name)) is not None:
        return stats.exact(value * metric.of.factor)
    return stats.missing(row.missing.get(metric.of.name) or "not measured")


def _ratio(ours: Estimate, theirs: Estimate, a: Record, b: Record, metric: Metric) -> Estimate:
    """B / A."""
    if isinstance(metric.of, Sample):
        return stats.ratio(metric.of.raw(b), metric.of.raw(a))
    if not ours.value:
        return stats.missing("the reading of A is zero")
    why = "one reading on each side, no interval"
    return Estimate(theirs.value / ours.value, n=1, method="ratio of single readings", reason=why)
