"""What a GGUF file says of its architecture and the library leaves aside when it reads one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lib.models.card import ModelError

ROTATIONS = re.compile("rope_freqs|rope_factors|attn_rot_embd")  # constants of GGUF files
# How Llama 3 stretches its rotations; the factor stands in the tensor of a GGUF file.
_LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def set_fields(path: Path, config: Any) -> None:
    """Make a configuration what its GGUF file says; raise where that is not understood."""
    from gguf import GGUFReader

    read = GGUFReader(path)
    _set_window(path, read, config)
    rope = getattr(config, "rope_parameters", None) or {}
    base = _field(read, "rope.freq_base")
    if base and "rope_theta" in rope:  # one for all layers
        rope["rope_theta"] = float(base)
    _set_rotations(path, read, config)


def _field(read: Any, name: str) -> Any:
    """A number or text by the end of its key, which begins with the architecture; else None."""
    return next((f.contents() for n, f in read.fields.items() if n.endswith(f".{name}")), None)


def _set_window(path: Path, read: Any, config: Any) -> None:
    """Layers that attend to the last tokens only: fewer are cached, and read in each step."""
    window, limit = _field(read, "attention.sliding_window"), _field(read, "context_length")
    if not window or (limit and window >= limit):
        return
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if not hasattr(config, "sliding_window") or "sliding_attention" not in kinds:
        raise ModelError(
            f"{path.name} says that layers attend to the last {window} tokens, which the installed "
            f"transformers leaves aside for {config.model_type}; give the checkpoint it was made of"
        )
    config.sliding_window = int(window)


def _set_rotations(path: Path, read: Any, config: Any) -> None:
    """Stretch the rotary positions of a configuration as a GGUF file does; raise where that is not
    understood. The library leaves aside what most architectures say of it."""
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return  # the library read it
    kinds = [f.contents() for n, f in read.fields.items() if n.endswith("rope.scaling.type")]
    factors = [t.data for t in read.tensors if ROTATIONS.search(t.name) and (t.data != 1).any()]
    if len(factors) == 1 and config.model_type == "llama":
        stretched = rope | _LLAMA3 | {"factor": float(factors[0].max())}
        plain = rope["rope_theta"] ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        config.rope_parameters = stretched
        own = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
        if plain.shape == factors[0].shape and np.allclose(own, plain / factors[0], rtol=1e-4):
            return
    if not factors and kinds == ["linear"]:  # of layers without a window, where kinds differ
        (factor,) = [f.contents() for n, f in read.fields.items() if n.endswith("scaling.factor")]
        stretched = {"rope_type": "linear", "factor": float(factor)}
        rope.get("full_attention", rope).update(stretched)
    elif factors or any(kind not in ("", "none") for kind in kinds):
        raise ModelError(
            f"{path.name} stretches its rotary positions ({', '.join(kinds) or 'by a tensor'}), "
            "which the installed transformers leaves aside for this architecture; give the "
            "checkpoint it was made of"
        )
