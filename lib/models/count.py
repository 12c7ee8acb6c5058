"""Counting an architecture: parameters, bytes and cache layout, never typed in.

Everything is read from the model that the library builds on torch's meta device, where a parameter
has a shape and no memory, so a model larger than the machine is counted in about a second.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lib.models.card import ModelCard, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

DTYPES = ("bfloat16", "float16", "float32")
# How the configurations of the library call the number of experts chosen for a token.
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k")


def count(config: PreTrainedConfig, *, name: str = "", dtype: str = "bfloat16") -> ModelCard:
    """The card of a causal language model with this configuration; nothing is allocated."""
    net = on_meta(copy.deepcopy(config), dtype)  # the library writes the dtype into it
    text = config.get_text_config(decoder=True)
    tables = _lookup_tables(net)
    routed, experts = _routed_experts(net)
    top_k = _experts_per_token(text, experts) if experts else 0

    every = dict(net.named_parameters())  # a tied parameter appears once
    always = {n: p for n, p in every.items() if n not in routed and n not in tables}
    groups = [_numel(g.values()) for g in (tables, routed, always)]
    total = sum(p.numel() for p in net.parameters())
    assert sum(groups) == total, f"{name}: groups {groups} do not add up to {total} parameters"
    routed_used = groups[1] * top_k // experts if experts else 0

    matrix_params, expert_matrix_params = _matrices(net, tables, routed, experts)
    assert expert_matrix_params <= groups[1] and matrix_params <= total - groups[0], name
    kv_layers, kv_element_bytes, kv_reason = _cache_layout(net, config)
    return ModelCard(
        name=name or config.model_type,
        model_type=config.model_type,
        dtype=dtype,
        total_params=total,
        active_params=groups[2] + routed_used,
        lookup_params=groups[0],
        routed_params=groups[1],
        weight_bytes=_nbytes(every.values()),
        routed_bytes=_nbytes(routed.values()),
        lookup_bytes=_nbytes(tables.values()),
        layers=text.num_hidden_layers,
        hidden_size=getattr(text, "hidden_size", None),
        attention_heads=getattr(text, "num_attention_heads", None),
        kv_heads=getattr(text, "num_key_value_heads", None),
        head_dim=_head_dim(text),
        experts=experts,
        experts_per_token=top_k,
        context_limit=getattr(text, "max_position_embeddings", None),
        vocab_size=text.vocab_size,
        kv_layers=kv_layers,
        kv_element_bytes=kv_element_bytes,
        kv_reason=kv_reason,
        matrix_params=matrix_params,
        expert_matrix_params=expert_matrix_params,
    )


def on_meta(config: PreTrainedConfig, dtype: str) -> torch.nn.Module:
    """The model of a configuration on torch's meta device, where a parameter has no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except ValueError as error:
        if "AutoModel" not in str(error):
            raise
        raise ModelError(
            f"{config.model_type!r} is not a causal language model of the installed transformers; "
            "use a decoder-only model, or update transformers"
        ) from error


