"""What a decode stack returns, and what it raises for a model that it cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class StackError(ValueError):
    """A stack that cannot run a model; the message says why, and what can."""


@dataclass(frozen=True)
class Decoded:
    """New tokens (batch, new_tokens) and the key-value cache, still held.

    `prepare_s` are the seconds of this call that went into captures and compilations; a timed call
    has none. `decode_s`, asked after a synchronisation, gives the seconds of the device from before
    the first decode step to after the last (new_tokens - 1 steps); None where no stack marks them.
    """

    tokens: torch.Tensor
    cache: Any
    prepare_s: float = 0.0
    decode_s: Callable[[], float] | None = None
