"""Decoder layers fused by torch.compile: grouped keys and values are read once, and of the experts
only the chosen ones.

The library's own code of a layer is compiled, with three parts exchanged: attention, experts, and
linear layers of a single row. One compiled function serves all layers of a kind, since weights are
its arguments; compiling takes as long for 64 layers as for one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional

ATTENTION = EXPERTS = "workbook_fused"
# Products of one row with a matrix reach the memory's bandwidth only as reductions that are tuned.
OPTIONS = {"coordinate_descent_tuning": True}
_FUNCTIONS: dict[tuple, Any] = {}  # one for each kind of layer, for the life of the process


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query token a sequence, all heads of a group on the same keys.

    query (batch, heads, 1, width); key and value (batch, groups, length, width); mask additive,
    (batch, 1, 1, length); s_aux one sink a head. Returns (batch, 1, heads, width).
    """
    if kwargs.get("softcap") is not None:
        raise ValueError("attention with capped logits is not fused here; use graph")
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    grouped = query.view(batch, groups, heads // groups, width)
    scale = width**-0.5 if scaling is None else scaling
    scores = (grouped @ key.transpose(2, 3)).float() * scale + attention_mask
    top = scores.amax(-1, keepdim=True)
    if s_aux is not None:
        sink = s_aux.float().view(1, groups, heads // groups, 1)
        top = torch.maximum(top, sink)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if s_aux is not None:
        total = total + torch.exp(sink - top)
    out = (weights / total).to(value.dtype) @ value
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def chosen_experts(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Each token's chosen experts as multiply-and-sum over indexed weights, which fuse to one read.

    hidden_states (tokens, hidden); top_k_index and top_k_weights (tokens, k).
    """
    name = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _indexed(self, name, hidden_states[:, None], top_k_index)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outputs = _indexed(self, "down_proj", inner, top_k_index)
    return (outputs * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)


def _indexed(
    module: torch.nn.Module, name: str, inputs: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """inputs (tokens, k or 1, in) through the indexed experts: (tokens, k, out)."""
    weight = getattr(module, name)[index]
    if module.is_transposed:
        out = (inputs[..., :, None].float() * weight.float()).sum(-2)
    else:
        out = (inputs[..., None, :].float() * weight.float()).sum(-1)
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias")[index]
    return out.to(inputs.dtype)


class _Linear(torch.nn.Module):
    """A linear layer: one row is a multiply-and-sum, more are a matrix product."""

    def __init__(self, source: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.numel() != inputs.shape[-1]:
            return functional.linear(inputs, self.weight, self.bias)
        out = (inputs.reshape(1, -1).float() * self.weight.float()).sum(-1)
        if self.bias is not None:
            out = out + self.bias
        return out.to(inputs.dtype).view(*inputs.shape[:-1], -1)


class _Held:
    """The cache as one layer's code sees it, whatever its index."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor) -> None:
        self.keys, self.values, self.slot = keys, values, slot

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple:
        self.keys.index_copy_(2, self.slot, key)
        self.values.index_copy_(2, self.slot, value)
        return self.keys, self.values


class Layers:
    """`around` of a captured step: within it the layers of a net run their fused form."""

    def __init__(self, net: Any, *, compiled: bool | None = None) -> None:
        self._layers = net.get_decoder().layers
        self._compiled = net.device.type == "cuda" if compiled is None else compiled
        self._config = net.config.get_text_config(decoder=True).to_json_string()
        _register()

    @contextlib.contextmanager
    def __call__(self, net: Any, cache: Any) -> Iterator[None]:
        try:
            for layer, held in zip(self._layers, cache.layers, strict=True):
                layer.forward = partial(self._forward, self._function(layer, held), layer, held)
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)

    def _function(self, layer: torch.nn.Module, held: Any) -> Any:
        shapes = tuple((name, p.shape) for name, p in layer.named_parameters())
        kind = (self._config, type(layer), held.is_sliding, shapes, self._compiled)
        if kind not in _FUNCTIONS:
            call = partial(_run, _template(layer))
            _FUNCTIONS[kind] = torch.compile(call, options=OPTIONS) if self._compiled else call
        return _FUNCTIONS[kind]

    @staticmethod
    def _forward(call: Any, layer: Any, held: Any, hidden_states: Any, **kwargs: Any) -> Any:
        kept = ("attention_mask", "position_ids", "position_embeddings")
        given = {name: kwargs[name] for name in kept if name in kwargs}
        if not held.is_sliding:  # one compilation for all lengths
            for tensor, axis in ((held.keys, 2), (held.values, 2), (given["attention_mask"], 3)):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return call(dict(layer.named_parameters()), held.keys, held.values, held.slot,
                    hidden_states, given)  # fmt: skip


def _run(
    template: Any, weights: dict, keys: Any, values: Any, slot: Any, hidden: Any, given: dict
) -> torch.Tensor:
    cache = _Held(keys, values, slot)
    return torch.func.functional_call(
        template, weights, (hidden,), {**given, "past_key_values": cache, "use_cache": True}
    )


def _template(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer's code without weights, with attention, experts and linear layers exchanged."""
    made = copy.deepcopy(layer, {id(p): _empty(p) for p in layer.parameters()})
    made.__dict__.pop("forward", None)
    for module in list(made.modules()):
        if (config := getattr(module, "config", None)) is not None:
            config._attn_implementation, config._experts_implementation = ATTENTION, EXPERTS
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear:
                setattr(module, name, _Linear(child))
    return made


def _empty(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, chosen_experts)
