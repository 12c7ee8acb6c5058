"""What a stack is, and what it returns.

A stack is opened for a net and called as `stack(ids, new_tokens, on_token=None) -> Decoded`. It
produces exactly `new_tokens` tokens: the end-of-sequence token never stops it. `on_token` is called
after each token has reached the host, which costs a synchronisation, so that timed runs leave it
out. `stack.forced_logits(ids, continuation)` gives the logits that the same path computes along a
given continuation, for the check of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Decoded:
    """New tokens (batch, new_tokens) and the key-value cache, still held.

    `prepare_s` are the seconds of this call that went into captures and compilations; a timed call
    has none. `decode_s`, asked after a synchronisation, gives the seconds of the device from before
    the first decode step to after the last (new_tokens - 1 steps); None where no stack marks them.
    """

    tokens: torch.Tensor
    cache: Any
    prepare_s: float = 0.0
    decode_s: Callable[[], float] | None = None


Generate = Callable[..., Decoded]


@dataclass(frozen=True)
class Stack:
    """One way to generate.

    `open` makes it for a net: (net, *, decoding, capacity) -> Generate. `decode_experts` names the
    experts implementation that its decode steps use, of a net that has a choice. `cache` grows
    (dynamic) or has a fixed size (static). `captured` steps are launched as one graph, so that the
    device sets their pace. One that `samples` decodes otherwise than greedily too.
    """

    name: str
    title: str
    cache: str
    open: Callable[..., Generate]
    decode_experts: Callable[[Any], str | None]
    captured: bool = False
    samples: bool = False
