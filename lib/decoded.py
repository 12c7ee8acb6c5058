"""What a decode stack returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Decoded:
    """New tokens (batch, new_tokens) and the key-value cache, still held.

    `prepare_s` are the seconds of this call that went into captures and compilations; a timed call
    has none.
    """

    tokens: torch.Tensor
    cache: Any
    prepare_s: float = 0.0
