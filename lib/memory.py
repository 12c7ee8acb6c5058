"""Peak memory of one call with the key-value cache held, under two protocols.

`memory-paper` is what arXiv 2508.16700 ran: a plain forward over the whole prompt, whose logits
for all positions stay alive, then single-token forwards. `memory` is `generate()`, which keeps the
last position's logits only. Both subtract a baseline taken after a warm-up of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from lib import decode, experts, records
from lib.card import computed
from lib.progress import track
from lib.records import Record
from lib.session import begin_records, prompt_ids

WARMUP_TOKENS = 2


def sweep(
    model: Any,
    *,
    stack: str = "hf-eager",
    contexts: Sequence[int],
    new_tokens: int,
    seed: int,
    records_path: str | Path,
    also_experts: Sequence[str] = (),
) -> list[Record]:
    """Both protocols at every context, each row written at once.

    `also_experts` names further implementations of a mixture of experts to measure after the one
    in use; a dense model has none.
    """
    rows = begin_records(model, records_path)
    for name in [None, *also_experts] if model.card.experts else [None]:
        if name is not None:
            experts.use(model.net, name)
        rows += _protocols(model, stack=stack, contexts=contexts, new_tokens=new_tokens, seed=seed,
                           env_id=rows[0].env_id, records_path=records_path)  # fmt: skip
    return rows


def _protocols(
    model: Any, *, stack: str, contexts: Sequence[int], new_tokens: int, seed: int,
    env_id: str | None, records_path: str | Path,
) -> list[Record]:  # fmt: skip
    generate = decode.open_stack(stack, model.net)
    protocols = {
        "memory-paper": lambda ids, tokens: paper_call(model.net, ids, tokens),
        "memory": lambda ids, tokens: {"cache": generate(ids, tokens).cache},
    }
    rows = []
    for context in track(contexts, f"memory of {model.name}"):
        for kind, call in protocols.items():
            row = arm(model, kind=kind, call=call, stack=stack, context=context,
                      new_tokens=new_tokens, seed=seed, env_id=env_id)  # fmt: skip
            rows.append(records.append(records_path, row))
    return rows


def expected(card: Any, contexts: Sequence[int], new_tokens: int) -> pd.DataFrame:
    """Before measuring: the cache that the architecture implies, in MB of 10^6 bytes.

    A dash, and a column with the reason, where the card cannot compute it.
    """
    sizes, missing = computed(
        **{str(context): partial(card.kv_bytes, context + new_tokens) for context in contexts}
    )
    shown = [sizes[str(c)] / 1e6 if str(c) in sizes else "-" for c in contexts]
    made = pd.DataFrame({"context (tokens)": contexts, "KV cache computed (MB)": shown,
                         **({"missing": list(missing.values())} if missing else {})})  # fmt: skip
    return made.round(3).set_index("context (tokens)")


def paper_call(net: Any, ids: Any, new_tokens: int) -> dict[str, Any]:
    """Forward of the prompt with all logits kept, then `new_tokens` single-token forwards.

    The cache ends up with context + new_tokens tokens. Everything returned is still alive.
    """
    import torch

    with torch.inference_mode():
        prefill = net(ids, use_cache=True)
        # Models of states (Mamba) have another name for their cache.
        name = "cache_params" if hasattr(prefill, "cache_params") else "past_key_values"
        cache, token = getattr(prefill, name), prefill.logits[:, -1:].argmax(-1)
        for _ in range(new_tokens):
            step = net(token, **{name: cache}, use_cache=True)
            token = step.logits[:, -1:].argmax(-1)
    return {"cache": cache, "logits": prefill.logits}


def arm(
    model: Any,
    *,
    kind: str,
    call: Callable[[Any, int], dict[str, Any]],
    stack: str,
    context: int,
    new_tokens: int,
    seed: int,
    env_id: str | None,
) -> Record:
    """Baseline, call, peak. All values in bytes.

    baseline: after loading and a warm-up of the same shape, nothing of a call alive; peak: most in
    use during the call; held: in use after it with the cache (and, in the paper's protocol, the
    prompt's logits) alive; kv_tensor: the cache's tensors; kv_card: what the model card computes;
    workspace: peak - baseline - kv_tensor - logits, the rest.
    """
    device = model.device
    ids = prompt_ids(model, context, seed=seed)
    call(ids, min(new_tokens, WARMUP_TOKENS))
    device.empty_cache()
    with device.watch_memory(resident_bytes=model.card.weight_bytes) as values:
        alive = call(ids, new_tokens)
    kv_bytes = cache_bytes(alive["cache"])
    logits_bytes = tensor_bytes(alive["logits"]) if "logits" in alive else 0
    above_bytes = values["peak_bytes"] - values["baseline_bytes"]
    sizes, unknown = computed(
        kv_card_bytes=lambda: model.card.kv_bytes(cached_tokens(kind, context, new_tokens))
    )
    values |= sizes | {
        "kv_tensor_bytes": kv_bytes,
        "logits_bytes": logits_bytes,
        "workspace_bytes": above_bytes - kv_bytes - logits_bytes,
    }
    missing = {name: f"the {device.memory_source} does not report it"
               for name, value in values.items() if value is None}  # fmt: skip
    return Record(
        kind=kind,
        key=model.key(stack=stack, context=context, new_tokens=new_tokens, decoding="greedy"),
        values={**model.source, **{k: v for k, v in values.items() if v is not None},
                "memory_source": device.memory_source},
        missing=missing | unknown,
        warnings=tuple(kv_warnings(values)),
        env_id=env_id,
    )  # fmt: skip


def cached_tokens(kind: str, context: int, new_tokens: int) -> int:
    """Tokens in the cache at the end: `generate()` never caches the last token that it returns."""
    return context + new_tokens if kind == "memory-paper" else context + new_tokens - 1


def tensor_bytes(tensor: Any) -> int:
    """Bytes of the storage that keeps a tensor alive."""
    return tensor.untyped_storage().nbytes()


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors of all layers of a transformers cache: keys and values, or states."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in _held(layer)
        if tensor is not None
    )


def _held(layer: Any) -> list[Any]:
    """What a layer of the cache keeps; one with linear attention has states by number."""
    states = (getattr(layer, name, {}).values() for name in ("conv_states", "recurrent_states"))
    return [getattr(layer, "keys", None), getattr(layer, "values", None), *chain(*states)]


def kv_warnings(values: dict[str, int | None]) -> list[dict[str, str]]:
    """A cache that is not as large as the card computes is worth a look."""
    if values["kv_tensor_bytes"] == values.get("kv_card_bytes", values["kv_tensor_bytes"]):
        return []
    return [records.warning(
        "kv-card", f"the cache holds {values['kv_tensor_bytes']} bytes, the card computes "
        f"{values['kv_card_bytes']}: check layer types and window in the model's config",
    )]  # fmt: skip
