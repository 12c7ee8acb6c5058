"""Decode stacks behind one signature.

A stack is made for a net and called as `stack(ids, new_tokens, on_token=None) -> Decoded`. It
produces exactly `new_tokens` tokens: the end-of-sequence token never stops it. `on_token` is called
after each token has reached the host, which costs a synchronisation, so that timed runs leave it
out. `stack.forced_logits(ids, continuation)` gives the logits that the same path computes along a
given continuation, for the correctness gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

from lib import experts, fused, rehearsal
from lib.decoded import Decoded, StackError
from lib.generate import DECODING, GenerateStack, rehearse_static
from lib.graphs import GraphStack

__all__ = [
    "DECODING",
    "STACKS",
    "Decoded",
    "Generate",
    "StackError",
    "as_in_decode",
    "experts_in_decode",
    "open_stack",
]

Generate = Callable[..., Decoded]


def hf_eager(net: Any, *, decoding: str = "greedy", capacity: int | None = None) -> GenerateStack:
    """`generate()` of transformers with its dynamic cache, as the paper used it."""
    return GenerateStack(net, decoding=decoding)


def hf_static(net: Any, *, decoding: str = "greedy", capacity: int | None = None) -> GenerateStack:
    """`generate()` with a static cache and, on a GPU, the compilation that the library offers."""
    return GenerateStack(net, decoding=decoding, static=True, capacity=capacity)


def graph(net: Any, *, decoding: str = "greedy", capacity: int | None = None) -> GraphStack:
    """The library's decode step captured as a CUDA graph; nothing is compiled."""
    _require_greedy("graph", decoding)
    return GraphStack(net, capacity=capacity)


def graph_compiled(
    net: Any, *, decoding: str = "greedy", capacity: int | None = None
) -> GraphStack:
    """The captured step with each decoder layer fused by torch.compile."""
    _require_greedy("graph-compiled", decoding)
    return GraphStack(net, capacity=capacity, around=fused.Layers(net))


STACKS: dict[str, Callable[..., Any]] = {
    "hf-eager": hf_eager,
    "hf-static": hf_static,
    "graph": graph,
    "graph-compiled": graph_compiled,
}


# How a stack is tried with a twin of a net that has shapes and no values.
REHEARSED: dict[str, Callable[[Any], None]] = {
    "hf-static": rehearse_static,
    "graph": lambda twin: GraphStack(twin).rehearse(),
    "graph-compiled": lambda twin: GraphStack(
        twin, around=fused.Layers(twin, compiled=False)
    ).rehearse(),
}


def open_stack(
    name: str, net: Any, *, decoding: str = "greedy", capacity: int | None = None
) -> Generate:
    """The stack of that name for a net; a clear error for an unknown stack or decoding.

    `capacity` is the longest sequence (tokens, prompt included) of the calls to come: a stack with
    fixed buffers then prepares once, in the first call.
    """
    if name not in STACKS:
        raise ValueError(f"unknown stack {name!r}; known: {sorted(STACKS)}")
    if decoding not in DECODING:
        raise ValueError(f"unknown decoding {decoding!r}; known: {list(DECODING)}")
    stack = STACKS[name](net, decoding=decoding, capacity=capacity)
    if name in REHEARSED:
        stack.before = partial(require_runs, name, net)
    return stack


def require_runs(name: str, net: Any) -> None:
    """Raise a StackError where a stack cannot run a net, before it does any work with it.

    A stack asks this itself in its first call.
    """
    if name in REHEARSED:
        rehearsal.require(name, net, REHEARSED[name])


def _require_greedy(stack: str, decoding: str) -> None:
    if decoding != "greedy":
        raise ValueError(
            f"the stack {stack!r} decodes greedily only, not {decoding!r}; "
            "use hf-eager for sampling"
        )


def cache_kind(stack: str) -> str:
    """Whether the cache grows (dynamic) or has a fixed size (static)."""
    return "dynamic" if stack == "hf-eager" else "static"


def experts_in_decode(net: Any, stack: str = "hf-eager") -> str | None:
    """The experts implementation that the decode steps of a stack really use.

    On a GPU `generate()` replaces grouped_mm by batched_mm after the prefill; a captured step runs
    what is configured, and a compiled one `fused.EXPERTS`. None for a model without a choice.
    """
    if not getattr(net, "_can_set_experts_implementation", lambda: False)():
        return None
    if stack == "graph-compiled":
        return fused.EXPERTS
    if stack == "graph":
        return experts.in_use(net)
    with net._optimize_model_for_decode():
        return experts.in_use(net)


def as_in_decode(net: Any, stack: str) -> contextlib.AbstractContextManager[None]:
    """The net with the experts implementation of a stack's decode steps, inside the block."""
    return experts.using(net, experts_in_decode(net, stack))
