"""Numbers of a configuration of the library, under whatever name its architecture has for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LAYERS_NAMES = ("num_hidden_layers", "decoder_layers", "n_layers", "n_layer", "num_layers")
NAMES = {
    "layers": LAYERS_NAMES,
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "attention_heads": ("num_attention_heads", "decoder_attention_heads", "n_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "kv_n_heads"),
    "vocab_size": ("vocab_size",),
}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part that describes the decoder of text, or all of it."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several parts could be meant
        return config


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Configurations inside this one."""
    from transformers import PreTrainedConfig

    for name in vars(config):
        if name.endswith("_config") and isinstance(part := value(config, name), PreTrainedConfig):
            yield part


def value(place: Any, name: str) -> Any:
    """A field of a configuration or a module; None where it is missing or differs by layer."""
    try:
        return getattr(place, name, None)
    except RuntimeError:  # the library refuses to name one value for all layers
        values = {getattr(layer, name, None) for layer in place.per_layer_config}
        return values.pop() if len(values) == 1 else None


def number(config: PreTrainedConfig, what: str) -> int | None:
    """A positive whole number by its name in NAMES; None where no field has one."""
    values = (value(config, name) for name in NAMES[what])
    return next((v for v in values if isinstance(v, int) and v > 0), None)


def head_dim(config: PreTrainedConfig) -> int | None:
    """Width of a head: as stated, else the hidden size shared out; None where neither is told."""
    try:
        if getattr(config, "head_dim", None):
            return config.head_dim
    except RuntimeError:
        return value(config, "head_dim")
    hidden, heads = (number(config, what) for what in ("hidden_size", "attention_heads"))
    return hidden // heads if hidden and heads else None
