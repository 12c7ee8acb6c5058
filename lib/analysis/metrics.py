"""What a number means and how it comes from rows: one function a quantity.

Of the arms of a `Series`, of any rows (decode throughput), or of two groups (`QUANTITIES`). A
missing input is a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lib import stats
from lib.analysis.series import Series, estimate, samples
from lib.analysis.setups import Group, by_setup, sampled
from lib.records.record import Record, record_id, select
from lib.stats import Estimate, inverse, missing, scaled

MIB = 2**20
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
        return by_setup(
            [r for r in rows if r.kind == "environment" or r.samples.get(self.sample)], self.kind
        )

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


def decode_tok_per_s(rows: Sequence[Record]) -> Estimate:
    """Decode throughput: the inverse slope of end-to-end time over new tokens (tok/s).

    Prefill is the intercept and so is left out. Needs calls of two different lengths; a lone call
    that was the first of its length is none.
    """
    timed = [
        r
        for r in rows
        if r.kind in ("latency", "batch")
        and (r.key.get("new_tokens") or 1) > 1
        and r.samples.get("e2e_s")
    ]
    calls = [r for r in timed if not _lone_and_cold(r)]
    pairs = [(r.key["new_tokens"], t) for r in calls for t in r.samples["e2e_s"]]
    if len({g for g, _ in pairs}) < 2:
        cold = len(timed) - len(calls)
        why = (
            f"; {cold} arm(s) hold one call, the first of its length, which waits for the allocator"
            if cold
            else ""
        )
        return stats.missing(f"not measured: a slope needs calls of two lengths{why}")
    slope = stats.slope([g for g, _ in pairs], [t for _, t in pairs])
    if slope.value is not None and slope.value <= 0:
        return stats.missing("not resolved: noise hides how time grows with the number of tokens")
    return replace(stats.inverse(slope), records=tuple(map(record_id, calls)))


def _lone_and_cold(row: Record) -> bool:
    """Whether the one call of an arm with a growing cache had only short calls before it."""
    before, calls = row.samples.get("warmup_s") or [], row.samples["e2e_s"]
    grows = row.key.get("cache") == "dynamic"
    return bool(grows and before and len(calls) == 1 and max(before) < calls[0] / 2)


def marked_tok_per_s(rows: Sequence[Record]) -> Estimate:
    """Decode throughput a second way: steps over their time by the device's clock (tok/s).

    No slope and no prefill in it, so that noise of the host's does not reach it; what the host
    adds between steps it does see.
    """
    calls = [r for r in rows if r.samples.get("decode_s")]
    if not calls:
        return stats.missing("not measured: only captured steps are marked on the device")
    steps = [t / (r.key["new_tokens"] - 1) for r in calls for t in r.samples["decode_s"]]
    return replace(stats.inverse(stats.median(steps)), records=tuple(map(record_id, calls)))


def ttft_ms(series: Series, context: int, new_tokens: int) -> Estimate:
    """Median time of generate() with one new token, prefill included (ms)."""
    return estimate(samples(series, "latency", "ttft_s", context, 1), factor=1e3)


def p50_ms(series: Series, context: int, new_tokens: int) -> Estimate:
    """Median wall time of the whole call (ms)."""
    return estimate(samples(series, "latency", "e2e_s", context, new_tokens), factor=1e3)


def p95_ms(series: Series, context: int, new_tokens: int) -> Estimate:
    """95th percentile of the wall time (ms), or the largest of n where n is too small."""
    return estimate(samples(series, "latency", "e2e_s", context, new_tokens), 95, 1e3)


def output_tok_per_s(
    series: Series, context: int, new_tokens: int, kind: str = "latency"
) -> Estimate:
    """Generated tokens / median wall time of the call, prefill included: the paper's TPOT."""
    return stats.inverse(estimate(samples(series, kind, "e2e_s", context, new_tokens)), new_tokens)


def joules_per_1k(
    series: Series, context: int, new_tokens: int, name: str = "energy_j"
) -> Estimate:
    """Median gross joules of a call / generated tokens x 1000, by the energy counter."""
    return estimate(samples(series, "energy", name, context, new_tokens), factor=1e3 / new_tokens)


def tokens_per_j(series: Series, context: int, new_tokens: int) -> Estimate:
    """Generated tokens per gross joule: what the paper calls tokens/W."""
    return stats.inverse(joules_per_1k(series, context, new_tokens), 1e3)


def peak_mib(series: Series, context: int, new_tokens: int) -> Estimate:
    """Allocator peak in the paper's protocol, in MiB (2^20 bytes): one reading, no interval."""
    row = series.one("memory-paper", context=context, new_tokens=new_tokens)
    if row is None:
        return stats.missing(series.reason or f"not measured: no memory-paper row at {context}")
    value = row.value("peak_bytes")
    if row.error or value is None:
        reason = row.missing.get("peak_bytes", "no peak")
        return stats.missing(f"failed: {row.error}" if row.error else f"not measured: {reason}")
    return stats.exact(value / MIB)


