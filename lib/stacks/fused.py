"""Decoder layers fused by torch.compile: the keys of a group are read once, chosen experts only.

The library's own code of a layer is compiled, with attention, experts and products of one row
written so that they fuse. Weights are arguments: one compilation serves all layers of a kind.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if find_spec("triton"):  # of a torch for GPUs
    from lib.stacks import triton_kernels

ATTENTION = EXPERTS = "workbook_fused"
OPTIONS = {"realize_reads_threshold": 12}  # small results are computed where they are read
TUNED_FROM_BYTES = 64 * 2**20  # the compiler's trials tell shorter products apart by chance
ARGUMENTS = ("attention_mask", "position_ids", "position_embeddings")  # what layers are given
_FUNCTIONS: dict[tuple, Any] = {}  # one for each kind of layer, for the life of the process


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scaling: float | None = None,
    s_aux: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One query token a sequence: query (batch, heads, 1, width), key and value (batch, groups,
    length, width), additive mask, s_aux one sink a head. Returns (batch, 1, heads, width)."""
    if kwargs.get("softcap") is not None:
        raise ValueError("attention with capped logits is not fused here; use the stack graph")
    (batch, heads, _, width), groups = query.shape, key.shape[1]
    rows = query.reshape(batch, groups, heads // groups, width)
    scale = width**-0.5 if scaling is None else scaling
    if query.is_cuda and width in (16, 32, 64, 128, 256):
        out = triton_kernels.attended(
            rows, key, value, mask, sinks=s_aux, scale=scale, window=kwargs.get("sliding_window")
        )
    else:
        scores = (rows @ key.transpose(2, 3)).float() * scale + mask
        sinks = query.new_full((heads,), -torch.inf) if s_aux is None else s_aux
        sink = sinks.float().view(1, groups, -1, 1)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink)
        weights = torch.exp(scores - top)
        weights = weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - top))
        out = weights.to(value.dtype) @ value
    return out.reshape(batch, 1, heads, width), None


def chosen_experts(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: Any) -> Any:
    """Each token's chosen experts: hidden (tokens, hidden), index and weights (tokens, k)."""
    if index.numel() > self.num_experts // 2:  # an expert would be read as often as it is chosen
        return grouped_mm_experts_forward(self, hidden, index, weights)
    parts, bias = _indexed(self, "gate_up_proj" if self.has_gate else "up_proj", hidden, index)
    inner = (parts.sum(1) + bias).to(hidden.dtype)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    parts, bias = _indexed(self, "down_proj", inner, index)
    parts, bias = parts.view(*index.shape, -1, parts.shape[-1]), bias.view(*index.shape, -1)
    out = (parts * weights[..., None, None]).sum((1, 2)) + (bias * weights[..., None]).sum(1)
    return out.to(hidden.dtype)


def _indexed(module: Any, name: str, inputs: torch.Tensor, index: torch.Tensor) -> tuple:
    """inputs (n or a divisor of it, in) through the n indexed experts: sums (n, parts, out) and
    bias (n, out or 1)."""
    weight, chosen = getattr(module, name), index.flatten()
    if inputs.is_cuda:
        parts = triton_kernels.products(inputs, weight, chosen, transposed=module.is_transposed)
    else:
        matrices = weight[chosen] if module.is_transposed else weight[chosen].transpose(1, 2)
        rows = inputs.repeat_interleave(chosen.numel() // inputs.shape[0], 0)
        parts = rows[:, None].float() @ matrices.float()
    if module.has_bias:
        return parts, getattr(module, f"{name}_bias")[chosen]
    return parts, parts.new_zeros(chosen.numel(), 1)


class _OneRow(TorchFunctionMode):
    """Products of one row as multiply-and-sum, and a router's choice without a sort."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and args[0].numel() == args[0].shape[-1]:
            row, weight, bias = (*args, None)[:3]
            out = (row.reshape(1, -1).float() * weight.float()).sum(-1)
            return (out if bias is None else out + bias).to(row.dtype).view(*row.shape[:-1], -1)
        if func is torch.topk and not (kwargs or {}).keys() - {"dim"}:
            return _topk(*args[:2])
        return func(*args, **(kwargs or {}))


def _topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the last axis, by counting how many are larger than each."""
    place = torch.arange(scores.shape[-1], device=scores.device)
    one, other = scores[..., :, None], scores[..., None, :]
    rank = ((other > one) | ((other == one) & (place < place[:, None]))).sum(-1)
    chosen = rank[..., None, :] == torch.arange(k, device=scores.device)[:, None]
    return torch.where(chosen, other, 0).sum(-1), (chosen * place).sum(-1)


class Layers:
    """`around` of a captured step: within it the layers of a net run their fused form."""

    def __init__(self, net: Any, *, compiled: bool | None = None) -> None:
        self._layers = net.get_decoder().layers
        self._compiled = net.device.type == "cuda" if compiled is None else compiled
        self._config = net.config.get_text_config(decoder=True).to_json_string()

    @contextlib.contextmanager
    def __call__(self, net: Any, cache: Any) -> Iterator[None]:
        for layer, held in zip(self._layers, cache.layers, strict=True):
            layer.forward = partial(_forward, self._function(layer, held), layer, held)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def _function(self, layer: torch.nn.Module, held: Any) -> Any:
        shapes = tuple((name, p.shape) for name, p in layer.named_parameters())
        kind = (self._config, type(layer), held.is_sliding, shapes, self._compiled)
        if kind not in _FUNCTIONS:
            run = partial(_run, _template(layer))
            matrices = [p.nbytes for p in layer.parameters() if p.dim() == 2]
            options = {**OPTIONS, "max_autotune_pointwise": max(matrices) >= TUNED_FROM_BYTES}
            _FUNCTIONS[kind] = torch.compile(run, options=options) if self._compiled else run
        return _FUNCTIONS[kind]


def _forward(call: Any, layer: Any, held: Any, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    given = {name: value for name, value in kwargs.items() if name in ARGUMENTS}
    if not held.is_sliding:  # one compilation for all lengths
        for tensor, axis in ((held.keys, 2), (held.values, 2), (given["attention_mask"], 3)):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
    return call(dict(layer.named_parameters()), held.keys, held.values, held.slot, hidden, given)


def _run(template: Any, weights: dict, keys: Any, values: Any, slot: Any, hidden: Any, given: Any):
    def update(key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple:
        return keys.index_copy_(2, slot, key), values.index_copy_(2, slot, value)

    given = {**given, "past_key_values": SimpleNamespace(update=update), "use_cache": True}
    with _OneRow():
        return torch.func.functional_call(template, weights, (hidden,), given)


def _template(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer's code without weights, told to use the functions above."""
    empty = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in layer.parameters()
    }
    twin = copy.deepcopy(layer, empty)
    for module in twin.modules():
        if (config := getattr(module, "config", None)) is not None:
            config._attn_implementation, config._experts_implementation = ATTENTION, EXPERTS
    return twin


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
ALL_EXPERTS_FUNCTIONS.register(EXPERTS, chosen_experts)
