"""Counting an architecture: parameters, bytes and cache layout, never typed in.

Everything is read from the model that the library builds on torch's meta device, where a parameter
has a shape and no memory, and from one decode step of it there (`decode_step`), so that a model
larger than the machine is counted in seconds.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lib.models import config_fields as fields
from lib.models import context_limit, decode_step, quantised
from lib.models.card import ModelCard, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

DTYPES = ("bfloat16", "float16", "float32")
# How the configurations of the library call the number of experts chosen for a token,
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
    "moe_k",
    "top_k",
)
# the number of experts (the first two also in modules that hold them),
_EXPERTS_NAMES = (
    "num_experts",
    "moe_num_experts",
    "num_routed_experts",
    "n_routed_experts",
    "num_local_experts",
)
ENCODER = (
    "it is an encoder (is_decoder is false): every token attends to those after it, so that no "
    "text is decoded token by token"
)
_SEEN: dict[tuple[str, str], decode_step.Layout] = {}  # dry runs of this process


def count(
    config: PreTrainedConfig,
    *,
    name: str = "",
    dtype: str = "bfloat16",
    held: torch.nn.Module | None = None,
) -> ModelCard:
    """The card of a causal language model with this configuration; nothing is allocated.

    `held` is a net that was loaded: the bytes are then those that it stores, quantised or not.
    """
    try:
        return _counted(config, name, dtype, held)
    except ModelError:
        raise
    except Exception as error:  # of the code of an architecture, whatever it is
        raise ModelError(
            f"{name or config.model_type}: its card cannot be counted ({reason_of(error)})"
        ) from error


def require_decoder(card: ModelCard) -> None:
    """Raise for an encoder, which decodes nothing."""
    if card.kv_reason == ENCODER:
        raise ModelError(
            f"{card.name} ({card.model_type}) cannot be measured: {ENCODER}; use a model that is "
            "made to continue text"
        )


def _is_encoder(net: torch.nn.Module) -> bool:
    """Whether its tokens attend to those after them (BERT and its kin, unless told otherwise)."""
    if getattr(fields.text_config(net.config), "is_decoder", None) is not False:
        return False
    return any(vars(module).get("is_decoder") is False for module in net.modules())


def _counted(
    config: PreTrainedConfig, name: str, dtype: str, held: torch.nn.Module | None
) -> ModelCard:
    config = copy.deepcopy(config)  # the library writes the dtype into it
    net = on_meta(config, dtype, type(held) if held is not None else None)
    text = fields.text_config(config)
    for field in fields.LAYERS_NAMES:
        if isinstance(number := fields.value(text, field), int) and number < 1:
            raise ModelError(
                f"{name or config.model_type} has no layers ({field} is {number}); give the "
                "config.json of a model that has some"
            )
    seen = _layout(net, config, dtype)
    if _is_encoder(net):
        seen = replace(seen, layers=None, reason=ENCODER)
    every = dict(net.named_parameters())  # a tied parameter appears once
    stored = quantised.stored_bytes(held, every) if held is not None else None

    def size_bytes(names: Iterable[str]) -> int:
        return sum(stored[n] if stored else every[n].nbytes for n in names)

    routed, experts, empty = _routed_experts(net)
    top_k = _experts_per_token(text, experts) if experts else 0

    tables = {n: p for n, p in _lookup_tables(net, seen).items() if n not in routed}
    unread = {n: p for n, p in every.items() if _is_unread(n, seen) and n not in routed}
    tables = {n: p for n, p in tables.items() if n not in unread}
    always = {n: p for n, p in every.items() if n not in routed | tables | unread}
    groups = [_numel(g.values()) for g in (tables, routed, always, unread)]
    total = sum(p.numel() for p in net.parameters())
    assert sum(groups) == total, f"{name}: groups {groups} do not add up to {total} parameters"
    spare, spare_bytes = _spare(routed, experts, empty)

    matrix_params, expert_matrix_params = _matrices(net, tables, routed, experts)
    assert expert_matrix_params <= groups[1] and matrix_params <= total - groups[0], name
    read = {n: p for n, p in every.items() if n not in unread}
    unread_matrix_params = matrix_params - _matrices(net, tables, routed, experts, among=read)[0]
    routed_params = groups[1] - spare
    return ModelCard(
        name=name or config.model_type,
        model_type=config.model_type,
        dtype=dtype,
        total_params=total,
        active_params=groups[2] + (routed_params * top_k // (experts + empty) if experts else 0),
        lookup_params=groups[0],
        routed_params=routed_params,
        weight_bytes=size_bytes(every),
        routed_bytes=size_bytes(routed) - spare_bytes,
        lookup_bytes=size_bytes(tables),
        layers=fields.number(text, "layers") or _longest_list(net),
        hidden_size=fields.number(text, "hidden_size"),
        attention_heads=fields.number(text, "attention_heads"),
        kv_heads=seen.heads or fields.number(text, "kv_heads"),
        head_dim=fields.head_dim(text),
        experts=experts,
        experts_per_token=top_k,
        context_limit=context_limit.of(text, net),
        vocab_size=fields.number(text, "vocab_size") or _rows(net.get_output_embeddings()),
        kv_layers=seen.layers,
        kv_element_bytes=seen.element_bytes,
        kv_reason=seen.reason,
        matrix_params=matrix_params,
        expert_matrix_params=expert_matrix_params - spare,
        unread_params=groups[3] + spare,
        unread_bytes=size_bytes(unread) + spare_bytes,
        unread_matrix_params=unread_matrix_params + spare,
        empty_experts=empty,
        state_bytes=seen.state_bytes,
        kv_blocks=seen.blocks,
        attention_layers=_attention_layers(text, seen),
    )


def on_meta(config: PreTrainedConfig, dtype: str, kind: type | None = None) -> torch.nn.Module:
    """The model of a configuration on torch's meta device, where a parameter has no memory.

    `kind` is its class where that is known: a net that was loaded may have the configuration of a
    part, which names no model by itself (the text of Emu3).
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lib.models import dry_run

    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    name = config.model_type
    try:
        with dry_run.building():
            if kind is not None:
                net = kind._from_config(config, dtype=getattr(torch, dtype))
            else:
                net = AutoModelForCausalLM.from_config(
                    config, dtype=getattr(torch, dtype), trust_remote_code=False
                )
    except Exception as error:  # whatever the code of an architecture raises
        if isinstance(error, ValueError) and "AutoModel" in str(error):
            raise ModelError(
                f"{name!r} is not a causal language model of the installed transformers; use a "
                "decoder-only model, or update transformers"
            ) from error
        package = re.search(r"pip install ([\w.-]+)", str(error))
        if package and isinstance(error, ImportError):
            raise ModelError(
                f"{name!r} needs {package[1]}, which is not installed: pip install {package[1]} "
                "into this environment, or use another model"
            ) from error
        raise ModelError(
            f"{name!r} cannot be built from this configuration: {reason_of(error)}; give a "
            "config.json that the installed transformers builds, or update transformers"
        ) from error
    return net.eval().requires_grad_(False)


