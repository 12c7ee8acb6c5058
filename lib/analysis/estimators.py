"""Estimators: each gives one number, with its interval and the rows that it is of, from the rows of
one model in one setup at one context. The catalogue of metrics says which metric has which.

Other rows among them do not matter. A missing value has a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lib import stats
from lib.analysis import physics
from lib.analysis.series import over_common
from lib.analysis.serving import reading
from lib.analysis.setups import sampled, values_of
from lib.records.kinds import ABLATIONS
from lib.records.record import Record, record_id, select, visits
from lib.stats import Estimate

MIB = 2**20
# Kinds of timed calls, best first.
CALLS = ("latency", "batch", "energy", *(f"ablation-{name}" for name in ABLATIONS))
HEADLINE = ("latency", "memory-paper", "energy")  # whose shortest calls of several tokens are meant
MEMORY = ("memory-paper", "memory")
JOULES = ("energy",)
PROFILER = "profiler"  # the method of what was profiled once
SAME = ("model", "weights", "dtype")  # what a trace and the arm that it explains share
Of = Callable[[Sequence[Record]], Estimate]


def tokens(row: Record) -> int:
    """Tokens that a call generates, of all its sequences."""
    return (row.key.get("new_tokens") or 1) * (row.key.get("batch") or 1)


def headline(rows: Iterable[Record], kinds: Sequence[str] = ()) -> int:
    """New tokens of the shortest calls of more than one, of the first kind that has any; or 1."""
    lengths = {(r.kind, n) for r in rows if (n := r.key.get("new_tokens") or 1) > 1}
    by_kind = ([n for k, n in lengths if k == kind] for kind in (*HEADLINE, *kinds))
    return next((min(counts) for counts in by_kind if counts), 1)


@dataclass(frozen=True)
class Sample:
    """The `q`-th percentile of a sample (SI) times `scale`, or `scale` over it where `inverse`.

    Of the calls of the headline's length, or of one token; of the first of `kinds` that is there.
    """

    name: str
    scale: Callable[[Record], float]
    kinds: tuple[str, ...] = CALLS
    inverse: bool = False
    q: float = 50
    one_token: bool = False

    def rows(self, rows: Sequence[Record]) -> list[Record]:
        """The calls that are meant; where there are none, those that failed."""
        return calls(rows, self.kinds, 1 if self.one_token else None)

    def raw(self, row: Record) -> list[float]:
        """One number for each repetition, in SI units."""
        return values_of(row, self.name)

    def each(self, row: Record) -> list[float]:
        """One number for each repetition, in the unit of the metric."""
        scale = self.scale(row)
        return [scale / x if self.inverse else scale * x for x in self.raw(row)]

    def __call__(self, rows: Sequence[Record]) -> Estimate:
        mine = self.rows(rows)
        plain = sampled(mine, self.name, self.q)
        if plain.value is None:
            return plain
        plain = _within(plain, mine[-1:])
        scaling = stats.inverse if self.inverse else stats.scaled
        return scaling(plain, self.scale(mine[-1]))


class Gaps(Sample):
    """Times between the tokens of stamped calls. Steps of one call are correlated: no interval."""

    def raw(self, row: Record) -> list[float]:
        """The median gap of each call."""
        stamped = (call for call in row.samples.get(self.name) or () if len(call) > 1)
        return [stats.median(stats.gaps(call)).value for call in stamped]

    def __call__(self, rows: Sequence[Record]) -> Estimate:
        mine = [r for r in rows if r.kind in self.kinds]
        gaps = [
            [
                gap
                for r in rows
                for call in r.samples.get(self.name) or ()
                for gap in stats.gaps(call)
            ]
            for rows in visits(mine).values()
        ]
        if not (gaps := list(filter(None, gaps))):
            return sampled(mine, self.name)
        if len(gaps) > 1:
            return stats.scaled(stats.of_visits(gaps), 1e3)
        why = "steps of one call are correlated: no interval"
        middle = stats.median(gaps[0])
        return Estimate(middle.value * 1e3, n=middle.n, method="median of all gaps", reason=why)


@dataclass(frozen=True)
class Stamped:
    """The median over stamped calls of what a tool makes of the token stamps (s since the call's
    start) and the duration of one."""

    define: Callable[[Sequence[float], float], float]
    name = "token_s"

    def __call__(self, rows: Sequence[Record]) -> Estimate:
        row = next(reversed(select(rows, "itl")), None)
        stamps, ends_s = (row.samples.get(n) or [] if row else [] for n in ("token_s", "e2e_s"))
        if row and not row.error and stamps and len(stamps) == len(ends_s):
            pairs = zip(stamps, ends_s, strict=True)
            return stats.median([self.define(*pair) for pair in pairs])
        failed = row and row.error
        return stats.missing(f"failed: {failed}" if failed else "not measured: no time of the call")


@dataclass(frozen=True)
class Reading:
    """A single reading (SI) times `factor`, less another where `less` names one; or the reason,
    that of `like` where the reading has none of its own."""

    name: str
    kinds: tuple[str, ...]
    factor: float = 1
    like: str = ""
    less: str = ""
    note: bool = False  # whether the row's note says why it is absent

    def __call__(self, rows: Sequence[Record]) -> Estimate:
        mine = calls(rows, self.kinds)
        if not mine:
            return stats.missing("not measured")
        row, names = mine[-1], [self.name, *filter(None, (self.less,))]
        values = [row.value(name) for name in names]
        if None not in values:
            method = "difference of readings" if self.less else "single reading"
            value = (values[0] - sum(values[1:])) * self.factor
            return replace(stats.exact(value, method), records=(record_id(row),))
        if row.error:
            return stats.missing(f"failed: {row.error}")
        if self.note and row.value("note"):
            return stats.missing(row.value("note"))
        absent = row.missing.get(names[values.index(None)]) or row.missing.get(self.like)
        return stats.missing(f"not measured: {absent or 'no reading'}")


@dataclass(frozen=True)
class Per:
    """One metric for each unit of another that has no sampling error."""

    numerator: Of
    by: Of

    def __call__(self, rows: Sequence[Record]) -> Estimate:
        divisor = self.by(rows)
        if not divisor.value:
            return divisor if divisor.value is None else stats.missing("of nothing: its unit is 0")
        value = stats.scaled(self.numerator(rows), 1 / divisor.value)
        return replace(value, records=(*value.records, *divisor.records))


def calls(
    rows: Sequence[Record], kinds: Sequence[str], new_tokens: int | None = None
) -> list[Record]:
    """Rows of the first of these kinds that is there, of one length (that of `headline` unless it
    is given); where there are none, those that failed."""
    kind = next((k for k in kinds if any(r.kind == k for r in rows)), None)
    length = headline(rows, kinds) if new_tokens is None else new_tokens
    mine = [r for r in rows if r.kind == kind]
    return [r for r in mine if (r.key.get("new_tokens") or 1) == length] or [
        r for r in mine if r.error
    ]


@dataclass(frozen=True)
class Card:
    """What the model card counts, in 10^9."""

    name: str

    def __call__(self, rows: Sequence[Record]) -> Estimate:
        card = next(reversed(select(rows, "card")), None)
        if card is None or card.value(self.name) is None:
            return stats.missing("not measured: no model card among the rows")
        count = card.value(self.name) / 1e9
        return Estimate(count, n=1, method="counted", records=(record_id(card),))


def active_realised(rows: Sequence[Record]) -> Estimate:
    """Active parameters as traced for the model and experts of the calls among the rows (10^9).

    A stack may decode with another implementation of the experts than it prefills with, so that
    the trace must be of the one that decodes. At another context it serves as well.
    """
    arm = next((r for kind in CALLS for r in rows if r.kind == kind and not r.error), None)
    same = {name: arm.key.get(name) for name in SAME} if arm else {}
    traces = select(rows, "trace", batch=1, **same) if arm else []
    counts = [r.value("active_params_realised") for r in traces if _same_experts(r, arm)]
    count = next((n for n in reversed(counts) if n), None)
    if count is None:
        return stats.missing("not traced")
    return Estimate(count / 1e9, n=1, method="traced")


def _same_experts(trace: Record, arm: Record) -> bool:
    implementations = [row.value("decode_experts") for row in (trace, arm)]
    if None in implementations:
        return trace.key.get("experts") == arm.key.get("experts")
    return implementations[0] == implementations[1]


def decode_tok_per_s(rows: Sequence[Record]) -> Estimate:
    """Decode throughput: the inverse slope of a call's time over its new tokens (tok/s).

    Prefill is the intercept and so is left out; calls of one token are points too. Where the rows
    contradict each other, the pair is the reason why there is none. Of several visits it is the
    median of those in which the rows have a slope.
    """
    of_visits = [_decode_in_visit(mine) for mine in visits(rows).values()]
    values = [one.value for one in of_visits if one.value is not None]
    if len(values) < 2:
        return _within(_decode_in_visit(rows), rows)
    ids = dict.fromkeys(name for one in of_visits for name in one.records)
    return replace(stats.over_visits(values), records=tuple(ids))


def _within(estimate: Estimate, rows: Sequence[Record]) -> Estimate:
    """The estimate, whose method says that its interval is of one visit where that is known."""
    if estimate.low is None or estimate.visits or not any(row.visit for row in rows):
        return estimate
    return replace(estimate, method=f"{estimate.method}, within one visit")


def _decode_in_visit(rows: Sequence[Record]) -> Estimate:
    timed = [r for r in rows if r.kind in physics.TIMED]
    step_s, used = physics.line(timed)
    pairs = physics.of_calls(timed)
    if why := physics.contradicted(used, physics.DECODE) or next(
        (pair.text for pair in pairs if pair.missing == physics.DECODE), ""
    ):
        return stats.missing(f"contradiction: {why}")
    if step_s.value is None:
        return step_s
    return replace(stats.inverse(step_s), records=tuple(map(record_id, used)))


def tpot_ms(rows: Sequence[Record]) -> Estimate:
    """Time of a decode step (ms): 1 / decode throughput."""
    return stats.inverse(decode_tok_per_s(rows), 1e3)


SLOPES = (decode_tok_per_s, tpot_ms)  # of the calls of a visit


def slope_ratio(of: Of, a: Sequence[Record], b: Sequence[Record]) -> Estimate:
    """One slope over another, paired within each visit that has both, else of all visits."""
    sides = []
    for rows in (a, b):
        alone = {v: [replace(r, others=()) for r in mine] for v, mine in visits(rows).items()}
        sides.append({v: rate for v, mine in alone.items() if (rate := of(mine)).value is not None})
    common, ratio = over_common(*({v: rate.value for v, rate in x.items()} for x in sides))
    rates = [side[visit] for side in sides for visit in common] or [of(a), of(b)]
    records = tuple(dict.fromkeys(name for rate in rates for name in rate.records))
    return replace(ratio or stats.quotient(*rates), records=records)


def marked_tok_per_s(rows: Sequence[Record]) -> Estimate:
    """Decode throughput a second way: steps over their time by the device's clock (tok/s).

    No slope and no prefill in it, so that noise of the host's does not reach it; what the host
    adds between steps it does see.
    """
    marked = [r for r in rows if r.samples.get("decode_s")]
    if not marked:
        return stats.missing("not measured: only captured steps are marked on the device")
    pairs = (pair for row in marked for pair in physics.of_calls([row]))
    own = next((pair.text for pair in pairs if pair.missing == physics.MARKED), "")
    if why := physics.contradicted(marked, physics.MARKED) or own:
        return stats.missing(f"contradiction: {why}")
    steps = [
        [t / (r.key["new_tokens"] - 1) for r in mine for t in values_of(r, "decode_s")]
        for mine in visits(marked).values()
    ]
    step_s = stats.of_visits(list(filter(None, steps)))
    return replace(stats.inverse(step_s), records=tuple(map(record_id, marked)))


def net_j_per_1k(rows: Sequence[Record]) -> Estimate:
    """J/1K tokens less what the idle board draws in that time; may be negative, never cut off."""
    row = calls(rows, JOULES)[-1]
    every = (*row.others, row)
    if pairs := [pair for one in every for pair in physics.of_energy(one)]:
        return stats.missing(f"contradiction: {pairs[0].text}")
    if values_of(row, "net_energy_j"):
        samples = (values_of(one, "net_energy_j") for one in every)
        return stats.of_visits([[per_1k(row) * v for v in own] for own in samples if own])
    reason = row.missing.get("net_energy_j") or row.missing.get("energy_j") or "no idle power"
    return stats.missing(f"not measured: {reason}")


def power_w(rows: Sequence[Record]) -> Estimate:
    """Mean power over all blocks: their energy over their time (W)."""
    row = calls(rows, JOULES)[-1]
    window_j, seconds = row.value("window_energy_j"), row.value("window_s")
    if window_j is None or not seconds:
        return stats.missing(sampled([row], "energy_j").reason or "not measured: no window")
    n, method = len(row.samples.get("energy_j") or ()) or 1, "energy of all calls / their time"
    return Estimate(window_j / seconds, n=n, method=method, reason="a total, no interval")


@dataclass(frozen=True)
class Busy:
    """A reading of the profiled call (s, or a count) times `factor`; a zero was not resolved."""

    name: str
    factor: float = 1

    def __call__(self, rows: Sequence[Record]) -> Estimate:
        row = next(reversed(select(rows, "busy")), None)
        if row is None:
            return stats.missing("not measured: no profiled call")
        value = row.value(self.name)
        if value is not None and value > 0:
            return stats.exact(value * self.factor, PROFILER)
        reason = "not resolved" if value is not None else row.missing.get(self.name, "no reading")
        return stats.missing(f"not measured: {reason}")


def decode_share(rows: Sequence[Record]) -> Estimate:
    """Device-busy time of a decode step over TPOT, of one arm's busy and latency rows."""
    return _share(decode_tok_per_s(rows), Busy("decode_busy_s")(rows))


