"""One entry a stack, and how one is opened by its name.

A new stack is a module of this package and an entry here. Nothing here needs torch until a stack
is opened, so that the reading side knows stacks by the same entries.
"""

from __future__ import annotations

import contextlib
from typing import Any

from lib.records.kinds import STUDY_STACK
from lib.stacks.stack import Generate, Stack


def _generate(net: Any, **options: Any) -> Generate:
    from lib.stacks.generate import GenerateStack

    return GenerateStack(net, **options)


def _static(net: Any, **options: Any) -> Generate:
    from lib.stacks.generate import GenerateStack

    return GenerateStack(net, static=True, **options)


def _graph(net: Any, *, decoding: str, capacity: int | None) -> Generate:
    from lib.stacks.graph import GraphStack

    return GraphStack(net, capacity=capacity)


def _compiled(net: Any, *, decoding: str, capacity: int | None) -> Generate:
    from lib.stacks import fused, graph

    return graph.GraphStack(net, capacity=capacity, around=fused.Layers(net))


def _library(net: Any) -> str | None:
    """On a GPU `generate()` replaces grouped_mm by batched_mm after the prefill."""
    from lib.models import experts

    with net._optimize_model_for_decode():
        return experts.in_use(net)


def _configured(net: Any) -> str | None:
    from lib.models import experts

    return experts.in_use(net)


def _fused(net: Any) -> str:
    from lib.stacks import fused

    return fused.EXPERTS


# In the order in which they are shown.
STACKS = {
    entry.name: entry
    for entry in (
        Stack(
            STUDY_STACK,
            "generate() of transformers with its growing cache",
            "dynamic",
            _generate,
            _library,
            samples=True,
        ),
        Stack(
            "hf-static",
            "generate() with a cache of fixed size and the library's own compilation",
            "static",
            _static,
            _library,
            samples=True,
        ),
        Stack(
            "graph",
            "the library's decode step, recorded once as a CUDA graph",
            "static",
            _graph,
            _configured,
            captured=True,
        ),
        Stack(
            "graph-compiled",
            "the recorded step with each decoder layer fused by the compiler",
            "static",
            _compiled,
            _fused,
            captured=True,
        ),
    )
}


def open_stack(
    name: str, net: Any, *, decoding: str = "greedy", capacity: int | None = None
) -> Generate:
    """The stack of that name for a net; a clear error for an unknown stack or decoding.

    `capacity` is the longest sequence (tokens, prompt included) of the calls to come: a stack with
    fixed buffers then prepares once, in the first call.
    """
    from lib.stacks.generate import DECODING

    if name not in STACKS:
        raise ValueError(f"unknown stack {name!r}; known: {sorted(STACKS)}")
    if decoding not in DECODING:
        raise ValueError(f"unknown decoding {decoding!r}; known: {list(DECODING)}")
    if decoding != "greedy" and not STACKS[name].samples:
        sampling = ", ".join(stack for stack, entry in STACKS.items() if entry.samples)
        raise ValueError(
            f"the stack {name!r} decodes greedily only, not {decoding!r}; use {sampling}"
        )
    return STACKS[name].open(net, decoding=decoding, capacity=capacity)


def experts_in_decode(net: Any, stack: str) -> str | None:
    """The experts implementation that the decode steps of a stack really use.

    None for a model without a choice.
    """
    if not getattr(net, "_can_set_experts_implementation", lambda: False)():
        return None
    return STACKS[stack].decode_experts(net)


def as_in_decode(net: Any, stack: str) -> contextlib.AbstractContextManager[None]:
    """The net with the experts implementation of a stack's decode steps, inside the block."""
    from lib.models import experts

    return experts.using(net, experts_in_decode(net, stack))