def _numel(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _nbytes(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _lookup_tables(net: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Embedding tables that are not the output matrix as well."""
    import torch

    output = net.get_output_embeddings()
    tied = id(output.weight) if output is not None else None
    owners = {id(p): name for name, p in net.named_parameters()}
    tables = [m.weight for m in net.modules() if isinstance(m, torch.nn.Embedding)]
    return {owners[id(w)]: w for w in tables if id(w) != tied}


def expert_modules(net: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that hold a layer's experts, by path: the library calls them `experts`."""
    return {p: m for p, m in net.named_modules() if p.rpartition(".")[2] == "experts"}


def _routed_experts(net: torch.nn.Module) -> tuple[dict[str, torch.nn.Parameter], int]:
    """Parameters of experts that a router chooses among, and the number of experts.

    Recognised by structure: a module called `experts` that is a list of modules, or whose own
    parameters all lead with one and the same length. Shared experts have another name and count
    as always read.
    """
    import torch

    routed: dict[str, torch.nn.Parameter] = {}
    sizes = set()
    for path, module in expert_modules(net).items():
        inside = {f"{path}.{n}": p for n, p in module.named_parameters()}
        if isinstance(module, torch.nn.ModuleList):
            sizes.add(len(module))
        else:
            sizes.update(p.shape[0] for p in inside.values())
        routed.update(inside)
    if len(sizes) > 1:
        raise ModelError(
            f"the experts of {net.config.model_type!r} come in several counts {sorted(sizes)}; "
            "active parameters need one count for all layers"
        )
    return routed, sizes.pop() if sizes else 0


def _matrices(
    net: torch.nn.Module,
    tables: dict[str, torch.nn.Parameter],
    routed: dict[str, torch.nn.Parameter],
    experts: int,
) -> tuple[int, int]:
    """Weights that quantisers take, and those of them in routed experts.

    These are the matrices of linear layers and of routed experts. Embeddings, the output matrix,
    norms, biases and routers (beside the experts, one row for each) stay in the model's dtype.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    output = net.get_output_embeddings()
    kept = {id(p) for p in (*tables.values(), getattr(output, "weight", None))}
    linear, blocks = {}, []
    for path, module in net.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module.weight) not in kept:
            linear[f"{path}.weight"] = module.weight
        if path.rpartition(".")[2] == "experts":
            blocks.append(path.removesuffix("experts"))
    routers = {n for n in linear if n.startswith(tuple(blocks)) and len(linear[n]) == experts}
    # Where all experts of a layer are one tensor, it has three axes, and their biases have two.
    inside = {id(p): p for n, p in routed.items() if n in linear or p.ndim == 3}
    others = {id(p): p for n, p in linear.items() if n not in routed and n not in routers}
    return _numel((inside | others).values()), _numel(inside.values())


def _experts_per_token(config: PreTrainedConfig, experts: int) -> int:
    for name in _TOP_K_NAMES:
        top_k = getattr(config, name, None)
        if isinstance(top_k, int) and 1 <= top_k <= experts:
            return top_k
    raise ModelError(
        f"{config.model_type!r} has {experts} experts, and its config says under none of "
        f"{', '.join(_TOP_K_NAMES)} how many a token uses"
    )


def _head_dim(config: PreTrainedConfig) -> int | None:
    if getattr(config, "head_dim", None):
        return config.head_dim
    hidden, heads = (getattr(config, n, None) for n in ("hidden_size", "num_attention_heads"))
    return hidden // heads if hidden and heads else None


def _cache_layout(
    net: torch.nn.Module, config: PreTrainedConfig
) -> tuple[tuple[tuple[int, int | None], ...] | None, int, str]:
    """Elements per token and window of every layer of the library's own cache.

    Which layers slide is read from the cache that the library builds for this configuration; how
    much a token adds is read from the projections that write into it.
    """
    from transformers import DynamicCache

    writers: dict[int, torch.nn.Module] = {}
    for module in net.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__:
            writers.setdefault(index, module)
    layout, element_bytes = [], next(net.parameters()).element_size()
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        return None, element_bytes, f"the library builds no cache for it ({error})"
    for index, layer in enumerate(layers):
        kind = type(layer).__name__
        if kind not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            return None, element_bytes, f"layer {index} keeps a {kind}, not keys and values"
        if index not in writers:
            return None, element_bytes, f"layer {index} has no attention module"
        per_token = _cached_per_token(writers[index], config.get_text_config(decoder=True))
        if per_token is None:
            part = type(writers[index]).__name__
            return None, element_bytes, f"what {part} of layer {index} caches is not recognised"
        layout.append((per_token, getattr(layer, "sliding_window", None)))
    return tuple(layout), element_bytes, ""


def _cached_per_token(attention: torch.nn.Module, config: PreTrainedConfig) -> int | None:
    """Elements that one token adds to this layer's cache, or None where the form is unknown."""
    widths = {
        n: m.out_features for n, m in attention.named_children() if hasattr(m, "out_features")
    }
    if "kv_a_proj_with_mqa" in widths:  # multi-head latent attention caches the latents
        return widths["kv_a_proj_with_mqa"]
    if "k_proj" in widths and "v_proj" in widths:
        return widths["k_proj"] + widths["v_proj"]
    heads, head_dim = getattr(config, "num_attention_heads", None), _head_dim(config)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    fused = widths.get("qkv_proj", widths.get("query_key_value"))
    if fused and heads and head_dim and fused == (heads + 2 * kv_heads) * head_dim:
        return 2 * kv_heads * head_dim
    return None
