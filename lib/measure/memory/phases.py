"""Where in a call its memory peaks: one more call, counted in stretches between hooks.

A stretch is a part of the prefill or of a decode step: the experts of a layer, the making of the
logits, or what lies between them. The measured call itself runs without any hook.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

EXPERTS, LOGITS = "experts", "logits"


@dataclass
class Trace:
    """Stretches of one call: each its name, bytes alive at its start, and at most in it.

    Bytes are above those at the start of the call. `prefill_cache` is what the function given to
    `follow` told of the cache between the prefill and the first decode step.
    """

    stretches: list[tuple[str, int, int]] = field(default_factory=list)
    prefill_cache: Any = None

    def peak_bytes(self, name: str) -> int | None:
        """The most in any stretch whose name starts so; None where there is none."""
        return max((peak for n, _, peak in self.stretches if n.startswith(name)), default=None)

    def grown_bytes(self, name: str) -> int | None:
        """The most that a stretch of exactly this name added to what lived at its start."""
        return max((peak - start for n, start, peak in self.stretches if n == name), default=None)


@contextlib.contextmanager
def follow(net: Any, device: Any, look: Callable[[Any], Any]) -> Iterator[Trace]:
    """Write down the stretches of the call in the block, by hooks on `net`.

    Names: prefill, "prefill experts", "prefill logits", and the same of decode. `look` is called
    with the cache when the prefill is over.
    """
    trace = Trace()
    handles = []
    with device.count_memory() as step:
        first, _ = step()
        now = {"name": "prefill", "start": first, "passes": 0}

        def go(name: str) -> None:
            alive, peak = step()
            trace.stretches.append((now["name"], now["start"] - first, peak - first))
            now.update(name=name, start=alive)

        def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            now["passes"] += 1
            if now["passes"] == 2:
                held = [kwargs[n] for n in ("past_key_values", "cache_params") if n in kwargs]
                trace.prefill_cache = look(held[0] if held else None)
            go(_phase(now))

        def inside(part: str) -> list[Any]:
            return [lambda *_: go(f"{_phase(now)} {part}"), lambda *_: go(_phase(now))]

        handles.append(net.register_forward_pre_hook(begin, with_kwargs=True))
        for part, module in _parts(net):
            before, after = inside(part)
            handles += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after),
            ]
        try:
            yield trace
        finally:
            for handle in handles:
                handle.remove()
        go("end")


def _phase(now: dict[str, Any]) -> str:
    return "prefill" if now["passes"] < 2 else "decode"


def _parts(net: Any) -> Iterator[tuple[str, Any]]:
    """The modules of the routed experts, by the library's name for them, and the output matrix."""
    for path, module in net.named_modules():
        if path.rpartition(".")[2] == "experts":
            yield EXPERTS, module
    head = net.get_output_embeddings()
    if head is not None:
        yield LOGITS, head
