"""What one load of one server says: every value is derived here from its samples.

A record's samples hold a column for each fact of its requests (`lib.measure.serving.window.FACTS`),
and the tokens that came in each second of its window. A latency is of the requests scheduled in the
window, counts from the scheduled instant, and has the failures beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from lib import stats
from lib.analysis import physics
from lib.measure.serving import window as windows
from lib.measure.serving.arrivals import Load
from lib.measure.serving.window import FACTS, Fact, Window
from lib.records.record import Record
from lib.stats import Estimate, exact, missing

KIND, MIX = "serving", "serving-mix"
KINDS = (KIND, MIX)
BLOCK_S = 5  # of tokens: a block is one sample of the throughput, since seconds are not independent


@dataclass(frozen=True)
class Limits:
    """What a request must keep to be good: s to the first token, s a token after it, s in all."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True)
class Goodput:
    """Requests that kept the limits, of those scheduled in the window; failures are misses."""

    good: int
    of: int
    seconds: float
    failed: int

    @property
    def share(self) -> float | None:
        """Good ones of all; None where no request was scheduled."""
        return self.good / self.of if self.of else None

    @property
    def per_s(self) -> float | None:
        """Good requests a second; None where there is no window."""
        return self.good / self.seconds if self.seconds else None


def facts(record: Record) -> list[Fact]:
    """The requests of a record, one dict each."""
    rows = zip(*(record.samples[name] for name in FACTS), strict=True)
    return [dict(zip(FACTS, row, strict=True)) for row in rows]


def load(record: Record) -> Load:
    """How the server was loaded."""
    return Load(record.values["law"], record.values["load"])


def window(record: Record) -> Window:
    """The steady window."""
    v = record.values
    return Window(v["window_start_s"], v["window_stop_s"], v["window_rule"], v["window_reason"])


ALONE = Load("closed", 1)
FIGURES: dict[str, Callable[[Fact], float | None]] = {
    "ttft_s": windows.ttft_s,
    "visible_s": windows.visible_s,
    "tpot_s": windows.tpot_s,
    "latency_s": windows.latency_s,
    "delay_s": windows.delay_s,
}


def percentile(record: Record, figure: str, q: float) -> Estimate:
    """The q-th percentile of one of FIGURES over the answered requests of the window (s).

    Requests that are served together wait together, so that they are no repetitions: only those of
    a single user, who sends one after the other, have an interval.
    """
    mine = in_window(record)
    values = [FIGURES[figure](fact) for fact in mine if not fact["failure"]]
    values = [value for value in values if value is not None]
    if not values:
        return missing(f"none of {len(mine)} requests of the window has {figure}")
    tail = stats.percentile(values, q)
    if load(record) == ALONE:
        return tail
    why = tail.reason or "requests that are served together are correlated: no interval"
    return replace(tail, low=None, high=None, level=stats.CONFIDENCE, reason=why)


def in_window(record: Record) -> list[Fact]:
    """Requests that were scheduled in the window, without those that the client cancelled."""
    return windows.scheduled_in(facts(record), window(record))


def failed(record: Record) -> int:
    """How many requests of the window failed; they are in no percentile."""
    return sum(bool(fact["failure"]) for fact in in_window(record))


def gaps(record: Record, q: float = 50) -> Estimate:
    """A percentile of the gaps between tokens that were seen (s): no interval, since the gaps of
    one answer are correlated."""
    times_s = record.samples.get("itl_s") or []
    if not times_s:
        return missing("no gap between two tokens was seen: each chunk carried several")
    tail = stats.percentile(times_s, q)
    why = tail.reason or "gaps of one answer are correlated: no interval"
    return Estimate(tail.value, n=record.values["itl_count"], method=tail.method, reason=why)


def goodput(record: Record, limits: Limits | None = None) -> Goodput:
    """Requests that kept every limit, by default those stated before the measurement.

    A failure is a miss, and so is a figure that lacks. The time between tokens of an answer of one
    token, or of one chunk, keeps any limit.
    """
    limits = limits or _limits(record)
    mine = in_window(record)
    good = sum(not fact["failure"] and _keeps(fact, limits) for fact in mine)
    return Goodput(good, len(mine), window(record).seconds, failed(record))


def good_per_s(record: Record) -> Estimate:
    """Requests a second that kept the limits."""
    good = goodput(record)
    if good.per_s is None:
        return missing(window(record).reason)
    return exact(good.per_s, f"{good.good} of {good.of} requests, {good.failed} failed")


