"""Fakes for the hardware seam: a clock that only moves when told to, counters with known steps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from lib.hardware.profiler import Work
from lib.records.record import KEY_FIELDS
from lib.stacks.registry import STACKS
from lib.stacks.stack import Decoded, Stack


class FakeDevice:
    """Time moves by `tick_s` at each reading of the clock and by what the work itself takes."""

    kind = "fake"
    torch_device = "cpu"
    memory_source = "fake allocator"
    own_processes = (1,)

    def __init__(self, tick_s: float = 0.0, watts: float | None = None) -> None:
        self.now_s, self.tick_s, self.watts = 0.0, tick_s, watts
        self.syncs = 0
        self.allocated, self.peak = 1000, 1000
        self.missing = {} if watts is not None else {"energy": "no counter on the fake"}
        self.busy_share = 0.5  # of the time of a call, with 100 kernels a second

    def clock_s(self) -> float:
        self.now_s += self.tick_s
        return self.now_s

    def sleep_s(self, seconds: float) -> None:
        self.now_s += seconds

    def synchronize(self) -> None:
        self.syncs += 1

    def empty_cache(self) -> None:
        self.allocated = 1000

    def allocate(self, count: int) -> None:
        self.allocated += count
        self.peak = max(self.peak, self.allocated)

    @contextlib.contextmanager
    def watch_memory(self, resident_bytes: int):
        usage = {"baseline_bytes": self.allocated, "reserved_bytes": None, "used_bytes": None}
        self.peak = self.allocated
        yield usage
        usage |= {"peak_bytes": self.peak, "held_bytes": self.allocated}

    def busy(self, call) -> Work | None:
        """100 kernels a second: of four launches three are the same."""
        start_s = self.now_s
        call()
        busy_s, kernels = (self.now_s - start_s) * self.busy_share, 100 * (self.now_s - start_s)
        by_name = {
            name: (round(kernels * part), busy_s * part)
            for name, part in (("gemv", 0.75), ("softmax", 0.25))
        }
        return Work(busy_s, round(kernels), by_name)

    @contextlib.contextmanager
    def count_memory(self):
        def step() -> tuple[int, int]:
            most, self.peak = self.peak, self.allocated
            return self.allocated, most

        step()
        yield step

    def process_bytes(self) -> int | None:
        return None

    def gpu_used_bytes(self) -> int | None:
        return None

    def free_bytes(self) -> int:
        return 10**9

    def energy_j(self) -> float | None:
        return None if self.watts is None else self.watts * self.now_s

    def power_w(self) -> float | None:
        return self.watts

    def gpus_of(self, net: Any) -> list[str]:
        return []

    def board_state(self) -> dict[str, Any]:
        return {}

    def clocks_state(self) -> dict[str, Any]:
        return {}

    @contextlib.contextmanager
    def power_trace(self, period_s: float = 0.025, uuids: Sequence[str] = ()):
        """A constant load seen through a counter that ticks every 0.1 s."""
        trace: list[dict[str, float]] = []
        start_s = self.now_s
        yield trace
        if self.watts is None:
            return
        steps = int((self.now_s - start_s) / period_s) + 1
        for step in range(steps):
            t_s = start_s + step * period_s
            energy_j = self.watts * (int(t_s / 0.1 + 1e-9) * 0.1)
            trace.append({"t_s": t_s, "energy_j": energy_j, "power_w": self.watts})

    def environment(self) -> dict[str, Any]:
        return {"gpu": "Fake GPU", "device": "fake"}


class FakeCache:
    """One layer of two tensors of 50 float32 numbers each: 400 bytes."""

    def __init__(self) -> None:
        self.layers = [SimpleNamespace(keys=torch.zeros(50), values=torch.zeros(50))]


class FakeModel:
    """A model whose calls take `prefill_s + token_s * new_tokens` on the fake clock.

    Each token beyond the longest call so far takes `cold_s` more, as where a growing cache makes
    the allocator ask the driver for memory.
    """

    def __init__(
        self, device: FakeDevice, prefill_s: float = 1.0, token_s: float = 0.1, cold_s: float = 0.0
    ) -> None:
        self.device, self.prefill_s, self.token_s = device, prefill_s, token_s
        self.cold_s, self.longest = cold_s, 0
        self.name, self.tokenizer, self.vocab_size, self.special_ids = "fake", None, 100, ()
        self.source = {"model_source": "fake", "model_revision": None, "loaded_dtype": "bfloat16"}
        self.net = self
        self.calls: list[int] = []
        self.load_s = 0.5
        self.card = SimpleNamespace(
            as_dict=lambda: {"total_params": 10},
            weight_bytes=20,
            context_limit=4096,
            vocab_size=100,
            experts=None,
            kv_bytes=lambda tokens: 400,
            decode_bytes=lambda context, batch=1: 10**6,
        )

    def key(self, **changes: Any) -> dict[str, Any]:
        base = {
            "model": "fake",
            "weights": "random",
            "dtype": "bfloat16",
            "experts": "none",
            "attention": "sdpa",
            "cache": "dynamic",
            "batch": 1,
        }
        assert changes.keys() <= set(KEY_FIELDS)
        return {**base, **changes}

    def get_input_embeddings(self) -> Any:
        """A table with a row for each token."""
        return SimpleNamespace(num_embeddings=self.vocab_size)

    def named_modules(self) -> list:
        """No parts."""
        return []

    def open_stack(self, net: Any, *, decoding: str = "greedy", capacity: int | None = None):
        """A decode stack for `stacks.registry.STACKS`."""

        def generate(ids, new_tokens, on_token=None):
            self.calls.append(new_tokens)
            self.device.now_s += self.prefill_s + self.cold_s * max(0, new_tokens - self.longest)
            self.longest = max(self.longest, new_tokens)
            self.device.allocate(600)  # 400 of cache, 200 of workspace
            for _ in range(new_tokens):
                self.device.now_s += self.token_s
                if on_token:
                    on_token()
            return Decoded(torch.zeros(ids.shape[0], new_tokens), FakeCache())

        return generate


def opened(name: str, open_stack: Any) -> Stack:
    """The entry of a stack, opened by a fake."""
    return replace(STACKS[name], open=open_stack)