def reason_of(error: BaseException) -> str:
    """What the library raised, in one line, and the package to install where one is missing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no reason given"
    # A configuration that is checked field by field tells the cause in a second line.
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    return f"{type(error).__name__}: {text}"


def _layout(net: torch.nn.Module, config: PreTrainedConfig, dtype: str) -> decode_step.Layout:
    """What `decode_step` sees in a step of the net; once in a process for a configuration."""
    key = (json.dumps(config.to_dict(), sort_keys=True, default=str), dtype)
    if key not in _SEEN:
        if getattr(net, "_can_set_experts_implementation", lambda: False)():
            net.set_experts_implementation("batched_mm")  # as `generate()` runs them in a step
        _SEEN[key] = decode_step.layout(net)
    return _SEEN[key]


def _is_unread(name: str, seen: decode_step.Layout) -> bool:
    return seen.read is not None and name not in seen.read | (seen.looked_up or frozenset())


def _numel(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _lookup_tables(
    net: torch.nn.Module, seen: decode_step.Layout | None = None
) -> dict[str, torch.nn.Parameter]:
    """Embedding tables that are not the output matrix as well, and what else rows are taken of."""
    import torch

    output = net.get_output_embeddings()
    tied = id(output.weight) if output is not None else None
    owners = {id(p): name for name, p in net.named_parameters()}
    tables = [m.weight for m in net.modules() if isinstance(m, torch.nn.Embedding)]
    embeddings = {owners[id(w)]: w for w in tables if id(w) != tied}
    looked_up = (seen.looked_up if seen else None) or frozenset()
    more = {n: p for n, p in net.named_parameters() if n in looked_up and p.ndim > 1}
    return embeddings | more


def expert_modules(net: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that hold a layer's experts, by path: the library calls them `experts`."""
    return {p: m for p, m in net.named_modules() if p.rpartition(".")[2] == "experts"}


def _routed_experts(net: torch.nn.Module) -> tuple[dict[str, torch.nn.Parameter], int, int]:
    """Parameters of experts that a router chooses among, the number of experts, and the number of
    choices beside them that compute nothing.

    Recognised by structure: a list of modules called `experts`, or a module whose class is named
    for experts and whose own tensors hold all of them. How many there are the module says (or the
    configuration); a tensor may hold them along its leading axis or as parts of it. Shared experts
    have another name and count as always read.
    """
    routed: dict[str, torch.nn.Parameter] = {}
    counts, empty = set(), set()
    for path, module in net.named_modules():
        inside, count = _held_experts(net, path, module)
        if inside:
            counts.add(count)
            routed.update((f"{path}.{n}", p) for n, p in inside.items())
        classes = getattr(module, "num_router_classes", None)
        if isinstance(classes, int) and (held := _held_number(module)):
            empty.add(classes - held)
        elif inside:
            empty.add(getattr(module, "zero_expert_num", 0) or 0)
    if len(counts) > 1:
        raise ModelError(
            f"the experts of {net.config.model_type!r} come in several counts {sorted(counts)}; "
            "active parameters need one count for all layers"
        )
    return routed, counts.pop() if counts else 0, max(empty, default=0)


