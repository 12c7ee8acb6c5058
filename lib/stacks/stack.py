"""What a stack is, what it returns, and what it raises for a model that it cannot run.

A stack is opened for a net and called as `stack(ids, new_tokens, on_token=None) -> Decoded`. It
produces exactly `new_tokens` tokens: the end-of-sequence token never stops it. `on_token` is called
after each token has reached the host, which costs a synchronisation, so that timed runs leave it
out. `stack.forced_logits(ids, continuation)` gives the logits that the same path computes along a
given continuation, for the check of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


# Of the logits' norm: a check that lets more pass cannot tell a wrong stack. Where experts are
# pinned, right ones differ by 1 to 4 % on an H100; dense ones of 60 layers by up to 10 %.
MOST_ERROR, MOST_ERROR_DENSE = 0.10, 0.125
# Of some layers of a dense net in FP8 against bfloat16: right ones differ by 0.2 to 0.5, by the
# rounding of weights and activations, wrong ones by 1.2 and more; half way, by the root of two,
# are logits that have nothing in common.
MOST_ERROR_FP8 = 2**-0.5


class StackError(ValueError):
    """A stack that cannot run a model; the message says why, and what can."""


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
    device sets their pace. One that `samples` decodes otherwise than greedily too. One that is
    `apart` is an engine in a process of its own, and a `Subject` itself: no net is opened on it.
    One that `shards` splits a model over several GPUs of a host.
    `rehearse` runs the stack with a twin of a net that has shapes and no values, and raises what
    keeps it from it.
    """

    name: str
    title: str
    cache: str
    open: Callable[..., Generate]
    decode_experts: Callable[[Any], str | None]
    captured: bool = False
    samples: bool = False
    apart: bool = False
    shards: bool = False
    rehearse: Callable[[Any], None] | None = None


class Subject(Protocol):
    """What can be measured: a loaded model on a stack, an engine in a process of its own, a server.

    `card` is None where the architecture is not known. `key` gives the key fields of a record, with
    what differs as `changes`; `values` what every row says of the subject. `prompt` gives token ids
    (batch, context) as `generate` takes them, each row its own. `generate` makes exactly the tokens
    asked for. `clock_s` are monotonic seconds; `synchronize` returns when all of it is done. One
    whose board can be read has `clocks_state`, what `hardware.device` says of it.
    """

    name: str
    card: Any

    @property
    def values(self) -> dict[str, Any]: ...

    def key(self, **changes: Any) -> dict[str, Any]: ...

    def prompt(self, context: int, *, seed: int, batch: int = 1) -> Any: ...

    def generate(
        self, ids: Any, new_tokens: int, on_token: Callable[[], None] | None = None
    ) -> Any: ...

    def synchronize(self) -> None: ...

    def clock_s(self) -> float: ...
