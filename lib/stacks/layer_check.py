"""Each decoder layer of a stack on the reference's own inputs: a wrong layer shows as itself.

Along a whole net rounding grows with depth, and hides what one kind of layer does wrong. Given the
same input, a right layer differs by the rounding of one layer at any depth. Attention that is
nearly even, as random weights of small width make it, hides a lost token or rotation as well; so
the scores are scaled until they spread as those of trained nets do.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Standard deviation of the scores of a query over the keys: below EVEN they are scaled to SHARP.
# Nets of real width have 1 and more, and are looked at with the functions that are timed.
EVEN, SHARP = 0.7, 2.0


@dataclass
class Seen:
    """What went into each layer and came out of it: tensors (batch, 1, hidden) [layer][step]."""

    inputs: list[list[torch.Tensor]]
    outputs: list[list[torch.Tensor]]


def seen(stack: Any, layers: Sequence[Any], ids: Any, continuation: Any) -> Seen:
    """The layers of a stack that runs them as Python, in the decode steps of a continuation."""
    kept = Seen([[] for _ in layers], [[] for _ in layers])

    def before(number: int, hidden: torch.Tensor) -> None:
        kept.inputs[number].append(hidden.clone())

    def after(number: int, hidden: torch.Tensor) -> None:
        kept.outputs[number].append(hidden.clone())

    with _hooked(layers, before, after):
        stack.forced_logits(ids, continuation)
    return kept


def once_a_token(layers: Sequence[Any], stack: Any, ids: Any, continuation: Any) -> list[Any]:
    """Those layers that run once a token: one that is skipped, or shared by several places, has no
    input of its own."""
    calls = seen(stack, layers, ids, continuation[:, :1]).inputs
    return [layer for layer, inputs in zip(layers, calls, strict=True) if len(inputs) == 1]


def given(stack: Any, layers: Sequence[Any], ids: Any, continuation: Any, inputs: Any) -> Seen:
    """The layers of a captured stack with `inputs` in the place of their own."""
    watch = _Given(inputs)
    with _hooked(layers, watch.put, watch.take):
        stack.forced_logits(ids, continuation, watch)
    return Seen(inputs, watch.outputs)


class _Given:
    """Inputs and outputs by buffers of fixed place, as a captured step needs them."""

    def __init__(self, inputs: list[list[torch.Tensor]]) -> None:
        self.inputs, self.outputs = inputs, [[] for _ in inputs]
        self.into = [steps[0].clone() for steps in inputs]
        self.out = [torch.empty_like(steps[0]) for steps in inputs]

    def put(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.into[number]

    def take(self, number: int, hidden: torch.Tensor) -> None:
        self.out[number].copy_(hidden)

    def before(self, step: int) -> None:
        for buffer, steps in zip(self.into, self.inputs, strict=True):
            buffer.copy_(steps[step])

    def after(self, step: int) -> None:
        for kept, buffer in zip(self.outputs, self.out, strict=True):
            kept.append(buffer.clone())


@contextlib.contextmanager
def _hooked(layers: Sequence[Any], before: Any, after: Any) -> Iterator[None]:
    """`before` (which may give another) and `after` see the hidden states of calls of one token."""

    def pre(number: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            other = before(number, hidden) if hidden.shape[-2] == 1 else None
            if other is None:
                return None
            if args:
                return (other, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": other}

        return hook

    def post(number: int) -> Any:
        def hook(module: Any, args: tuple, out: Any) -> None:
            hidden = out if torch.is_tensor(out) else out[0]
            if hidden.shape[-2] == 1:
                after(number, hidden)

        return hook

    handles = []
    try:
        for number, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(pre(number), with_kwargs=True))
            handles.append(layer.register_forward_hook(post(number)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def errors(found: Seen, expected: Seen) -> torch.Tensor:
    """(layers, batch, steps): the norm of the difference over that of what the layer adds.

    A difference of one unit in the last place of the output is none: the sum of a layer's input and
    what it adds is rounded so.
    """
    return torch.stack(
        [
            torch.stack([_error(*step) for step in zip(*layer, strict=True)], -1)
            for layer in zip(found.outputs, expected.outputs, expected.inputs, strict=True)
        ]
    )


def _error(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Of tensors (batch, 1, hidden): (batch,)."""
    unit = torch.finfo(expected.dtype).eps
    found, expected, before = (tensor.float().flatten(1) for tensor in (found, expected, before))
    last_place = unit * torch.exp2(torch.frexp(expected).exponent - 1.0)
    beyond = ((found - expected).abs() - last_place * (expected != 0)).clamp_min(0)
    beyond[(found - expected).isnan()] = torch.nan
    return beyond.norm(dim=-1) / (expected - before).norm(dim=-1)


@contextlib.contextmanager
def sharpened(net: Any, stack: Any, ids: Any, continuation: Any) -> Iterator[float]:
    """Inside the block the scores of attention are not nearly even; gives the factor, a power of
    two, which is 1 where they are not anyway or where the scale is no number of a module's own."""
    spreads = _spreads(net, stack, ids, continuation[:, :1])
    usual = statistics.median(spreads.values()) if spreads else math.inf
    factor = 2.0 ** round(math.log2(SHARP / usual)) if 0 < usual < EVEN else 1.0
    before = {module: module.scaling for module in spreads}
    try:
        for module, scaling in before.items():
            module.scaling = scaling * factor
        yield factor
    finally:
        for module, scaling in before.items():
            module.scaling = scaling


def _spreads(net: Any, stack: Any, ids: Any, continuation: Any) -> dict[Any, float]:
    """The standard deviation of a query's scores over the keys, by attention module."""
    name = net.config.get_text_config(decoder=True)._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get(name)
    spreads: dict[Any, float] = {}

    def measure(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        if query.shape[2] == 1 and isinstance(getattr(module, "scaling", None), float):
            rows = query.float().reshape(len(query), key.shape[1], -1, query.shape[-1])
            scores = rows @ key.float().transpose(2, 3) * module.scaling
            spreads[module] = scores.std(-1).mean().item()
        own = sys.modules[type(module).__module__]  # where a model keeps an "eager" of its own
        return (attend or own.eager_attention_forward)(module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = measure
    try:
        stack.forced_logits(ids, continuation)
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
    return spreads
