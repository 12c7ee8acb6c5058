"""Every metric once: METRICS says what a number is called, its unit and formula, which rows it
comes from, how it is estimated, which way is better, and what the study calls it.

`of` estimates a metric from the rows of one model in one setup at one context, with its card and
traces where the metric needs them; other rows among them do not matter. A missing value has a
reason. Tables, axes, comparisons and `analysis.frame` read the catalogue; a metric is added here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from lib import stats
from lib.analysis import physics
from lib.analysis.rows import Rows
from lib.analysis.series import Series, over_common, visit_ratio
from lib.analysis.serving import reading
from lib.analysis.setups import Group, by_setup, sampled, values_of
from lib.records.kinds import ABLATIONS
from lib.records.record import Record, record_id, select, visits
from lib.show.table import Column
from lib.stats import Estimate

MIB = 2**20
MORE, LESS = True, False  # which is better
# Kinds of timed calls, best first.
CALLS = ("latency", "batch", "energy", *(f"ablation-{name}" for name in ABLATIONS))
HEADLINE = ("latency", "memory-paper", "energy")  # whose shortest calls of several tokens are meant
MEMORY = ("memory-paper", "memory")
JOULES = ("energy",)
PROFILER = "profiler"  # the method of what was profiled once
SAME = ("model", "weights", "dtype")  # what a trace and the arm that it explains share
Shape = tuple[int, int]  # context, new tokens
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


def _slope_ratio(of: Of, a: Sequence[Record], b: Sequence[Record]) -> Estimate:
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


@dataclass(frozen=True)
class Metric:
    """One number that rows tell. `formula` is in the terms of `symbol`s and of samples' names.

    `kinds` are the kinds of rows that it reads; `higher_is_better` is None where neither way is;
    `shown_in` names the tables that have it as a column, and "models" the comparison of models.
    """

    name: str
    title: str
    symbol: str
    unit: str
    formula: str
    kinds: tuple[str, ...]
    of: Of
    higher_is_better: bool | None = None
    paper_name: str = ""
    shown_in: tuple[str, ...] = ()
    optional: bool = False  # no column where no row has it

    @property
    def header(self) -> str:
        """Title with the unit, as an axis shows it."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def column(self) -> Column:
        """The column of a table that holds it."""
        return Column(self.title, self.unit)

    @property
    def lead(self) -> str:
        """The title at the start of a sentence."""
        return self.title[:1].upper() + self.title[1:]

    def ratio(self, a: Sequence[Record], b: Sequence[Record]) -> Estimate:
        """Of some rows over that of others: by bootstrap where it has repetitions."""
        if self.of in SLOPES:
            return _slope_ratio(self.of, a, b)
        if not isinstance(self.of, Sample):
            return stats.quotient(self.of(a), self.of(b))
        rows = [mine[-1] if (mine := self.of.rows(x)) else Record("") for x in (a, b)]
        return visit_ratio(*(rows[::-1] if self.of.inverse else rows), self.of.name)

    def groups(self, rows: Sequence[Record]) -> list[Group]:
        """The rows that have it, by model and setup."""
        of = self.of

        def has_it(row: Record) -> bool:
            return bool(
                row.samples.get(of.name) if isinstance(of, Sample) else physics.calls_s(row)
            )

        return by_setup(Rows.of(rows).where(has_it), self.kinds[0])

    def shapes(self, group: Group) -> set[Shape]:
        """Contexts and lengths at which a group has it; length 0 where it is of all lengths."""
        sampled = isinstance(self.of, Sample)
        return {(r.key["context"], r.key["new_tokens"] if sampled else 0) for r in group.rows}

    def arm(self, group: Group, shape: Shape) -> list[Record]:
        """The rows of a group at a context and length."""
        context, length = shape
        return select(group.rows, context=context, **({"new_tokens": length} if length else {}))


def longest(shapes: set[Shape]) -> Shape:
    """The longest context, and there the fewest new tokens."""
    return max(shapes, key=lambda shape: (shape[0], -shape[1]))


def ms(row: Record) -> float:
    """Milliseconds of a second."""
    return 1e3


def one(row: Record) -> float:
    """In SI units."""
    return 1.0


def per_1k(row: Record) -> float:
    """For each 1,000 tokens of a call."""
    return 1e3 / tokens(row)


