"""Implementations of a mixture of experts: names, choice, and the one that computes every expert.

`all_experts` is what transformers ran for gpt-oss when arXiv 2508.16700 was written: every expert
on every token, the unchosen ones weighted with zero. It is registered through the library's own
interface, so that it works for every model that uses this interface.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch

ALL_EXPERTS = "all_experts"
BARRED = -1e4  # a router's bias beyond which no logit reaches; float16 can hold it
# The library calls a Python loop over the experts "eager", which says nothing in a record.
_LIBRARY_NAMES = {"loop": "eager"}


def library_name(name: str) -> str:
    """The name that transformers uses for one of ours."""
    return _LIBRARY_NAMES.get(name, name)


def names() -> list[str]:
    """Every implementation that can be asked for, ours included."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if ALL_EXPERTS not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        ALL_EXPERTS_FUNCTIONS.register(ALL_EXPERTS, all_experts_forward)
    return ["loop", *ALL_EXPERTS_FUNCTIONS.valid_keys()]


def in_use(net: Any) -> str:
    """The implementation that a forward pass of this net runs now."""
    name = net.config.get_text_config(decoder=True)._experts_implementation
    # Only modules that the library has decorated can run anything but their own loop.
    switchable = any(hasattr(module, "_apply_gate") for module in net.modules())
    return name if switchable and name not in (None, "eager") else "loop"


def chooses_on_host(net: Any) -> bool:
    """Whether a forward pass asks the host which experts to run, as a Python loop does."""
    has_experts = any(path.rpartition(".")[2] == "experts" for path, _ in net.named_modules())
    return has_experts and in_use(net) == "loop"


def use(net: Any, name: str) -> None:
    """Switch a loaded net to another implementation; raise where it does not follow."""
    if name not in names():
        raise ValueError(f"unknown experts {name!r}; use one of {', '.join(names())}")
    net.set_experts_implementation(library_name(name))
    if in_use(net) != name:
        raise ValueError(f"this model runs its experts as {in_use(net)!r}, not as {name!r}")


@contextlib.contextmanager
def using(net: Any, name: str | None) -> Iterator[None]:
    """Another implementation inside the block; None leaves it as it is."""
    if name is None or name == (before := in_use(net)):
        yield
        return
    use(net, name)
    try:
        yield
    finally:
        use(net, before)


def biases(net: Any) -> list[torch.Tensor]:
    """The biases (one value an expert) of routers that have one, in the order of the layers."""
    biases = []
    for path, module in net.named_modules():
        if path.rpartition(".")[2] == "experts" and (count := getattr(module, "num_experts", 0)):
            beside = net.get_submodule(path.rpartition(".")[0]).children()
            given = (getattr(router, "bias", None) for router in beside if router is not module)
            biases += [b for b in given if torch.is_tensor(b) and b.shape == (count,)]
    return biases


@contextlib.contextmanager
def pinned(net: Any, chosen: int, *, seed: int) -> Iterator[None]:
    """Inside the block each router chooses the same `chosen` experts for every token.

    Which ones differs by layer and seed. The others are barred by the router's bias, in place, so
    that captured and compiled steps follow; the logits of the chosen ones, and so their weights,
    are what they were.
    """
    kept = [(bias, bias.detach().clone()) for bias in biases(net)]
    draw = random.Random(seed)
    try:
        with torch.no_grad():
            for bias, _ in kept:
                barred = sorted(draw.sample(range(len(bias)), len(bias) - chosen))
                bias[torch.tensor(barred, device=bias.device)] = BARRED
        yield
    finally:
        with torch.no_grad():
            for bias, before in kept:
                bias.copy_(before)


def all_experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Every expert on every token, summed with a dense matrix of routing weights.

    hidden_states (tokens, hidden); top_k_index and top_k_weights (tokens, k); returns
    (tokens, hidden). `self` is the experts module, with the attributes that the library gives it.
    """
    tokens, hidden = hidden_states.shape
    every = hidden_states.repeat(self.num_experts, 1).view(self.num_experts, tokens, hidden)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _linear(self, name, every)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outputs = _linear(self, "down_proj", inner)
    weights = torch.zeros(
        tokens, self.num_experts, dtype=top_k_weights.dtype, device=top_k_weights.device
    ).scatter_(1, top_k_index, top_k_weights)
    return (outputs * weights.T.unsqueeze(-1)).sum(dim=0).to(hidden_states.dtype)


def _linear(module: torch.nn.Module, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """One linear layer per expert: inputs (experts, tokens, in) to (experts, tokens, out)."""
    weight = getattr(module, name)
    out = torch.bmm(inputs, weight if module.is_transposed else weight.transpose(1, 2))
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias").unsqueeze(1)
    return out
