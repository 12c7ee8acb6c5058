"""Decode stacks behind one signature.

A stack is a function `open(net, *, decoding) -> generate`, and
`generate(ids, new_tokens, on_token=None) -> Decoded` produces exactly `new_tokens` tokens: the
end-of-sequence token never stops it. `on_token` is called after each token has reached the host,
which costs a synchronisation, so that timed runs leave it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lib import experts

# One change against greedy each. top_k = 0 and top_p = 1 switch the library's own filters off.
_SAMPLE = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
DECODING = {
    "greedy": {"do_sample": False},
    "top-p 0.9": {**_SAMPLE, "top_p": 0.9},
    "top-k 50": {**_SAMPLE, "top_k": 50},
    "temperature 1.5": {**_SAMPLE, "temperature": 1.5},
    "temperature 0.5": {**_SAMPLE, "temperature": 0.5},
}


@dataclass(frozen=True)
class Decoded:
    """New tokens (batch, new_tokens) and the key-value cache, still held."""

    tokens: torch.Tensor
    cache: Any


Generate = Callable[..., Decoded]


class _Stamp:
    """The streamer that `generate()` expects; skips the prompt, which is handed over first."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token, self._prompt_seen = on_token, False

    def put(self, tokens: torch.Tensor) -> None:
        if self._prompt_seen:
            self._on_token()
        self._prompt_seen = True

    def end(self) -> None:
        pass


def hf_eager(net: Any, *, decoding: str = "greedy") -> Generate:
    """`generate()` of transformers with its dynamic cache, as the paper used it."""
    from transformers import GenerationConfig

    # The model's own defaults (stop tokens, sampling) would fill what a call leaves unset.
    net.generation_config = GenerationConfig()

    def generate(
        ids: torch.Tensor, new_tokens: int, on_token: Callable[[], None] | None = None
    ) -> Decoded:
        config = GenerationConfig(
            **DECODING[decoding],
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
        )
        out = net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            **({"streamer": _Stamp(on_token)} if on_token else {}),
        )
        tokens = out.sequences[:, ids.shape[1] :]
        if tokens.shape[1] != new_tokens:
            raise RuntimeError(f"asked for {new_tokens} new tokens, got {tokens.shape[1]}")
        return Decoded(tokens, out.past_key_values)

    return generate


STACKS: dict[str, Callable[..., Generate]] = {"hf-eager": hf_eager}


def open_stack(name: str, net: Any, *, decoding: str = "greedy") -> Generate:
    """The generate function of a stack; a clear error for an unknown stack or decoding."""
    if name not in STACKS:
        raise ValueError(f"unknown stack {name!r}; known: {sorted(STACKS)}")
    if decoding not in DECODING:
        raise ValueError(f"unknown decoding {decoding!r}; known: {list(DECODING)}")
    return STACKS[name](net, decoding=decoding)


def experts_in_decode(net: Any) -> str | None:
    """The experts implementation that `generate()` really uses after the prefill.

    On a GPU the library replaces grouped_mm by batched_mm for the decode steps. None for a model
    without a choice of experts implementation.
    """
    if not getattr(net, "_can_set_experts_implementation", lambda: False)():
        return None
    with net._optimize_model_for_decode():
        return experts.in_use(net)
