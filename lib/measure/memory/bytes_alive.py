"""Bytes of what lives on: weights, logits, and a transformers cache beside what the card computes.

Counts that meet something they do not know raise ValueError with the name of the part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lib.records import record


def weight_bytes(net: Any) -> int:
    """Bytes of the storages that the parameters of a net lie in, each once."""
    storages = [parameter.untyped_storage() for parameter in net.parameters()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def tensor_bytes(tensor: Any) -> int:
    """Bytes of the storage that keeps a tensor alive."""
    return tensor.untyped_storage().nbytes()


def cache_tensors(cache: Any) -> list[Any]:
    """Tensors that a transformers cache leads to: keys and values of its layers, indexes of sparse
    attention, and states, in the layers or beside them. Lone numbers are counters, and left out."""
    if not getattr(cache, "layers", ()):
        raise ValueError(f"a {type(cache).__name__} has no layers of keys and values")
    if tensors := [t for t in _tensors(cache, set()) if t.numel() != 1]:
        return tensors
    kinds = sorted({type(layer).__name__ for layer in cache.layers})
    raise ValueError(f"the layers of the cache ({', '.join(kinds)}) keep no keys and values")


def _tensors(value: Any, seen: set[int]) -> Iterator[Any]:
    """Each tensor once; no weights and no configuration."""
    if id(value) in seen or isinstance(value, type) or hasattr(value, "named_parameters"):
        return
    seen.add(id(value))
    if hasattr(value, "untyped_storage"):
        yield value
        return
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
    else:
        own = {} if hasattr(value, "model_type") else getattr(value, "__dict__", {})
        parts = own.values()
    for part in parts:
        yield from _tensors(part, seen)


def cache_bytes(cache: Any, states: Sequence[Any] = ()) -> int:
    """Bytes of the tensors of all layers, and of states that the net itself holds."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in (*cache_tensors(cache), *states)
    )


def behind_bytes(cache: Any, states: Sequence[Any] = ()) -> int:
    """Bytes that these tensors keep alive beyond their own, being views of longer ones.

    A dynamic sliding layer keeps the whole prompt so until the first decode step.
    """
    held = (*cache_tensors(cache), *states)
    return sum(tensor_bytes(t) - t.numel() * t.element_size() for t in held)


def new_states(net: Any, earlier: Sequence[Any] = ()) -> list[Any]:
    """Tensors that modules hold as plain attributes (states of RecurrentGemma) and did not hold
    earlier: what a call made and no cache leads to."""
    from lib.models import dry_run

    held = (value for *_, value in dry_run.tensors_of_modules(net))
    return [value for value in held if not any(value is other for other in earlier)]


def is_static(cache: Any) -> bool:
    """Whether what grows was allocated in advance for its largest length; states do not grow."""
    return bool(_capacities(cache))


def card_bytes(card: Any, cache: Any, tokens: int) -> int:
    """What the card computes for such a cache: after `tokens`, or at a static one's capacity.

    What is kept of several tokens as one is never allocated in advance.
    """
    if capacities := _capacities(cache):
        capacity = max(capacities)
        blocks = card.kv_blocks
        later = sum(block.bytes_after(capacity) - block.bytes_after(tokens) for block in blocks)
        return card.kv_bytes(capacity, cache="static") - later
    return card.kv_bytes(tokens)


def _capacities(cache: Any) -> list[int]:
    layers = getattr(cache, "layers", ())
    return [layer.max_cache_len for layer in layers if hasattr(layer, "max_cache_len")]


def card_warnings(values: Mapping[str, Any], card_weight_bytes: int) -> list[dict[str, str]]:
    """A cache, or weights, not as large as the card computes are worth a look."""
    warnings = []
    cached, computed = values.get("kv_tensor_bytes"), values.get("kv_card_bytes")
    if None not in (cached, computed) and cached != computed:
        warnings.append(
            record.warning(
                "kv-card",
                f"the cache holds {cached} bytes, the card computes {computed}: check "
                "layer types and window in the model's config",
            )
        )
    if values["weight_bytes"] != card_weight_bytes:
        warnings.append(
            record.warning(
                "weights-card",
                f"the weights take {values['weight_bytes']} bytes, the card computes "
                f"{card_weight_bytes}: check the dtype of each parameter",
            )
        )
    return warnings
