"""What an engine must be, and what its answers must hold, before anything of it is a row."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lib.models import draws
from lib.stacks.engine_process import EngineError
from lib.stacks.vllm_settings import Settings


def form_in_use(worker: Mapping[str, Any], tensors: Sequence[draws.Draw]) -> str:
    """What the weights are held in, as the worker shows it: never by what was asked.

    A mixture is named by its experts, which hold nearly all of it; a dense model by what lies
    between embeddings and output matrix. Where no layer is quantised, the dtype of most bytes;
    elsewhere bits a value, counted in the worker's memory (padding and biases included).
    """
    experts = [draw for draw in tensors if ".experts." in draw.name]
    methods = worker["experts"] if experts else worker["linear"]
    parts = worker["parameter_bytes"]
    if all(name.startswith("Unquantized") for name in methods):
        sizes = Counter()
        for part in parts.keys() - {"tables"}:
            sizes.update(parts[part])
        return sizes.most_common(1)[0][0]
    named = experts or [d for d in tensors if not re.search("embed|lm_head", d.name)]
    values = sum(math.prod(draw.shape) for draw in named)
    held = parts.get("experts" if experts else "rest", {})
    bits = 8 * sum(held.values()) / values
    if bits < 4:
        return f"an unknown form ({bits:.1f} bits a value found)"
    if bits < 6:
        return "mxfp4"
    return "fp8" if bits < 10 else max(held, key=held.get)


def require(started: Mapping[str, Any], settings: Settings, form: str) -> None:
    """Raise where the engine is not what rows would say it is."""
    if form != settings.form:
        raise EngineError(
            f"the weights were asked in {settings.form}, but the engine holds them in {form}: "
            "this version of vLLM or this GPU has no kernels for it; ask for that form"
        )
    require_sharded(started["worker"], settings.devices)
    if started["settings"]["prefix_caching"]:
        raise EngineError("the engine caches prefixes, so that repeated prompts cost nothing")
    if settings.weights == "random" and not started["worker"]["loaded"].get("tensors"):
        raise EngineError(
            "the engine did not draw its weights by name: its plugin was not found; set "
            "VLLM_PLUGINS so that drawn_weights is among them, or unset it"
        )


def require_sharded(worker: Mapping[str, Any], devices: int) -> None:
    """Raise unless so many workers hold the model, all with the same weights drawn by name."""
    digests = worker.get("draws") or [None]
    if len(digests) != devices:
        raise EngineError(
            f"the engine was asked for devices: {devices} and runs on {len(digests)}: this version "
            "of vLLM does not shard so"
        )
    if len({*digests}) > 1:
        raise EngineError(
            f"the GPUs drew different weights ({', '.join(map(str, digests))}), whose parts make "
            "no model"
        )


def require_whole(answer: Mapping[str, Any], batch: int, new_tokens: int) -> None:
    """Raise unless every sequence has exactly the tokens asked for."""
    lengths = [len(row) for row in answer["tokens"]]
    if lengths != [new_tokens] * batch:
        raise EngineError(
            f"asked for {new_tokens} new tokens in each of {batch} sequences, got {lengths}"
        )


def require_together(scheduler: Mapping[str, Any], batch: int) -> None:
    """Raise where sequences were not all held at once, or a prefix was taken from a cache."""
    if scheduler["preempted"] or scheduler["queued"]:
        raise EngineError(
            f"{batch} sequences were not held at once: {scheduler['preempted']} preempted, "
            f"{scheduler['queued']} steps with one waiting for room (at most "
            f"{scheduler['running']} ran, the cache was {scheduler['cache_share']:.0%} full); "
            "lower the batch or the context, or raise max_num_seqs"
        )
    if scheduler["prefix_hits"]:
        raise EngineError(f"{scheduler['prefix_hits']} prompt tokens came from a prefix cache")
