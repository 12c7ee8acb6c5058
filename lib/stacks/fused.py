"""Decoder layers fused by torch.compile: the keys of a group are read once, chosen experts only.

The library's own code of a layer is compiled, with attention, experts and products of one row
written so that they fuse. Weights are arguments: one compilation serves all layers of a kind.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lib.stacks.stack import StackError

if find_spec("triton"):  # of a torch for GPUs
    from lib.stacks import triton_kernels

ATTENTION = EXPERTS = "workbook_fused"
OPTIONS = {"realize_reads_threshold": 12}  # small results are computed where they are read
TUNED_FROM_BYTES = 64 * 2**20  # the compiler's trials tell shorter products apart by chance
_FLAGS = ("use_cache", "layer_idx")  # of what layers are given, beside tensors
_FUNCTIONS: dict[tuple, Any] = {}  # one for each kind of layer, for the life of the process


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    scaling: float | None = None,
    s_aux: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One query token a sequence: query (batch, heads, 1, width), key (batch, groups, length,
    width), value (batch, groups, length, width of values), additive mask, s_aux one sink a head.
    Returns (batch, 1, heads, width of values)."""
    if kwargs.get("softcap") is not None:
        raise StackError("attention with capped logits is not fused here; use the stack graph")
    mask = kwargs.get("attention_mask", mask)  # some name it
    if mask is None:
        raise StackError("its attention gets no mask, which this stack needs; use the stack graph")
    if kwargs.get("position_bias") is not None:
        raise StackError("attention with a bias by position is not fused here; use the stack graph")
    (batch, heads, _, width), groups = query.shape, key.shape[1]
    rows = query.reshape(batch, groups, heads // groups, width)
    scale = width**-0.5 if scaling is None else scaling
    alike = key.shape == value.shape and mask.shape[1] == 1
    if query.is_cuda and alike and width in (16, 32, 64, 128, 256):
        out = triton_kernels.attended(
            rows, key, value, mask, sinks=s_aux, scale=scale, window=kwargs.get("sliding_window")
        )
    else:
        scores = (rows @ key.transpose(2, 3)).float() * scale
        scores = scores + (
            mask if mask.shape[1] == 1 else mask.view(batch, groups, -1, key.shape[2])
        )
        sinks = query.new_full((heads,), -torch.inf) if s_aux is None else s_aux
        sink = sinks.float().view(1, groups, -1, 1)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink)
        weights = torch.exp(scores - top)
        weights = weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - top))
        out = weights.to(value.dtype) @ value
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def chosen_experts(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: Any) -> Any:
    """Each token's chosen experts: hidden (tokens, hidden), index and weights (tokens, k)."""
    many = index.numel() > self.num_experts // 2  # an expert would be read as often as it is chosen
    if many and not hidden.is_meta:
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
        self._layers = decoder_layers(net)
        self._compiled = net.device.type == "cuda" if compiled is None else compiled
        self._config = net.config.get_text_config(decoder=True).to_json_string()

    @contextlib.contextmanager
    def __call__(self, net: Any, cache: Any) -> Iterator[None]:
        if len(self._layers) != len(cache.layers):
            raise StackError(
                f"its {len(self._layers)} layers keep keys and values in {len(cache.layers)} "
                "places (some share them, or run several times), which is not fused here; use the "
                "stack graph"
            )
        # The compiler counts the functions of all kinds as one, and gives up after a few.
        kinds = {"recompile_limit": 8 + 2 * len(self._layers)}
        before = [vars(layer).get("forward") for layer in self._layers]
        try:
            for layer, held in zip(self._layers, cache.layers, strict=True):
                layer.forward = partial(_forward, self._function(layer, held), layer, held)
            with torch._dynamo.config.patch(kinds) if self._compiled else contextlib.nullcontext():
                yield
        finally:
            for layer, own in zip(self._layers, before, strict=True):
                vars(layer).pop("forward", None)
                if own is not None:
                    layer.forward = own

    def _function(self, layer: torch.nn.Module, held: Any) -> Any:
        kind = (self._config, _makeup(layer), held.is_sliding, self._compiled)
        if kind not in _FUNCTIONS:
            run = partial(_run, _template(layer))
            matrices = [p.nbytes for p in layer.parameters() if p.dim() == 2]
            tuned = max(matrices, default=0) >= TUNED_FROM_BYTES
            options = {**OPTIONS, "max_autotune_pointwise": tuned}
            _FUNCTIONS[kind] = torch.compile(run, options=options) if self._compiled else run
        return _FUNCTIONS[kind]


def decoder_layers(net: Any) -> Any:
    """The list of decoder layers, whatever it is called."""
    decoder = net.get_decoder()
    if isinstance(layers := getattr(decoder, "layers", None), torch.nn.ModuleList):
        return layers
    for place in (decoder, net.base_model):
        if lists := [m for m in place.modules() if isinstance(m, torch.nn.ModuleList)]:
            return max(lists, key=len)
    raise StackError("its decoder has no list of layers to fuse; use the stack graph")


