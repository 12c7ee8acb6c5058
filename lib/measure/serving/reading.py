"""What a serving record says: every value is derived here from its samples, when it is read.

A record (kind "serving") is one load of one server. Its samples hold a column for each fact of its
requests (`timing.FACTS`), and the tokens that came in each second of its window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lib import stats
from lib.measure.serving import window as windows
from lib.measure.serving.arrivals import Load
from lib.measure.serving.timing import FACTS
from lib.measure.serving.window import Goodput, Limits, Tail, Window
from lib.records.record import Record
from lib.stats import Estimate, exact, missing

KIND = "serving"
BLOCK_S = 5  # of tokens: a block is one sample of the throughput, since seconds are not independent


def columns(facts: Sequence[dict[str, Any]]) -> dict[str, list]:
    """Facts as the columns of a record."""
    return {name: [fact[name] for fact in facts] for name in FACTS}


def facts(record: Record) -> list[dict[str, Any]]:
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


def tail(record: Record, figure: str, q: float) -> Tail:
    """A percentile of a figure (`window.FIGURES`), failures beside it."""
    return windows.tail(facts(record), window(record), figure, q)


def goodput(record: Record, limits: Limits) -> Goodput:
    """Requests that kept the limits."""
    return windows.goodput(facts(record), window(record), limits)


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
    if len(blocks) < 2:
        return exact(sum(seconds) / len(seconds), f"mean over {len(seconds)} s")
    mean = stats.mean(blocks)
    value = sum(seconds) / len(seconds)
    return Estimate(value, mean.low, mean.high, mean.n, f"mean of blocks of {BLOCK_S} s")


def requests_finished(record: Record) -> int:
    """Requests that were answered as asked and whose answer ended in the window."""
    at = window(record)
    return sum(not fact["failure"] and at.holds(fact["end_s"]) for fact in facts(record))


def joules(record: Record) -> tuple[float | None, str]:
    """Energy of the window, or None and why."""
    return record.value("energy_j"), record.missing.get("energy_j", "")


def joules_per_1k(record: Record, which: str = "output_tokens") -> Estimate:
    """Gross joules per 1,000 tokens of the same window, prompts, idle and all."""
    energy, reason = joules(record)
    tokens = sum(record.samples.get(f"{which}_by_s", []))
    if energy is None or not tokens:
        return missing(reason or f"no {which} came in the window")
    return exact(1000 * energy / tokens, "energy of the window over its tokens")


def joules_per_request(record: Record) -> Estimate:
    """Gross joules of the window over the requests whose answer ended in it."""
    energy, reason = joules(record)
    count = requests_finished(record)
    if energy is None or not count:
        return missing(reason or "no request ended in the window")
    return exact(energy / count, "energy of the window over the requests that ended in it")


def idle_share(record: Record) -> Estimate:
    """Share of the window's energy that the idle board would have drawn in the same time."""
    energy, reason = joules(record)
    idle_w = record.value("idle_w")
    if energy is None or idle_w is None:
        return missing(reason or record.missing.get("idle_w", "idle power was not measured"))
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


def measured(records: Iterable[Record]) -> list[Record]:
    """The serving rows that hold requests, not those of cells that failed as a whole."""
    return [row for row in records if row.kind == KIND and row.error is None]
