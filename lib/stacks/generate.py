"""`generate()` of transformers as a decode stack, with its dynamic or its static cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lib.stacks.stack import Decoded

# top_k = 0 and top_p = 1 switch the library's own filters off. First, one change against greedy
# each; then the settings of arXiv 2508.16700's script, where the library's own top_k of 50 is on.
_SAMPLE = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
_THEIRS = {**_SAMPLE, "top_k": 50}
DECODING = {
    "greedy": {"do_sample": False},
    "top-p 0.9": {**_SAMPLE, "top_p": 0.9},
    "top-k 50": {**_SAMPLE, "top_k": 50},
    "temperature 0.7 top-p 0.9": {**_THEIRS, "temperature": 0.7, "top_p": 0.9},
    "temperature 0.7 top-k 50": {**_THEIRS, "temperature": 0.7},
    "temperature 1.0 top-p 0.95": {**_THEIRS, "top_p": 0.95},
    "temperature 0.3 top-p 0.8": {**_THEIRS, "temperature": 0.3, "top_p": 0.8},
}


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


class GenerateStack:
    """Calls of `generate()` that produce exactly the tokens asked for.

    `static` keeps one static cache of `capacity` tokens over all calls, which makes the library
    compile the decode step on a GPU. Without a capacity the cache is made anew where a call needs a
    longer one.
    """

    def __init__(
        self,
        net: Any,
        *,
        decoding: str,
        static: bool = False,
        capacity: int | None = None,
    ) -> None:
        from transformers import GenerationConfig

        # The model's own defaults (stop tokens, sampling) would fill what a call leaves unset.
        net.generation_config = GenerationConfig()
        self.net, self._options = net, dict(DECODING[decoding])
        self._static, self._capacity = static, capacity or 0
        self._cache, self._size = None, (0, 0)

    def __call__(
        self, ids: torch.Tensor, new_tokens: int, on_token: Callable[[], None] | None = None
    ) -> Decoded:
        """New tokens (batch, new_tokens) and the cache that holds all but the last of them."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            **self._options, max_new_tokens=new_tokens, return_dict_in_generate=True
        )
        extra: dict[str, Any] = {"streamer": _Stamp(on_token)} if on_token else {}
        graphs, start_s = compiled_graphs() if self._static else 0, time.perf_counter()
        if self._static:
            extra["past_key_values"] = self._held(ids.shape[0], ids.shape[1] + new_tokens)
        out = self.net.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, **extra
        )
        tokens = out.sequences[:, ids.shape[1] :]
        if tokens.shape[1] != new_tokens:
            raise RuntimeError(f"asked for {new_tokens} new tokens, got {tokens.shape[1]}")
        # A call that compiled is spoilt as a whole: what part was compilation cannot be told.
        compiled = self._static and compiled_graphs() > graphs
        return Decoded(
            tokens, out.past_key_values, time.perf_counter() - start_s if compiled else 0.0
        )

    def forced_logits(self, ids: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
        """Logits (batch, steps, vocabulary) after each token of a given continuation."""
        from transformers import DynamicCache

        length = ids.shape[1] + continuation.shape[1]
        with torch.no_grad():  # a static cache is written by `generate()` as well
            cache = (
                self._held(ids.shape[0], length)
                if self._static
                else DynamicCache(config=self.net.config.get_text_config(decoder=True))
            )
            self.net(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            steps = [
                self.net(token[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
                for token in continuation.T
            ]
        return torch.stack(steps, 1)

    def _held(self, batch: int, length: int) -> Any:
        """The static cache, emptied; a new one where batch or length outgrow it."""
        from transformers import StaticCache

        if self._size[0] != batch or length > self._size[1]:
            self._size = (batch, max(length, self._capacity))
            config = self.net.config.get_text_config(decoder=True)
            self._cache = StaticCache(config=config, max_cache_len=self._size[1])
        self._cache.reset()
        return self._cache


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