def tok_per_s_per_1000_mib(series: Series, context: int, new_tokens: int) -> Estimate:
    """Output throughput / (peak MiB / 1000): the paper's TPOT/GB by its own arithmetic."""
    peak = peak_mib(series, context, new_tokens)
    if peak.value is None:
        return peak
    return stats.scaled(output_tok_per_s(series, context, new_tokens), 1e3 / peak.value)


@dataclass(frozen=True)
class Ape:
    """Each field is an Estimate; units in the name. The paper's names are in the comments."""

    tok_per_s_per_b: Estimate  # APE-TPOT
    inverse_ttft_per_s_per_b: Estimate  # APE-1/TTFT
    tok_per_j_per_b: Estimate  # APE-Energy
    tok_per_s_per_gb: Estimate  # TPOT/GB


def ape(
    *,
    active_params: int,
    output_tok_per_s: Estimate,
    ttft_s: Estimate,
    tok_per_j: Estimate,
    peak_bytes: int | None,
) -> Ape:
    """The four formulas; a missing input leaves its own formula missing, with the reason."""
    if active_params <= 0:
        raise ValueError(f"active parameters must be positive, got {active_params}")
    per_b = 1e9 / active_params
    return Ape(
        tok_per_s_per_b=scaled(output_tok_per_s, per_b),
        inverse_ttft_per_s_per_b=scaled(inverse(ttft_s), per_b),
        tok_per_j_per_b=scaled(tok_per_j, per_b),
        tok_per_s_per_gb=(
            missing("no peak memory was measured")
            if peak_bytes is None
            else scaled(output_tok_per_s, 1e9 / peak_bytes)
        ),
    )


def active_billion(series: Series, context: int = 0, new_tokens: int = 0) -> Estimate:
    """Nominal active parameters by architecture (10^9), counted on the model card."""
    card = series.one("card")
    if card is None or card.value("active_params") is None:
        return stats.missing("not measured: no model card among the rows")
    return Estimate(card.value("active_params") / 1e9, n=1, method="counted")


def ape_tpot(series: Series, context: int, new_tokens: int) -> Estimate:
    """Output throughput per active 10^9 parameters (tok/s/B)."""
    return _efficiency(series, context, new_tokens, "tok_per_s_per_b")


def ape_ttft(series: Series, context: int, new_tokens: int) -> Estimate:
    """1 / TTFT per active 10^9 parameters (1/s/B)."""
    return _efficiency(series, context, new_tokens, "inverse_ttft_per_s_per_b")


def ape_energy(series: Series, context: int, new_tokens: int) -> Estimate:
    """Tokens per joule and active 10^9 parameters (tokens/J/B)."""
    return _efficiency(series, context, new_tokens, "tok_per_j_per_b")


def _efficiency(series: Series, context: int, new_tokens: int, name: str) -> Estimate:
    """One quotient of `analysis.efficiency` on nominal active parameters."""
    active = active_billion(series)
    if active.value is None:
        return active
    arm = (series, context, new_tokens)
    quotients = ape(
        active_params=round(active.value * 1e9),
        output_tok_per_s=output_tok_per_s(*arm),
        ttft_s=stats.scaled(ttft_ms(*arm), 1e-3),
        tok_per_j=tokens_per_j(*arm),
        peak_bytes=None,
    )
    return getattr(quotients, name)


def throughput_change_pct(before: tuple[list, str], after: tuple[list, str]) -> Estimate:
    """Change of output throughput in percent from one arm to another (bootstrap interval).

    Throughput is tokens / time, so its ratio is the inverse ratio of the times.
    """
    for values, reason in (before, after):
        if not values:
            return stats.missing(reason)
    return percent_change(stats.ratio(before[0], after[0]))


def percent_change(estimate: Estimate) -> Estimate:
    """A ratio as a change in percent: 100 (r - 1)."""
    ends = {
        k: None if (v := getattr(estimate, k)) is None else 100 * (v - 1)
        for k in ("value", "low", "high")
    }
    return replace(estimate, **ends)


def _itl_ms(rows: Sequence[Record], gaps: Sequence[float]) -> Estimate:
    """Median gap between tokens (ms). Steps of one call are correlated: no interval is given."""
    if not gaps:
        return sampled([r for r in rows if r.kind == "itl"], "token_s")
    middle = stats.median(gaps)
    return Estimate(
        middle.value * 1e3,
        n=middle.n,
        method="median of all gaps",
        reason="steps of one call are correlated: no interval",
    )


def _reading(row: Record, name: str, factor: float = 1, *, like: str = "") -> Estimate:
    """A single reading, or why there is none: the reason of `like` where it has none of its own."""
    if row.value(name) is not None:
        return replace(stats.exact(row.values[name] * factor), records=(record_id(row),))
    if row.error:
        return stats.missing(f"failed: {row.error}")
    reason = row.missing.get(name) or row.missing.get(like) or "no reading"
    return stats.missing(f"not measured: {reason}")


def _shapes(group: Group) -> set[Shape]:
    return {(r.key["context"], r.key["new_tokens"]) for r in group.rows}


def _longest(shapes: set[Shape]) -> Shape:
    """The longest context, and there the fewest new tokens."""
    return max(shapes, key=lambda shape: (shape[0], -shape[1]))


def _lower_first(text: str) -> str:
    return text if text.isupper() else text[0].lower() + text[1:]
