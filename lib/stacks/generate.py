"""`generate()` of transformers as a decode stack, with its dynamic or its static cache."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch

from lib.models import dry_run
from lib.models.count import reason_of
from lib.models.fetch import NOT_OURS
from lib.stacks.decoding import options
from lib.stacks.stack import Decoded, StackError

_CACHE = "past_key_values"


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


class _Forced:
    """Leaves `generate()` no choice but the tokens of a continuation (batch, steps)."""

    def __init__(self, prompt_tokens: int, continuation: torch.Tensor) -> None:
        self._first, self._tokens = prompt_tokens, continuation

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self._first
        if step >= self._tokens.shape[1]:
            return scores
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, self._tokens[:, step : step + 1], 0.0)


class _Rotations:
    """Rotary frequencies that follow the longest sequence so far (rope_type dynamic).

    The library keeps them for calls to come, so that a call would compute other logits, and skip
    other work, after a longer one. Each call of ours begins as the first does.
    """

    def __init__(self, net: torch.nn.Module) -> None:
        self._modules = [m for m in net.modules() if "dynamic" in str(getattr(m, "rope_type", ""))]

    def reset(self) -> None:
        for module in self._modules:
            for name in [n for n in module._buffers if n.endswith("original_inv_freq")]:
                kind = name.removesuffix("original_inv_freq")
                setattr(module, f"{kind}inv_freq", module._buffers[name])
                setattr(module, f"{kind}max_seq_len_cached", module.original_max_seq_len)


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
        self.net, self._options = net, options(decoding)
        self._rotations, self._worked = _Rotations(net), False
        self._static, self._capacity = static, capacity or 0
        self._cache, self._size = None, (0, 0)
        self.before: Callable[[], None] = lambda: None  # raises for a net that cannot be run
        # As the library names it: nets of states have their own word.
        self._cache_name = "cache_params" if "mamba" in type(net).__name__.lower() else _CACHE

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
            extra[self._cache_name] = self._held(ids.shape[0], ids.shape[1] + new_tokens)
        out = self._generated(ids, config, **extra)
        tokens = out.sequences[:, ids.shape[1] :]
        if tokens.shape[1] != new_tokens:
            raise RuntimeError(f"asked for {new_tokens} new tokens, got {tokens.shape[1]}")
        # A call that compiled is spoilt as a whole: what part was compilation cannot be told.
        compiled = self._static and compiled_graphs() > graphs
        return Decoded(
            tokens, out.past_key_values, time.perf_counter() - start_s if compiled else 0.0
        )

    def forced_logits(self, ids: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
        """Logits (batch, steps, vocabulary) after each token of a given continuation.

        `generate()` itself computes them, as it does in a timed call: with its own cache, under
        the name that the model has for it, and the decode step that it chooses.
        """
        from transformers import GenerationConfig

        steps = continuation.shape[1]
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=steps + 1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        extra = {}
        if self._static:
            extra[self._cache_name] = self._held(ids.shape[0], ids.shape[1] + steps + 1)
        forced = [_Forced(ids.shape[1], continuation)]
        out = self._generated(ids, config, logits_processor=forced, **extra)
        return torch.stack(out.logits[1:], 1)

    def _generated(self, ids: torch.Tensor, config: Any, **options: Any) -> Any:
        """What `generate()` returns; where its first call fails, why, as the library tells it."""
        self._rotations.reset()
        try:
            out = self.net.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, **options
            )
        except (StackError, torch.OutOfMemoryError, torch.AcceleratorError, *NOT_OURS):
            raise
        except Exception as error:  # whatever the code of an architecture raises
            if self._worked:
                raise
            other = "hf-eager, or " if self._static else ""
            raise StackError(
                f"generate() of the installed transformers cannot run {self.net.config.model_type} "
                f"as configured ({reason_of(error)}); use {other}another configuration, model or "
                "version of transformers"
            ) from error
        self._worked = True
        return out

    def _held(self, batch: int, length: int) -> Any:
        """The static cache, emptied; a new one where batch or length outgrow it."""
        from transformers import StaticCache

        if self._cache is None:
            self.before()
        if self._size[0] != batch or length > self._size[1]:
            self._size = (batch, max(length, self._capacity))
            config = self.net.config.get_text_config(decoder=True)
            self._cache = StaticCache(config=config, max_cache_len=self._size[1])
        self._cache.reset()
        return self._cache


def rehearse_static(twin: Any) -> None:
    """Two tokens with a static cache on shapes alone; raises what keeps them from coming.

    A model whose class says that its step is not to be compiled gets other logits here than with a
    growing cache, often enough: some of them attend to what is still empty.
    """
    if not twin._supports_default_dynamic_cache():
        raise StackError(
            "it keeps a cache of its own, and the library has no static form of it; use hf-eager"
        )
    stack = GenerateStack(twin, decoding="greedy", static=True, capacity=64)
    if stack._cache_name not in inspect.signature(twin.forward).parameters:
        raise StackError("it takes no cache: every step reads the whole sequence; use hf-eager")
    with dry_run.Shapes(small=64):  # the cache is larger, and so a shape
        stack(torch.full((1, 5), 5), 2)
    if not twin._can_compile_fullgraph:
        raise StackError(
            "the library does not offer its compilation for it (_can_compile_fullgraph is false), "
            "nor promises the same logits with a cache of fixed size; use hf-eager"
        )


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