def _makeup(layer: torch.nn.Module) -> tuple:
    """All in which layers can differ but the values of their tensors: classes, shapes, hooks, and
    every plain attribute (a rotation that some lack, a scale). Two layers of one makeup run the
    same code. Which layer it is counts only where the code asks for more than its place in the
    cache."""
    parts = []
    for path, module in layer.named_modules():
        attributes = tuple(
            (name, _plain(value))
            for name, value in sorted(vars(module).items())
            if name not in _OF_TORCH
            and (name != "layer_idx" or _asks_which_layer(type(module)))
            and (name != "forward" or module is not layer)  # which this stack replaces
        )
        hooks = () if module is layer else _hooks(module)  # a layer's own run around its function
        parts.append((path, type(module), module.training, attributes, hooks))
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return (*parts, *((name, tensor.shape, tensor.dtype) for name, tensor in tensors))


_OF_TORCH = frozenset(vars(torch.nn.Module()))


class _Itself:
    """An object that is equal to nothing else, and lives as long as what it is compared with: the
    id of one that was let go is given to another."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


def _hooks(module: torch.nn.Module) -> tuple:
    held = (module._forward_pre_hooks, module._forward_hooks)
    return tuple(_Itself(hook) for hooks in held for hook in hooks.values())


def _plain(value: Any) -> Any:
    """Something that can be compared in place of an attribute; the object itself where nothing can,
    so that layers that hold different ones are different."""
    if isinstance(value, int | float | complex | str | bytes | None | torch.dtype | torch.device):
        return (type(value).__name__, repr(value))  # a float that is not a number equals itself
    if isinstance(value, list | tuple | set | frozenset):
        return (type(value).__name__, *(_plain(part) for part in value))
    if isinstance(value, dict):
        return tuple((_plain(key), _plain(part)) for key, part in value.items())
    if hasattr(value, "to_json_string"):  # a configuration, which may be of one layer
        return (type(value), value.to_json_string(use_diff=False))
    return _Itself(value)  # a module elsewhere, a tensor that is no buffer, a function


@functools.cache
def _asks_which_layer(module: type) -> bool:
    """Whether the code of a module, its making apart, uses its index beyond finding its place in
    the cache. Code that cannot be read may."""
    classes = module.__mro__[: module.__mro__.index(torch.nn.Module)]
    methods = [f for c in classes for f in vars(c).values() if inspect.isfunction(f)]
    try:
        codes = [inspect.getsource(f) for f in methods if f.__name__ != "__init__"]
    except OSError:
        return True
    place = r"\.(update\w*|layers)[(\[][^)\]]*[)\]]"
    return any("layer_idx" in re.sub(place, "", code) for code in codes)


def _forward(call: Any, layer: Any, held: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer's call with the arguments that its own forward takes, by their names."""
    signature = inspect.signature(type(layer).forward)
    given = dict(signature.bind(layer, *args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    given.pop("self", None)
    caches = tuple(name for name, value in given.items() if isinstance(value, Cache))
    if not caches:
        raise StackError("its layers are not given the cache, which this stack fills; use graph")
    tensors = {name: value for name, value in given.items() if _is_tensors(value)}
    if odd := [n for n, v in given.items() if not _is_flag(v) and n not in (*caches, *tensors)]:
        raise StackError(
            f"its layers are called with {', '.join(odd)}, which is not fused here; use the stack "
            "graph"
        )
    needed = {n for n, p in signature.parameters.items() if p.default is p.empty}
    flags = {n: v for n, v in given.items() if _is_flag(v) and (n in needed or n in _FLAGS)}
    mask = tensors.get("attention_mask")
    if not held.is_sliding:  # one compilation for all lengths
        sized = ((held.keys, 2), (held.values, 2), *(((mask, 3),) if mask is not None else ()))
        for tensor, axis in sized:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
    weights = dict(layer.named_parameters()) | dict(layer.named_buffers())
    return call(weights, held.keys, held.values, held.slot, tensors, caches, tuple(flags.items()))


def _is_tensors(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(torch.is_tensor(part) for part in value)
    return torch.is_tensor(value)


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


class _Buffers:
    """A cache as a layer sees it, of which it may only ask to take a token."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor) -> None:
        self.keys, self.values, self.slot = keys, values, slot

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self.keys.index_copy_(2, self.slot, key)
        return keys, self.values.index_copy_(2, self.slot, value)


def _run(
    template: Any,
    weights: dict,
    keys: Any,
    values: Any,
    slot: Any,
    tensors: dict,
    caches: tuple,
    flags: tuple,
) -> Any:
    held = {name: _Buffers(keys, values, slot) for name in caches}
    with _OneRow():
        return torch.func.functional_call(template, weights, (), {**dict(flags), **tensors, **held})


def _template(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer's code without weights, told to use the functions above."""
    empty = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in layer.parameters()
    }
    twin = copy.deepcopy(layer, empty)
    twin._forward_pre_hooks.clear()  # the layer's own call runs them
    twin._forward_hooks.clear()
    for module in twin.modules():
        if (config := getattr(module, "config", None)) is not None:
            config._attn_implementation, config._experts_implementation = ATTENTION, EXPERTS
    return twin


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
ALL_EXPERTS_FUNCTIONS.register(EXPERTS, chosen_experts)
