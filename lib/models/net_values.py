"""What the values of a loaded net say: whether they are numbers, and those of a trained net."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lib.models import experts
from lib.models.card import ModelError
from lib.models.checkpoint_files import named
from lib.records.record import warning

CODE = "constant-weights"
_AT_ONCE = 2**30  # elements of one reduction
_FETCH = "fetch the checkpoint again"


def require_numbers(name: str, net: torch.nn.Module) -> None:
    """Raise where a weight, or a constant that a checkpoint holds, is not a number, or infinite."""
    for path, tensor in _held(net):
        if tensor.element_size() > 1:
            low, high = _span(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ModelError(
                    f"{name}: {path} holds values that are not finite numbers; {_FETCH}, or choose "
                    "another dtype"
                )


def require_trained(name: str, net: torch.nn.Module) -> tuple[dict[str, str], ...]:
    """Raise where one value fills a table of tokens, an output matrix, a router or most matrices,
    as files do that were made and not filled; what else one value fills is a warning.

    Such a net is no model: it tells no token from another, or sends all of them to the same
    experts, and a GPU needs less energy for zeros.
    """
    weights = ((path, t) for path, t in _held(net) if isinstance(t, torch.nn.Parameter))
    matrices = {path: tensor for path, tensor in weights if tensor.dim() > 1 and tensor.numel() > 1}
    constant = {path: tensor for path, tensor in matrices.items() if _is_constant(tensor)}
    if not constant:
        return ()
    tables = (getattr(net, f"get_{side}_embeddings")() for side in ("input", "output"))
    needed = [getattr(table, "weight", None) for table in tables]
    needed += [p for router in experts.routers(net) for p in router.parameters()]
    worst = [path for path, t in constant.items() if any(t is weight for weight in needed)]
    most = 2 * len(constant) > len(matrices)
    if worst or most:
        what = f"{len(constant)} of {len(matrices)} matrices, among them " if most else ""
        raise ModelError(
            f"{name} is not trained: one value fills {what}{named(worst or list(constant))}; "
            f"{_FETCH}, or use weights 'random'"
        )
    text = (
        f"one value fills {named(list(constant))}: times hold where the net is dense, energy may "
        f"be too low; {_FETCH} unless that is meant"
    )
    return (warning(CODE, text),)


def _held(net: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and kept constants that are floating-point numbers, by their paths."""
    for path, tensor in net.state_dict(keep_vars=True).items():
        if torch.is_tensor(tensor) and tensor.dtype.is_floating_point and tensor.numel():
            yield path, tensor


def _is_constant(tensor: torch.Tensor) -> bool:
    if tensor.element_size() == 1:  # of eight bits: equal where the bits are
        tensor = tensor.detach().view(torch.uint8)
    low, high = _span(tensor)
    return bool(low == high)


def _span(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest value; both are NaN where one value is. Needs no room of its own."""
    parts = [part.aminmax() for part in tensor.detach().flatten().split(_AT_ONCE)]
    return torch.stack([p.min for p in parts]).min(), torch.stack([p.max for p in parts]).max()
