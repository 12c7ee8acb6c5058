"""A GPU board as its readouts show it, on a clock that only moves when told to.

True power is piecewise constant, so that every energy is exact. Counter, instant reading (the mean
of 25 ms) and average (the mean of one second) refresh together every `tick_s`, at `phase_s`. The
counter integrates all of the time, or with `coverage="partial"` only the 25 ms before each refresh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lib.stacks.stack import Decoded
from tests.fakes.device import FakeCache, FakeDevice, FakeModel

SLOW = {
    "temperature_c": 60.0,
    "sm_hz": 1.98e9,
    "power_limit_w": 700.0,
    "pids": [1],
    "power_cap_s": 1.0,
    "sw_thermal_s": 1.0,
    "hw_thermal_s": 1.0,
    "power_brake_s": 1.0,
}
START_J = 5000.0  # what the counter showed long before


class Board:
    """Power over time and what is read of it. `segments` are (seconds, watts), one after another.

    Before the first and after the last segment power is `idle_w`. `fault(row)` changes or replaces
    a reading and returns it, or None for one that was never made.
    """

    def __init__(
        self,
        segments: Sequence[tuple[float, float]] = (),
        *,
        idle_w: float = 110.0,
        tick_s: float = 0.1,
        phase_s: float = 0.03,
        coverage: str = "full",
        instant_s: float = 0.025,
        average_s: float = 1.0,
        noise_w: float = 0.0,
        slow: dict[str, Any] | None = None,
        fault: Callable[[dict[str, Any]], dict[str, Any] | None] = dict,
    ) -> None:
        self.idle_w, self.tick_s, self.phase_s, self.coverage = idle_w, tick_s, phase_s, coverage
        self.instant_s, self.average_s, self.noise_w = instant_s, average_s, noise_w
        self.slow = SLOW if slow is None else slow
        self.fault = fault
        self.times, self.energy = [-100.0, 0.0], [-100.0 * idle_w, 0.0]
        for seconds, watts in segments:
            self.spend(seconds, watts)

    def spend(self, seconds: float, watts: float | None = None) -> None:
        """The next so many seconds at this power (idle if not said)."""
        watts = self.idle_w if watts is None else watts
        if seconds > 0:
            self.times.append(self.times[-1] + seconds)
            self.energy.append(self.energy[-1] + seconds * watts)

    @property
    def end_s(self) -> float:
        return self.times[-1]

    def true_j(self, start_s: float, stop_s: float) -> float:
        """What a perfect meter would have counted."""
        return float(self._e(stop_s) - self._e(start_s))

    def _e(self, t: Any) -> Any:
        """Energy since t = 0, with idle power after the last segment."""
        beyond = np.maximum(np.asarray(t) - self.end_s, 0) * self.idle_w
        return np.interp(t, self.times, self.energy) + beyond

    def trace(
        self, start_s: float, stop_s: float, period_s: float = 0.023, latency_s: float = 0.0
    ) -> list[dict[str, Any]]:
        """What the sampler would have written between two times."""
        t = np.arange(start_s, stop_s, period_s)
        k = np.floor((t - self.phase_s) / self.tick_s + 1e-9)
        at = self.phase_s + k * self.tick_s  # when the readouts were refreshed last
        instant = (self._e(at) - self._e(at - self.instant_s)) / self.instant_s
        average = (self._e(at) - self._e(at - self.average_s)) / self.average_s
        noise = self.noise_w * np.sin(7919.0 * k)  # differs from refresh to refresh
        instant, average = instant + noise, average + noise / 40
        counter = self._e(at)
        if self.coverage == "partial":
            every = np.arange(k.min() - 1, k.max() + 1)
            ends = self.phase_s + every * self.tick_s
            seen = (self._e(ends) - self._e(ends - self.instant_s)) / self.instant_s
            counter = np.interp(k, every, np.cumsum(seen) * self.tick_s)
        rows = []
        for n in range(len(t)):
            row = {
                "t_s": float(t[n]),
                "latency_s": latency_s,
                "energy_j": round(START_J + float(counter[n]), 3),
                "instant_w": round(float(instant[n]), 3),
                "power_w": round(float(average[n]), 3),
            }
            if n % 10 == 0:
                row |= self.slow
            row = self.fault(row)
            if row is not None:
                rows.append(row)
        return rows


class BoardDevice(FakeDevice):
    """A device whose board draws what `work` says; waiting and anything else is idle."""

    def __init__(self, board: Board, sampler_cost: float = 0.0) -> None:
        super().__init__(watts=board.idle_w)
        self.board, self.sampler_cost, self.sampling = board, sampler_cost, False
        self.readings_alive = True

    def work(self, seconds: float, watts: float) -> None:
        """Compute for so long at this power."""
        seconds *= 1 + (self.sampler_cost if self.sampling else 0.0)
        self.board.spend(self.now_s - self.board.end_s)
        self.board.spend(seconds, watts)
        self.now_s += seconds

    def energy_j(self) -> float:
        return self.board.trace(self.now_s, self.now_s + 0.01, 0.02)[0]["energy_j"]

    def power_w(self) -> float:
        return self.board.trace(self.now_s, self.now_s + 0.01, 0.02)[0]["power_w"]

    def clocks_state(self) -> dict[str, Any]:
        """What is read less often, as functions of time where they are functions."""
        slow = self.board.slow.items()
        return {name: value(self.now_s) if callable(value) else value for name, value in slow}

    @contextlib.contextmanager
    def power_trace(self, period_s: float = 0.023, uuids: Sequence[str] = ()):
        trace: list[dict[str, Any]] = []
        start_s, self.sampling = self.now_s, True
        yield trace
        self.sampling = False
        trace += self.board.trace(start_s, self.now_s, period_s)


class BoardModel(FakeModel):
    """Prefill at one power, decoding at another."""

    def __init__(
        self,
        device: BoardDevice,
        prefill: tuple[float, float] = (0.2, 500.0),
        token: tuple[float, float] = (0.05, 300.0),
        jitter: Callable[[], float] = lambda: 1.0,
    ) -> None:
        super().__init__(device)
        self.prefill, self.token, self.jitter = prefill, token, jitter
        self.early_stop = 0

    def open_stack(self, net: Any, *, decoding: str = "greedy", capacity: int | None = None):
        def generate(ids, new_tokens, on_token=None):
            self.calls.append(new_tokens)
            if cold := max(0, new_tokens - self.longest) * self.cold_s:
                self.device.work(cold, self.token[1])
            self.longest = max(self.longest, new_tokens)
            self.device.work(*self.prefill)
            for _ in range(new_tokens - 1):
                self.device.work(self.token[0] * self.jitter(), self.token[1])
            return Decoded(torch.zeros(ids.shape[0], new_tokens - self.early_stop), FakeCache())

        return generate