OUTPUT = Sample("e2e_s", tokens, inverse=True)
TTFT = Sample("ttft_s", ms, one_token=True)
TOKENS_PER_J = Sample("energy_j", tokens, ("energy",), inverse=True)
NOMINAL, PEAK = Card("active_params"), Reading("peak_bytes", MEMORY, 1e-9)
TRACED = ("trace",)

LATENCY, ENERGY, BUSY, CEILINGS = ("latency",), ("energy",), ("busy",), ("ceilings",)
STAMPED, CROSSWALK, COMPARISON = ("itl",), ("crosswalk",), ("comparison",)
EFFICIENCY, HOST = ("card", "latency"), ("busy", "latency")
SERVING, UNDER_LOAD, TAILS = reading.KINDS[:1], ("serving",), ("serving-latency",)
# fmt: off
METRICS = {metric.name: metric for metric in (
    Metric("ttft", "TTFT", "t1", "ms",
           "median of ttft_s: a call of one new token, prefill included", CALLS, TTFT, LESS, "TTFT",
           ("latency", "models", "comparison")),
    Metric("p50", "p50", "T", "ms", "median of e2e_s: the whole call", CALLS, Sample("e2e_s", ms),
           LESS, "p50", ("latency", "comparison")),
    Metric("p95", "p95 or max of n", "T95", "ms",
           "95th percentile of e2e_s, the largest where n < 59", CALLS, Sample("e2e_s", ms, q=95),
           LESS, "p95", ("latency",)),
    Metric("output", "output throughput", "r", "tok/s", "g / T: all tokens of a call over its time",
           CALLS, OUTPUT, MORE, "TPOT", ("latency", "energy", "models")),
    Metric("decode", "decode throughput", "d", "tok/s",
           "1 / slope of t1 and e2e_s over g: the prefill is not in it", ("latency", "batch"),
           decode_tok_per_s, MORE, "", ("latency", "comparison")),
    Metric("decode_marked", "decode by device clock", "d'", "tok/s", "(g - 1) / median of decode_s",
           LATENCY, marked_tok_per_s, MORE, "", ("latency",), optional=True),
    Metric("itl", "ITL", "t[i+1] - t[i]", "ms", "median of all gaps between tokens", ("itl",),
           Gaps("token_s", ms, ("itl",)), LESS, "", ("latency", "comparison")),
    Metric("tpot", "TPOT", "1 / d", "ms", "1 / decode throughput", LATENCY, tpot_ms, LESS),
    Metric("paper_tpot", "paper TPOT", "", "tok/s", "g / T", STAMPED,
           Stamped(lambda stamps, end_s: len(stamps) / end_s), MORE, "", CROSSWALK),
    Metric("guidellm_tpot", "GuideLLM TPOT", "", "ms", "T / g", STAMPED,
           Stamped(lambda stamps, end_s: 1e3 * end_s / len(stamps)), LESS, "", CROSSWALK),
    Metric("vllm_tpot", "vLLM TPOT, AIPerf ITL", "", "ms", "(T - t1) / (g - 1)", STAMPED,
           Stamped(lambda stamps, end_s: 1e3 * (end_s - stamps[0]) / (len(stamps) - 1)), LESS, "",
           CROSSWALK),
    Metric("vllm_itl", "vLLM ITL", "", "ms", "median of t[i+1] - t[i]", STAMPED,
           Stamped(lambda stamps, end_s: 1e3 * statistics.median(stats.gaps(stamps))), LESS, "",
           CROSSWALK),
    Metric("llama_bench_tg", "nearest to llama-bench tg", "", "tok/s", "(g - 1) / (T - t1)",
           STAMPED, Stamped(lambda stamps, end_s: (len(stamps) - 1) / (end_s - stamps[0])), MORE,
           "", CROSSWALK),
    Metric("call_j", "energy of a call", "E", "J", "median of energy_j: GPU board, gross", ENERGY,
           Sample("energy_j", one, ENERGY), LESS, "", COMPARISON),
    Metric("j_per_1k", "J/1K tokens", "1000 E / g", "J", "median of energy_j / g x 1,000", ENERGY,
           Sample("energy_j", per_1k, ENERGY), LESS, "J/1K", ("energy", "models")),
    Metric("j_per_1k_net", "J/1K, net of idle", "", "J", "(E - idle power x T) / g x 1,000", ENERGY,
           net_j_per_1k, LESS, "", ("energy",)),
    Metric("tok_per_j", "tokens per joule", "g / E", "1/J", "g / median of energy_j", ENERGY,
           TOKENS_PER_J, MORE, "Tokens/W", ("energy",)),
    Metric("j_per_1k_average", "J/1K, average power", "", "J",
           "integral of the one-second mean / g x 1,000", ENERGY,
           Sample("average_energy_j", per_1k, ENERGY), LESS, "", ("energy",)),
    Metric("j_per_1k_paper", "J/1K, before/after estimator", "", "J",
           "mean of two readings x T / g x 1,000", ENERGY, Sample("paper_energy_j", per_1k, ENERGY),
           LESS, "J/1K", ("energy",)),
    Metric("power", "mean power", "P", "W", "energy of all calls / their time", ENERGY, power_w,
           LESS, "", ("energy",)),
    Metric("idle", "idle", "P0", "W", "power of the board before the calls", ENERGY,
           Reading("idle_w", ENERGY, like="energy_j"), LESS, "", ("energy",)),
    Metric("peak", "peak", "M", "GB", "allocator peak of a call", MEMORY, PEAK, LESS, "Peak memory",
           ("memory", "comparison")),
    Metric("peak_mib", "peak, the paper's protocol", "M", "MiB", "allocator peak of a call",
           MEMORY[:1], Reading("peak_bytes", MEMORY[:1], 1 / MIB), LESS, "Peak memory"),
    Metric("above", "above baseline", "", "GB", "peak - baseline", MEMORY,
           Reading("peak_bytes", MEMORY, 1e-9, less="baseline_bytes"), LESS, "", ("memory",)),
    Metric("baseline", "baseline", "M0", "GB", "allocated before the call: the weights", MEMORY,
           Reading("baseline_bytes", MEMORY, 1e-9), LESS, "", ("memory",)),
    Metric("kv", "KV, tensors", "", "GB", "bytes of the cache's tensors", MEMORY,
           Reading("kv_tensor_bytes", MEMORY, 1e-9), LESS, "", ("memory",)),
    Metric("kv_card", "KV, card", "", "GB", "bytes of the cache by architecture", MEMORY,
           Reading("kv_card_bytes", MEMORY, 1e-9), LESS, "", ("memory",)),
    Metric("logits", "logits held", "", "GB", "logits alive after the call", MEMORY,
           Reading("logits_bytes", MEMORY, 1e-9), LESS, "", ("memory",)),
    Metric("workspace", "workspace", "", "GB", "peak - baseline - cache - logits", MEMORY,
           Reading("workspace_bytes", MEMORY, 1e-9), LESS, "", ("memory",)),
    Metric("reserved", "reserved", "", "GB", "held by the allocator at the peak", MEMORY,
           Reading("reserved_bytes", MEMORY, 1e-9), LESS, "", ("memory",)),
    Metric("active", "active, nominal", "A", "10^9", "active parameters by architecture", ("card",),
           NOMINAL, None, "Active (B)"),
    Metric("active_realised", "active, realised", "A'", "10^9", "active parameters as traced",
           ("latency", "trace"), active_realised),
    Metric("ape_tpot", "APE-TPOT", "r / A", "tok/s per 10^9",
           "output throughput / active parameters", EFFICIENCY, Per(OUTPUT, NOMINAL), MORE,
           "APE-TPOT", ("ape",)),
    Metric("ape_ttft", "APE-1/TTFT", "1 / (t1 A)", "1/s per 10^9", "1 / TTFT / active parameters",
           EFFICIENCY, Per(replace(TTFT, scale=one, inverse=True), NOMINAL), MORE, "APE-1/TTFT",
           ("ape",)),
    Metric("ape_energy", "APE-energy", "g / (E A)", "tok/J per 10^9",
           "tokens per joule / active parameters", ("card", "energy"), Per(TOKENS_PER_J, NOMINAL),
           MORE, "APE-Energy", ("ape",)),
    Metric("tok_per_s_per_gb", "TPOT/GB", "r / M", "tok/s per GB",
           "output throughput / peak in 10^9 B", ("latency", "memory-paper"),
           Per(OUTPUT, replace(PEAK, kinds=("memory-paper",))), MORE, "", ("ape",)),
    Metric("tok_per_s_per_1000_mib", "tok/s per 1,000 MiB", "", "tok/s",
           "output throughput / (peak in MiB / 1,000)", ("latency", "memory-paper"),
           Per(OUTPUT, replace(PEAK, kinds=("memory-paper",), factor=1e-3 / MIB)), MORE, "TPOT/GB"),
    Metric("chosen", "experts chosen in a step", "", "",
           "distinct experts of a layer by the router", TRACED,
           Reading("experts_chosen_decode", TRACED)),
    Metric("touched", "experts touched in a step", "", "", "distinct experts of a layer read",
           TRACED, Reading("experts_touched_decode", TRACED)),
    Metric("decode_share", "share of TPOT", "", "", "device time of a step x d", HOST,
           decode_share),
    Metric("prefill_share", "share of TTFT", "", "", "device time of the prefill / t1", HOST,
           prefill_share),
    Metric("prefill_busy", "device time of the first token", "", "ms", "by the profiler", BUSY,
           Busy("prefill_busy_s", 1e3), LESS, "", COMPARISON),
    Metric("decode_busy", "device time of a step", "", "ms", "by the profiler", BUSY,
           Busy("decode_busy_s", 1e3), LESS, "", COMPARISON),
    Metric("decode_kernels", "kernels of a step", "", "", "launches, by the profiler", BUSY,
           Busy("decode_kernels"), LESS, "", COMPARISON),
    Metric("served_output", "output of all", "R", "tok/s", "output tokens of the window / its time",
           SERVING, Loaded(reading.tokens_per_s), MORE, "", UNDER_LOAD),
    Metric("served_prompt", "prompts of all", "", "tok/s",
           "computed prompt tokens of the window / its time", SERVING,
           Loaded(lambda row: reading.tokens_per_s(row, "prompt_tokens")), MORE, "", UNDER_LOAD),
    Metric("served_requests", "requests", "", "1/s", "answers that ended in the window / its time",
           SERVING, Loaded(reading.requests_per_s), MORE, "", UNDER_LOAD),
    Metric("goodput", "goodput", "", "1/s",
           "requests of the window that kept the limits, failures being misses, / its time",
           SERVING, Loaded(reading.good_per_s), MORE, "", UNDER_LOAD),
    Metric("good_share", "within the limits", "", "%", "requests that kept the limits / all",
           SERVING, Loaded(reading.good_share, 100), MORE, "", UNDER_LOAD),
    Metric("served_j_per_1k", "J/1K output tokens", "", "J",
           "gross energy of the window / its output tokens x 1,000", SERVING,
           Loaded(reading.joules_per_1k, 1, "energy_j"), LESS, "", UNDER_LOAD),
    Metric("served_j_per_request", "J per request", "", "J",
           "gross energy of the window / answers that ended in it", SERVING,
           Loaded(reading.joules_per_request, 1, "energy_j"), LESS, "", UNDER_LOAD),
    Metric("served_idle_share", "of it idle", "", "%", "idle power x time / energy of the window",
           SERVING, Loaded(reading.idle_share, 100, "idle_w"), LESS, "", UNDER_LOAD),
    Metric("served_power", "mean power", "P", "W", "energy of the window / its time", SERVING,
           Loaded(reading.mean_w, 1, "energy_j"), LESS, "", UNDER_LOAD),
    Metric("served_ttft", "TTFT", "", "ms", "median, scheduled instant to the first token", SERVING,
           latency("ttft_s", 50), LESS, "", TAILS),
    Metric("served_ttft_p95", "TTFT, p95 or max of n", "", "ms", "its 95th percentile", SERVING,
           latency("ttft_s", 95), LESS, "", TAILS),
    Metric("served_ttft_p99", "TTFT, p99 or max of n", "", "ms", "its 99th percentile", SERVING,
           latency("ttft_s", 99), LESS, "", TAILS),
    Metric("served_visible", "first visible text", "", "ms",
           "median, scheduled instant to the first visible text", SERVING,
           latency("visible_s", 50), LESS, "", TAILS),
    Metric("served_itl", "ITL", "", "ms", "median of the gaps before tokens that came alone",
           SERVING, Loaded(reading.gaps, 1e3), LESS, "", TAILS),
    Metric("served_tpot", "TPOT", "", "ms",
           "median over requests of (last - first instant) / tokens after the first instant",
           SERVING, latency("tpot_s", 50), LESS, "", TAILS),
    Metric("served_tpot_p95", "TPOT, p95 or max of n", "", "ms", "its 95th percentile", SERVING,
           latency("tpot_s", 95), LESS, "", TAILS),
    Metric("served_latency", "whole answer", "", "ms", "median, scheduled instant to the end",
           SERVING, latency("latency_s", 50), LESS, "", TAILS),
    Metric("served_latency_p95", "whole answer, p95 or max of n", "", "ms", "its 95th percentile",
           SERVING, latency("latency_s", 95), LESS, "", TAILS),
    Metric("served_delay", "client's own delay", "", "ms",
           "median, scheduled instant until the request was handed over", SERVING,
           latency("delay_s", 50), LESS, "", TAILS),
    Metric("read_rate", "read, best shape", "", "GB/s", "best read stream", CEILINGS,
           Reading("read_bytes_per_s", CEILINGS, 1e-9), MORE, "", ("machine", "comparison")),
    Metric("copy_rate", "copy, read and written", "", "GB/s", "best copy", CEILINGS,
           Reading("copy_bytes_per_s", CEILINGS, 1e-9), MORE, "", ("machine", "comparison")),
    Metric("matvec_rate", "matrices of a chain of matrix-vector products", "", "GB/s", "best chain",
           CEILINGS, Reading("matvec_bytes_per_s", CEILINGS, 1e-9), MORE, "",
           ("machine", "comparison")),
    Metric("matmul_rate", "matrix product, bfloat16", "", "TFLOP/s", "best shape", CEILINGS,
           Reading("matmul_flop_per_s", CEILINGS, 1e-12), MORE, "", ("machine", "comparison")),
    Metric("matmul_float32_rate", "matrix product, float32", "", "TFLOP/s", "best shape", CEILINGS,
           Reading("matmul_float32_flop_per_s", CEILINGS, 1e-12), MORE, "", ("machine",)),
    Metric("launch", "launch of one kernel", "", "µs", "shortest of several", CEILINGS,
           Reading("launch_s", CEILINGS, 1e6), LESS, "", ("machine", "comparison")),
    Metric("host_score", "single thread of the host", "", "million loops/s", "loops in a second",
           CEILINGS, Reading("host_score_per_s", CEILINGS), MORE, "", ("machine", "comparison")),
)}
# fmt: on


