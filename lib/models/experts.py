"""Implementations of a mixture of experts: names, choice, and the one that computes every expert.

`all_experts` is what transformers ran for gpt-oss when arXiv 2508.16700 was written: every expert
on every token, the unchosen ones weighted with zero. It is registered through the library's own
interface, so that it works for every model that uses this interface.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ALL_EXPERTS = "all_experts"
BARRED = -1e4  # what no logit of a router reaches; float16 can hold it
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


def routers(net: Any) -> list[torch.nn.Module]:
    """The module beside each mixture of experts whose one matrix has a row for every expert, in the
    order of the layers."""
    found = []
    for path, module in net.named_modules():
        if path.rpartition(".")[2] == "experts" and (count := getattr(module, "num_experts", 0)):
            for beside in net.get_submodule(path.rpartition(".")[0]).children():
                rows = [len(p) for p in beside.parameters() if p.dim() == 2]
                if beside is not module and rows == [count]:
                    found.append(beside)
    return found


def pins(count: int, chosen: int, *, seed: int, layer: int, sequence: int) -> list[int]:
    """The `chosen` experts of `count` that a layer's router is pinned to for one sequence.

    Sequences that follow one another share none, until all experts have had their turn.
    """
    turn, place = divmod(sequence, count // chosen)
    order = random.Random(f"{seed}/{layer}/{turn}").sample(range(count), count)
    return sorted(order[place * chosen : (place + 1) * chosen])


@contextlib.contextmanager
def pinned(net: Any, chosen: int, *, seed: int, sequences: Sequence[int] = (0,)) -> Iterator[None]:
    """Inside the block each router chooses `chosen` experts of its own for each sequence.

    Which ones differs by layer, sequence and seed, and holds for all tokens of a sequence; a
    forward pass is of these `sequences`, or of any number where there is one. The logits of the
    chosen ones, and so their weights, are what they were. What a captured or compiled step is made
    of inside the block stays pinned. `chosen` 0 pins nothing.
    """
    touched = []
    try:
        for layer, router in enumerate(routers(net) if chosen else ()):
            count = next(len(p) for p in router.parameters() if p.dim() == 2)
            bars = torch.full((len(sequences), count), BARRED, device=net.device)
            for row, sequence in zip(bars, sequences, strict=True):
                row[pins(count, chosen, seed=seed, layer=layer, sequence=sequence)] = 0.0
            touched.append((router, type(router)))
            router.register_buffer("bars", bars, persistent=False)
            router.__class__ = _pinned(type(router))
        yield
    finally:
        for router, before in touched:
            router.__class__ = before
            del router.bars


@functools.cache
def _pinned(router: type) -> type:
    """A router's class whose logits are lower by what `bars` (sequences, experts) bars."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Barred(self.bars):
            return router.forward(self, *args, **kwargs)

    return type(f"Pinned{router.__name__}", (router,), {"forward": forward})


class _Barred(TorchFunctionMode):
    """Products with a column for every expert are a router's logits; rows are sequence by
    sequence."""

    def __init__(self, bars: torch.Tensor) -> None:
        super().__init__()
        self.bars = bars

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and out.shape[-1] == self.bars.shape[-1]:
            rows = out.reshape(len(self.bars), -1, out.shape[-1])
            return (rows + self.bars[:, None].to(out.dtype)).view(out.shape)
        return out


_PRODUCTS = (functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


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
