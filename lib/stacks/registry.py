"""One entry a stack, and how one is opened by its name.

A new stack is a module of this package and an entry here. Nothing here needs torch until a stack
is opened, so that the reading side knows stacks by the same entries.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lib.records.kinds import STUDY_STACK
from lib.stacks.decoding import GREEDY, options
from lib.stacks.stack import Generate, Stack, StackError, Subject


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


def _apart(net: Any, **options: Any) -> Generate:
    raise ValueError(
        "an engine in a process of its own is not opened for a loaded net: run it with STACK=vllm, "
        "or measure.session.opened(model, stack='vllm', ...)"
    )


def _rehearse_static(twin: Any) -> None:
    from lib.stacks.generate import rehearse_static

    rehearse_static(twin)


def _rehearse_graph(twin: Any) -> None:
    from lib.stacks.graph import GraphStack

    GraphStack(twin).rehearse()


def _rehearse_compiled(twin: Any) -> None:
    from lib.stacks import fused, graph

    graph.GraphStack(twin, around=fused.Layers(twin, compiled=False)).rehearse()


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
            rehearse=_rehearse_static,
        ),
        Stack(
            "graph",
            "the library's decode step, recorded once as a CUDA graph",
            "static",
            _graph,
            _configured,
            captured=True,
            rehearse=_rehearse_graph,
        ),
        Stack(
            "graph-compiled",
            "the recorded step with each decoder layer fused by the compiler",
            "static",
            _compiled,
            _fused,
            captured=True,
            rehearse=_rehearse_compiled,
        ),
        Stack(
            "vllm",
            "vLLM's engine, in an environment and a process of its own",
            "paged",
            _apart,
            _configured,
            apart=True,
            shards=True,
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
    if name not in STACKS:
        raise ValueError(f"unknown stack {name!r}; known: {sorted(STACKS)}")
    options(decoding)  # raises for one that is unknown
    if decoding != GREEDY and not STACKS[name].samples:
        sampling = ", ".join(stack for stack, entry in STACKS.items() if entry.samples)
        raise ValueError(
            f"the stack {name!r} decodes greedily only, not {decoding!r}; use {sampling}"
        )
    stack = STACKS[name].open(net, decoding=decoding, capacity=capacity)
    if STACKS[name].rehearse is not None:
        stack.before = partial(require_runs, name, net)
    return stack


def require_devices(name: str, devices: int) -> None:
    """Raise a StackError unless `devices` are GPUs that a stack can compute on together."""
    if type(devices) is not int or devices < 1:
        raise StackError(f"devices: {devices!r} is no whole number of GPUs from 1 on")
    if devices > 1 and not STACKS[name].shards:
        sharding = ", ".join(stack for stack, entry in STACKS.items() if entry.shards)
        raise StackError(
            f"the stack {name!r} computes on one GPU, not on devices: {devices}; STACK={sharding} "
            "shards a model, or use DEVICES=1"
        )


def require_runs(name: str, net: Any) -> None:
    """Raise a StackError where a stack cannot run a net, before it does any work with it.

    A stack asks this itself in its first call.
    """
    from lib.stacks import rehearsal

    if (rehearse := STACKS[name].rehearse) is not None:
        rehearsal.require(name, net, rehearse)


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


def subject(
    model: Any, stack: str, *, decoding: str = "greedy", capacity: int | None = None
) -> Subject:
    """What is measured: a loaded model on a stack, or an engine, which is its own stack."""
    own = getattr(model, "stack", None)
    if own is None:
        return OnStack(model, stack, decoding, capacity)
    if stack != own or decoding != "greedy":
        raise ValueError(
            f"{model.name} runs on {own!r} and decodes greedily; {stack!r} with {decoding} is "
            f"measured apart: STACK={stack}"
        )
    return model


@dataclass
class OnStack:
    """A loaded model on one of its stacks: a `Subject`."""

    model: Any
    stack: str
    decoding: str = "greedy"
    capacity: int | None = None
    generate: Generate = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.card = self.model.name, self.model.card
        self.synchronize, self.clock_s = self.model.device.synchronize, self.model.device.clock_s
        self.clocks_state = getattr(self.model.device, "clocks_state", dict)
        self.generate = open_stack(
            self.stack, self.model.net, decoding=self.decoding, capacity=self.capacity
        )

    @property
    def values(self) -> dict[str, Any]:
        """Where the model came from, and which experts its decode steps use."""
        used = experts_in_decode(self.model.net, self.stack)
        return {**self.model.source, "decode_experts": used}

    def key(self, **changes: Any) -> dict[str, Any]:
        """The model's key on this stack."""
        own = {"stack": self.stack, "cache": STACKS[self.stack].cache, "decoding": self.decoding}
        return self.model.key(**{**own, **changes})

    def prompt(self, context: int, *, seed: int, batch: int = 1) -> Any:
        """Token ids on the model's device, one prompt for each sequence."""
        from lib.models.prompts import prompt_ids

        return prompt_ids(self.model, context, seed=seed, batch=batch, distinct=batch > 1)
