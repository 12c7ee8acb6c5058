"""The mechanics of an energy window: warm up, idle, keep busy, and calls that fill it.

Nothing here reads power inside a window: the sampler is another process, and what it read is
judged afterwards by `hardware.validity`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lib.hardware.device import time_call

# Before and after a window the board does the same work, for the one-second mean, for the lag of
# half of it, and for a tick.
LEAD_S = 1.7
SETTLE_S = 3.0  # until clocks and the readings are those of an idle board
PLATEAU_S = 5.0  # two neighbouring spans of this length must agree
PLATEAU_POWER = 0.01
PLATEAU_C = 1.0
Call = Callable[[], Any]


@dataclass(frozen=True)
class Span:
    """When a window ran (s on the device's clock), and each of its calls."""

    start_s: float
    stop_s: float
    calls_s: tuple[tuple[float, float], ...] = ()

    @property
    def seconds(self) -> float:
        return self.stop_s - self.start_s

    def less(self, zero_s: float) -> Span:
        """The same span on a clock that starts at `zero_s`."""
        calls = tuple((a - zero_s, b - zero_s) for a, b in self.calls_s)
        return Span(self.start_s - zero_s, self.stop_s - zero_s, calls)


def counted(generate: Callable[..., Any], ids: Any, new_tokens: int) -> Call:
    """A call that raises unless exactly `new_tokens` tokens came out of it."""

    def call() -> Any:
        out = generate(ids, new_tokens)
        if out.tokens.shape[-1] != new_tokens:
            raise RuntimeError(f"asked for {new_tokens} new tokens, got {out.tokens.shape[-1]}")
        return out

    return call


def tokens_for(generate: Callable[..., Any], ids: Any, device: Any, most: int) -> int:
    """How many new tokens make a call at least LEAD_S long, but not more than `most`.

    From two short calls after one that warms the shape up.
    """
    one, few = counted(generate, ids, 1), counted(generate, ids, min(most, 5))
    time_call(few, device)
    first_s, few_s = time_call(one, device)[0], time_call(few, device)[0]
    step_s = (few_s - first_s) / max(min(most, 5) - 1, 1)
    if step_s <= 0:
        return most
    return max(1, min(most, 1 + math.ceil((1.1 * LEAD_S - first_s) / step_s)))


def keep_busy(call: Call, seconds: float, device: Any) -> None:
    """Repeat a call for at least this long, where there is a readout to settle."""
    if "energy" in device.missing:
        return
    end_s = device.clock_s() + seconds
    while device.clock_s() < end_s:
        time_call(call, device)


def busy(call: Call, lead: Call, device: Any, window_s: float, rng: random.Random) -> Span:
    """Lead-in, back-to-back calls until `window_s` is full, lead-out.

    The lead-in starts at a random phase of the readouts' refresh.
    """
    return in_turn([(call, lead)], device, window_s, rng)[0]


def in_turn(
    calls: Sequence[tuple[Call, Call]], device: Any, window_s: float, rng: random.Random
) -> list[Span]:
    """Windows one after another between one lead-in and one lead-out, a (call, lead) for each.

    For calls that draw about the same power: each window is the lead of its neighbours.
    """
    device.sleep_s(rng.uniform(0.0, 0.1))
    keep_busy(calls[0][1], LEAD_S, device)
    device.synchronize()
    spans = [fill(call, device, window_s) for call, _ in calls]
    keep_busy(calls[-1][1], LEAD_S, device)
    return spans


def fill(call: Call, device: Any, window_s: float) -> Span:
    """Back-to-back calls until `window_s` is full; at least one."""
    calls_s: list[tuple[float, float]] = []
    while not calls_s or calls_s[-1][1] - calls_s[0][0] < window_s:
        start_s = device.clock_s()
        time_call(call, device)
        calls_s.append((start_s, device.clock_s()))
    return Span(calls_s[0][0], calls_s[-1][1], tuple(calls_s))


def idle(device: Any, idle_s: float) -> Span:
    """Nothing runs, with all that is loaded left where it is."""
    device.synchronize()
    device.sleep_s(SETTLE_S)
    start_s = device.clock_s()
    device.sleep_s(idle_s)
    stop_s = device.clock_s()
    device.sleep_s(LEAD_S)
    return Span(start_s, stop_s)


def warm_up(call: Call, device: Any, limit_s: float) -> dict[str, Any]:
    """Repeat a call until mean power and temperature stand still, or `limit_s` have passed.

    `warmup_s` is how long that took, `plateau` whether it stood still; without a counter it is one
    call, and `plateau` is None.
    """
    start_s = device.clock_s()
    history = [_now(device)]
    while True:
        time_call(call, device)
        history.append(_now(device))
        flat = plateau(history)
        took_s = device.clock_s() - start_s
        if flat is None or flat or took_s >= limit_s:
            return {"warmup_s": took_s, "plateau": flat}


def _now(device: Any) -> tuple[float, float | None, float | None]:
    return device.clock_s(), device.energy_j(), device.board_state().get("temperature_c")


def plateau(history: list[tuple[float, float | None, float | None]]) -> bool | None:
    """Whether the last two spans of PLATEAU_S drew the same power and had the same temperature.

    `history` holds (time, counter, temperature); None where there is no counter.
    """
    now_s, now_j, now_c = history[-1]
    if now_j is None:
        return None
    middle = next((h for h in reversed(history) if now_s - h[0] >= PLATEAU_S), None)
    early = next((h for h in reversed(history) if middle and middle[0] - h[0] >= PLATEAU_S), None)
    if early is None:
        return False
    late_w = (now_j - middle[1]) / (now_s - middle[0])
    early_w = (middle[1] - early[1]) / (middle[0] - early[0])
    moved_c = 0.0 if now_c is None or early[2] is None else abs(now_c - early[2])
    return abs(late_w - early_w) <= PLATEAU_POWER * early_w and moved_c <= PLATEAU_C