def good_share(record: Record) -> Estimate:
    """Share of the window's requests that kept the limits."""
    good = goodput(record)
    if good.share is None:
        return missing("no request was scheduled in the window")
    return exact(good.share, f"{good.good} of {good.of} requests, {good.failed} failed")


def _limits(record: Record) -> Limits:
    return Limits(*(record.value(f"limit_{name}") for name in ("ttft_s", "tpot_s", "latency_s")))


def _keeps(fact: Fact, limits: Limits) -> bool:
    first, each = windows.ttft_s(fact), windows.tpot_s(fact)
    if limits.ttft_s is not None and (first is None or first > limits.ttft_s):
        return False
    if limits.tpot_s is not None:
        if each is None and fact["first_tokens"] != fact["output_tokens"]:
            return False  # it has gaps that nobody can tell
        if each is not None and each > limits.tpot_s:
            return False
    return limits.latency_s is None or windows.latency_s(fact) <= limits.latency_s


def tokens_per_s(record: Record, which: str = "output_tokens") -> Estimate:
    """Tokens a second over the window, `which` being output_tokens or prompt_tokens.

    The mean over blocks of BLOCK_S seconds with a t interval; shorter windows have none.
    """
    seconds = record.samples.get(f"{which}_by_s", [])
    if not seconds:
        return missing(record.missing.get(f"{which}_by_s", "the window has no whole second"))
    blocks = [
        sum(seconds[n : n + BLOCK_S]) / BLOCK_S
        for n in range(0, len(seconds) - BLOCK_S + 1, BLOCK_S)
    ]
    value = sum(seconds) / len(seconds)
    if len(blocks) < 2:
        return exact(value, f"mean over {len(seconds)} s")
    mean = stats.mean(blocks)
    return Estimate(value, mean.low, mean.high, mean.n, f"mean of blocks of {BLOCK_S} s")


def requests_finished(record: Record) -> int:
    """Requests that were answered as asked and whose answer ended in the window."""
    at = window(record)
    return sum(not fact["failure"] and at.holds(fact["end_s"]) for fact in facts(record))


def requests_per_s(record: Record) -> Estimate:
    """Answers that ended in the window, over its seconds."""
    seconds = window(record).seconds
    if not seconds:
        return missing(window(record).reason)
    return exact(requests_finished(record) / seconds, "answers that ended in the window")


def _of_energy(record: Record, per: float, method: str, none: str) -> Estimate:
    """Energy of the window over something that there was in it."""
    energy = record.value("energy_j")
    if energy is None or not per:
        return missing(record.missing.get("energy_j") or none)
    return exact(energy / per, method)


def joules_per_1k(record: Record, which: str = "output_tokens") -> Estimate:
    """Gross joules per 1,000 tokens of the same window, prompts, idle and all."""
    tokens = sum(record.samples.get(f"{which}_by_s", []))
    none = f"no {which} came in the window"
    return _of_energy(record, tokens / 1000, "energy of the window over its tokens", none)


def joules_per_request(record: Record) -> Estimate:
    """Gross joules of the window over the requests whose answer ended in it."""
    method = "energy of the window over the requests that ended in it"
    none = "no request ended in the window"
    return _of_energy(record, requests_finished(record), method, none)


def mean_w(record: Record) -> Estimate:
    """Mean power of the board over the window."""
    method = "energy of the window over its time"
    return _of_energy(record, window(record).seconds, method, "there is no window")


def idle_share(record: Record) -> Estimate:
    """Share of the window's energy that the idle board would have drawn in the same time."""
    energy, idle_w = record.value("energy_j"), record.value("idle_w")
    if energy is None or idle_w is None:
        reasons = (record.missing.get(name) for name in ("energy_j", "idle_w"))
        return missing(next(filter(None, reasons), "idle power was not measured"))
    if pairs := physics.of_energy(record):
        return missing(f"contradiction: {pairs[0].text}")
    return exact(idle_w * window(record).seconds / energy, "idle power x time over energy")


def mix(record: Record) -> dict[str, Any]:
    """The amounts and the energy of a record's window, for `attribution.fit`."""
    at = window(record)
    return {
        "energy_j": record.value("energy_j"),
        "seconds": at.seconds,
        "busy_seconds": windows.busy_s(windows.in_flight(facts(record)), at.start_s, at.stop_s),
        "prompt_tokens": sum(record.samples.get("prompt_tokens_by_s", [])),
        "output_tokens": sum(record.samples.get("output_tokens_by_s", [])),
    }


def measured(records: Iterable[Record], kind: str = KIND) -> list[Record]:
    """The serving rows that hold requests, not those of cells that failed as a whole."""
    return [row for row in records if row.kind == kind and row.error is None]
