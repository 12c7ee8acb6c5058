"""The steady window of a run by a stated rule, and the latencies of a request.

A request is its facts, a dict of FACTS; times are seconds of the run. A latency counts from the
scheduled instant, and belongs to the window in which its request was scheduled; a token belongs to
the one in which it came. What was scheduled during the warm-up is still being answered when the
window starts: nothing is drained. Both wings read this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lib.measure.serving.arrivals import Load

Fact = dict[str, Any]
# The instants and counts of a request that a record keeps, a column each. `first_s` and `last_s`
# are when the first and the last tokens came, `first_tokens` how many came at `first_s` (None where
# that is not known), `failure` a class or "".
FACTS = (
    "scheduled_s", "sent_s", "first_s", "visible_s", "last_s", "end_s", "first_tokens",
    "prompt_tokens", "cached_tokens", "output_tokens", "asked_tokens", "chunks", "failure",
)  # fmt: skip
SHARE = 0.9  # of the users: the least concurrency of a closed loop's window
GROWTH = 1.5  # of the requests in flight, last quarter over first, above which a queue grows
GROWTH_SLACK = 2.0
LEAST_ENERGY_S = 20.0  # the board's counter ticks every 0.1 s, so that 20 s are known to 0.5 %


@dataclass(frozen=True)
class Window:
    """A stretch of a run. `reason` says why it is not steady, or why there is none."""

    start_s: float
    stop_s: float
    rule: str
    reason: str = ""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.stop_s - self.start_s

    @property
    def whole_seconds(self) -> int:
        """Seconds that lie inside as a whole."""
        return int(self.seconds + 1e-6)

    def holds(self, t_s: float) -> bool:
        """Whether an instant lies inside; the start does, the stop does not."""
        return self.start_s <= t_s < self.stop_s


def in_flight(facts: Sequence[Fact]) -> list[tuple[float, int]]:
    """(instant, requests in flight from then on), from the scheduled instant to the end."""
    changes: dict[float, int] = {}
    for fact in facts:
        changes[fact["scheduled_s"]] = changes.get(fact["scheduled_s"], 0) + 1
        changes[fact["end_s"]] = changes.get(fact["end_s"], 0) - 1
    steps, count = [], 0
    for t in sorted(changes):
        count += changes[t]
        steps.append((t, count))
    return steps


def mean_in_flight(steps: Sequence[tuple[float, int]], start_s: float, stop_s: float) -> float:
    """Mean number of requests in flight between two instants."""
    total = 0.0
    for (t, count), (after, _) in pairwise([*steps, (float("inf"), 0)]):
        total += count * max(0.0, min(after, stop_s) - max(t, start_s))
    return total / (stop_s - start_s)


def busy_s(steps: Sequence[tuple[float, int]], start_s: float, stop_s: float) -> float:
    """Seconds between two instants with at least one request in flight."""
    ones = [(t, min(count, 1)) for t, count in steps]
    return mean_in_flight(ones, start_s, stop_s) * (stop_s - start_s)


def steady(facts: Sequence[Fact], load: Load, warmup_s: float, stop_s: float) -> Window:
    """The steady window between the end of the warm-up and `stop_s`, while requests still start.

    Closed loop: the longest stretch with at least SHARE of the users in flight. Open loop:
    all of it, and steady unless the requests in flight grow by more than GROWTH from its first to
    its last quarter (and GROWTH_SLACK more): then the server does not keep up with the rate.
    """
    if load.users is None:
        rule = f"from {warmup_s:g} s on, while arrivals go on"
        if not any(warmup_s <= fact["scheduled_s"] < stop_s for fact in facts):
            return Window(warmup_s, stop_s, rule, "no request was scheduled in the window")
        steps, quarter = in_flight(facts), (stop_s - warmup_s) / 4
        first = mean_in_flight(steps, warmup_s, warmup_s + quarter)
        last = mean_in_flight(steps, stop_s - quarter, stop_s)
        grows = last > GROWTH * first + GROWTH_SLACK
        text = f"the queue grows: {first:.1f} requests in flight at first, {last:.1f} at last"
        return Window(warmup_s, stop_s, rule, text if grows else "")
    rule = (
        f"longest stretch from {warmup_s:g} s on with {SHARE:.0%} of {load.users} users in flight"
    )
    start_s, end_s = longest(in_flight(facts), warmup_s, stop_s, SHARE * load.users)
    if end_s <= start_s:
        return Window(warmup_s, warmup_s, rule, "so many were never in flight after the warm-up")
    share = (end_s - start_s) / (stop_s - warmup_s)
    text = f"the load held for {share:.0%} of the time only: requests failed, or were too few"
    return Window(start_s, end_s, rule, text if share < SHARE else "")


def longest(
    steps: Sequence[tuple[float, int]], start_s: float, stop_s: float, least: float
) -> tuple[float, float]:
    """The longest stretch between two instants with at least `least` requests in flight."""
    spans = [
        (max(t, start_s), min(after, stop_s), count)
        for (t, count), (after, _) in pairwise([*steps, (float("inf"), 0)])
        if min(after, stop_s) > max(t, start_s)
    ]
    best, current = (start_s, start_s), None
    for begin, end, count in spans:
        if count < least:
            current = None
            continue
        current = (current[0] if current else begin, end)
        if current[1] - current[0] > best[1] - best[0]:
            best = current
    return best


def scheduled_in(facts: Iterable[Fact], window: Window) -> list[Fact]:
    """Requests of the window, without those that the client itself cancelled."""
    return [f for f in facts if window.holds(f["scheduled_s"]) and f["failure"] != "cancelled"]


def ttft_s(fact: Fact) -> float | None:
    """From the scheduled instant to the first token of any channel; None where no token came."""
    return None if fact["first_s"] is None else fact["first_s"] - fact["scheduled_s"]


def visible_s(fact: Fact) -> float | None:
    """From the scheduled instant to the first visible text; None where there was none."""
    return None if fact["visible_s"] is None else fact["visible_s"] - fact["scheduled_s"]


def tpot_s(fact: Fact) -> float | None:
    """Mean gap between tokens: from the first instant that brought tokens to the last, over the
    tokens after those that came first, whose gaps nobody saw.

    None where none came after them, or where it is not known how many a chunk carried.
    """
    if fact["first_tokens"] is None or fact["output_tokens"] is None:
        return None
    after = fact["output_tokens"] - fact["first_tokens"]
    return (fact["last_s"] - fact["first_s"]) / after if after > 0 else None


def latency_s(fact: Fact) -> float:
    """From the scheduled instant to the end of the answer, or to the failure."""
    return fact["end_s"] - fact["scheduled_s"]


def delay_s(fact: Fact) -> float | None:
    """The client's own delay: from the scheduled instant until the request was handed over."""
    return None if fact["sent_s"] is None else fact["sent_s"] - fact["scheduled_s"]


def cut_to_seconds(window: Window) -> Window:
    """The window cut to whole seconds, so that its tokens and its joules are of the same time."""
    return Window(window.start_s, window.start_s + int(window.seconds), window.rule, window.reason)