def prefill_share(rows: Sequence[Record]) -> Estimate:
    """Device-busy time of a call of one token over TTFT."""
    ttft = sampled([r for r in rows if r.kind == "latency"], "ttft_s")
    return _share(stats.inverse(ttft), Busy("prefill_busy_s")(rows))


def _share(per_s: Estimate, busy_s: Estimate) -> Estimate:
    if busy_s.value is None:
        return busy_s
    return stats.scaled(per_s, busy_s.value) if per_s.value is not None else per_s


@dataclass(frozen=True)
class Loaded:
    """What one load of a server says (SI) times `factor`; `name` is the reading that it rests on,
    whose absence has a reason in the row."""

    read: Callable[[Record], Estimate]
    factor: float = 1
    name: str = ""

    def __call__(self, rows: Sequence[Record]) -> Estimate:
        row = next((r for r in reversed(rows) if r.kind in reading.KINDS), None)
        if row is None:
            return stats.missing("not measured")
        if row.error:
            return stats.missing(f"failed: {row.error}")
        estimate = stats.scaled(self.read(row), self.factor)
        return replace(estimate, records=(record_id(row),))


def latency(figure: str, q: float) -> Loaded:
    """A percentile (ms) of the requests of a window, see `reading.FIGURES`."""
    return Loaded(lambda row: reading.percentile(row, figure, q), 1e3)


ONE_ROW = (Sample, Reading, Busy, Stamped, Loaded)  # what is estimated from a single row


def ms(row: Record) -> float:
    """Milliseconds of a second."""
    return 1e3


def one(row: Record) -> float:
    """In SI units."""
    return 1.0


def per_1k(row: Record) -> float:
    """For each 1,000 tokens of a call."""
    return 1e3 / tokens(row)