def _held_experts(
    net: torch.nn.Module, path: str, module: torch.nn.Module
) -> tuple[dict[str, torch.nn.Parameter], int]:
    """Parameters of the experts that this module itself holds, and how many experts these are."""
    import torch

    name, kind = path.rpartition(".")[2], type(module).__name__
    if name == "experts" and isinstance(module, torch.nn.ModuleList):
        return dict(module.named_parameters()), len(module)
    if name != "experts" and ("Expert" not in kind or "shared" in name):
        return {}, 0
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim > 1}
    count = _held_number(module) or _held_number(fields.text_config(net.config))
    if not count and len(lengths := {len(p) for p in own.values()}) == 1:
        count = lengths.pop()
    return {n: p for n, p in own.items() if count and len(p) >= count}, count or 0


def _held_number(place: Any) -> int:
    """The number of experts that a module, or a configuration, states; 0 where it states none."""
    values = (fields.value(place, name) for name in (*_EXPERTS_NAMES, "groups"))
    return next((v for v in values if isinstance(v, int) and v > 0), 0)


def _spare(routed: dict[str, torch.nn.Parameter], experts: int, empty: int) -> tuple[int, int]:
    """Parameters, and their bytes, that lie in tensors of experts and belong to none: room for
    choices that compute nothing."""
    if not empty:
        return 0, 0
    longer = [p for p in routed.values() if len(p) == experts + empty]
    params = sum(p.numel() * empty // (experts + empty) for p in longer)
    return params, sum(p.numel() * empty // (experts + empty) * p.element_size() for p in longer)


def _matrices(
    net: torch.nn.Module,
    tables: dict[str, torch.nn.Parameter],
    routed: dict[str, torch.nn.Parameter],
    experts: int,
    *,
    among: dict[str, torch.nn.Parameter] | None = None,
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
    # Where all experts of a layer are one tensor, it has three axes, or two with the rows of all
    # experts in one; their biases have two, with a row for each.
    inside = {
        id(p): p
        for n, p in routed.items()
        if n in linear or p.ndim == 3 or (p.ndim == 2 and len(p) > experts)
    }
    others = {id(p): p for n, p in linear.items() if n not in routed and n not in routers}
    if among is not None:
        allowed = {id(p) for p in among.values()}
        others = {i: p for i, p in others.items() if i in allowed}
    return _numel((inside | others).values()), _numel(inside.values())


def _experts_per_token(config: PreTrainedConfig, experts: int) -> int:
    stated = {}
    for place in (config, *fields.parts(config)):
        for name in _TOP_K_NAMES:
            top_k = fields.value(place, name)
            if isinstance(top_k, int) and 1 <= top_k <= experts:
                return top_k
            if top_k is not None:
                stated[name] = top_k
    if stated:
        values = " and ".join(f"{name} {value!r}" for name, value in stated.items())
        raise ModelError(
            f"{config.model_type!r} has {experts} experts, and its config says {values}; a token "
            f"uses 1 to {experts} of them: mend its config.json"
        )
    raise ModelError(
        f"{config.model_type!r} has {experts} experts, and its config says under none of "
        f"{', '.join(_TOP_K_NAMES)} how many of them a token uses; set one in its config.json"
    )


def _attention_layers(
    config: PreTrainedConfig, seen: decode_step.Layout
) -> tuple[tuple[int, int | None], ...] | None:
    """`ModelCard.attention_layers`: values of another width than keys (MLA), heads that differ by
    layer, layers that share keys and therefore have no cache of their own; None for all others."""
    heads, head_dim = (
        fields.number(config, "attention_heads"),
        fields.value(config, "head_dim"),
    )
    parts_of_key = [fields.value(config, n) for n in ("qk_nope_head_dim", "qk_rope_head_dim")]
    value = fields.value(config, "v_head_dim")
    if value and heads and seen.layers:
        key = sum(parts_of_key) if all(parts_of_key) else head_dim
        return tuple((heads * (key + value), window) for _, window in seen.layers) if key else None
    kinds, each = (
        fields.value(config, "layer_types"),
        fields.value(config, "per_layer_config"),
    )
    if not kinds or (head_dim and heads and not fields.value(config, "num_kv_shared_layers")):
        return None
    sizes = [(fields.number(c, "attention_heads"), fields.value(c, "head_dim")) for c in each]
    windows = [
        fields.value(config, "sliding_window") if "sliding" in kind else None for kind in kinds
    ]
    if not all(isinstance(n, int) for size in sizes for n in size):
        return None
    return tuple((2 * h * d, w) for (h, d), w in zip(sizes, windows, strict=True))


def _longest_list(net: torch.nn.Module) -> int:
    """Layers of a net whose configuration does not say how many: its longest list of modules."""
    import torch

    return max((len(m) for m in net.modules() if isinstance(m, torch.nn.ModuleList)), default=0)


def _rows(module: torch.nn.Module | None) -> int:
    return len(module.weight) if module is not None else 0