def shown_in(table: str) -> list[Metric]:
    """The metrics that a table has as columns, in the order of the catalogue."""
    return [metric for metric in METRICS.values() if table in metric.shown_in]


# Those by which models are compared: what is better when it is more comes first.
BETWEEN_MODELS = sorted(shown_in("models"), key=lambda metric: not metric.higher_is_better)


def at(
    name: str,
    series: Series,
    context: int,
    new_tokens: int | None = None,
    kind: str = "",
) -> Estimate:
    """A metric of a series at one context, of calls of one length; of all lengths without one.

    `kind` are the rows to take where the metric reads several.
    """
    metric = METRICS[name]
    kinds = _kinds(metric, kind)
    length = 1 if isinstance(metric.of, Sample) and metric.of.one_token else new_tokens
    rows = rows_at(name, series, context, length, kind)
    if kinds and not rows:
        what = f"no {kinds[0]} row at {context} context" + f" and {length} new tokens" * bool(
            length
        )
        return stats.missing(series.reason or f"not measured: {what}")
    return metric.of([*select(series.rows, "card"), *rows])


def _kinds(metric: Metric, kind: str) -> list[str]:
    return [kind] if kind else [k for k in metric.kinds if k != "card"]


def rows_at(
    name: str, series: Series, context: int, new_tokens: int | None = None, kind: str = ""
) -> list[Record]:
    """The rows of a series that `at` estimates a metric from."""
    metric = METRICS[name]
    lengths = (new_tokens,) if isinstance(metric.of, Sample | Reading) else (1, new_tokens)
    arms = [r for r in select(series.rows, context=context) if r.kind in _kinds(metric, kind)]
    return [r for r in arms if new_tokens is None or r.key.get("new_tokens") in lengths]


def percent_change(estimate: Estimate) -> Estimate:
    """A ratio as a change in percent: 100 (r - 1)."""
    ends = {
        k: None if (v := getattr(estimate, k)) is None else 100 * (v - 1)
        for k in ("value", "low", "high")
    }
    return replace(estimate, **ends)
