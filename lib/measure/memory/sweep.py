"""Peak memory of one call with the key-value cache held, under two protocols.

`memory-paper` is what arXiv 2508.16700 ran: a plain forward over the whole prompt, whose logits
for all positions stay alive, then single-token forwards. `memory` is `generate()`, which keeps the
last position's logits only. Both subtract a baseline taken after a warm-up of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.measure.memory import forecast, phases
from lib.measure.memory.bytes_alive import (
    behind_bytes,
    cache_bytes,
    card_bytes,
    card_warnings,
    is_static,
    new_states,
    tensor_bytes,
    weight_bytes,
)
from lib.measure.session import begin_records, track
from lib.models import dry_run, experts
from lib.models.count import reason_of
from lib.models.fetch import NOT_OURS
from lib.models.prompts import prompt_ids
from lib.records import record, store
from lib.records.kinds import PROTOCOLS, STUDY_STACK
from lib.records.record import Record
from lib.stacks import registry

WARMUP_TOKENS = 2
# What a row holds, or says why not.
READINGS = (
    "reserved_bytes",
    "used_bytes",
    "kv_tensor_bytes",
    "kv_card_bytes",
    "workspace_bytes",
    "predicted_bytes",
    "peak_in",
)
STEPPED = STUDY_STACK  # the stack whose passes are plain calls of the net, which hooks can follow


class PlainError(RuntimeError):
    """A net whose forward pass does not run as the paper's protocol calls it."""


def sweep(
    model: Any,
    *,
    stack: str = STUDY_STACK,
    contexts: Sequence[int],
    new_tokens: int,
    seed: int,
    records_path: str | Path,
    also_experts: Sequence[str] = (),
    predicted: Mapping[tuple, int | str] | None = None,
) -> list[Record]:
    """Both protocols at every context, each row written at once.

    `also_experts` names further implementations of a mixture of experts to measure after the one
    in use; a dense model has none. `predicted` is what `predict` returned before.
    """
    rows = begin_records(model, records_path)
    for name in [None, *also_experts] if model.card.experts else [None]:
        with experts.using(model.net, name):
            rows += _protocols(
                model,
                stack=stack,
                contexts=contexts,
                new_tokens=new_tokens,
                seed=seed,
                env_id=rows[0].env_id,
                records_path=records_path,
                predicted=predicted or {},
            )
    return rows


def _protocols(
    model: Any,
    *,
    stack: str,
    contexts: Sequence[int],
    new_tokens: int,
    seed: int,
    env_id: str | None,
    records_path: str | Path,
    predicted: Mapping[tuple, int | str],
) -> list[Record]:
    def generated(ids: Any, tokens: int) -> dict[str, Any]:
        """A stack is opened for its call, so that fixed buffers count as the call's memory."""
        generate = registry.open_stack(stack, model.net, capacity=ids.shape[1] + tokens)
        return {"cache": generate(ids, tokens).cache}

    calls = {
        "memory-paper": lambda ids, tokens: paper_call(model.net, ids, tokens),
        "memory": generated,
    }
    rows = []
    for context in track(contexts, f"memory of {model.name}"):
        for kind, call in calls.items():
            prediction = predicted.get(
                (kind, model.key()["experts"], context), "nothing was predicted"
            )
            place = {"stack": stack, "context": context, "new_tokens": new_tokens}
            try:
                row = arm(
                    model, kind=kind, call=call, predicted=prediction, seed=seed, env_id=env_id,
                    **place,
                )  # fmt: skip
            except PlainError as error:
                key = model.key(**place, decoding="greedy")
                row = Record(kind, key, error=record.first_line(error), env_id=env_id)
            rows.append(store.append(records_path, row))
    return rows


def predict(
    model: Any, contexts: Sequence[int], new_tokens: int, also_experts: Sequence[str] = ()
) -> dict[tuple, int | str]:
    """Before measuring: the peak above the baseline (bytes) of every arm of `sweep`, or why none.

    Keys are (kind, experts, context). Every arm is run on torch's meta device, where nothing is
    allocated (`forecast`): the prefill, and the last decode step beside the logits held.
    """
    try:
        twin = dry_run.twin_of(model.net)
    except Exception as error:  # whatever building an architecture raises
        twin = error
    decoding = registry.experts_in_decode(model.net, STEPPED)
    on_cpu = model.device.torch_device == "cpu"
    implementations = {model.experts: {"memory-paper": model.experts, "memory": decoding}}
    implementations |= {
        name: dict.fromkeys(PROTOCOLS, name) for name in also_experts if model.card.experts
    }
    peaks: dict[tuple, int | str] = {}
    for name, in_decode in implementations.items():
        for context in track(contexts, f"predicted memory of {model.name}"):
            for kind in PROTOCOLS:
                peaks[kind, name, context] = _predicted(
                    twin, kind, context, new_tokens, name, in_decode[kind], on_cpu
                )
    return peaks


def _predicted(
    twin: Any,
    kind: str,
    context: int,
    new_tokens: int,
    name: str,
    in_decode: str | None,
    on_cpu: bool,
) -> int | str:
    paper, cached = kind == "memory-paper", cached_tokens(kind, context, new_tokens)
    try:
        if isinstance(twin, Exception):
            raise twin
        peak = forecast.prefill_bytes(
            twin, context, all_logits=paper, implementation=name, on_cpu=on_cpu
        )
        if cached > context:
            held = forecast.logits_bytes(twin, context) if paper else 0
            peak = max(peak, held + forecast.decode_bytes(twin, cached, in_decode, on_cpu=on_cpu))
    except Exception as error:  # a model's code may ask for values, which meta tensors lack
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"its code does not run without values ({first})"
    return peak


def paper_call(net: Any, ids: Any, new_tokens: int) -> dict[str, Any]:
    """Forward of the prompt with all logits kept, then `new_tokens` single-token forwards.

    The cache ends up with context + new_tokens tokens. Everything returned is still alive. Raises a
    PlainError for a net that runs in `generate()` alone, if at all.
    """
    import torch

    with torch.inference_mode():
        try:
            prefill = net(ids, use_cache=True)
            cache, token = forecast.cache_of(prefill), prefill.logits[:, -1:].argmax(-1)
            for _ in range(new_tokens):
                step = net(token, **cache, use_cache=True)
                token = step.logits[:, -1:].argmax(-1)
        except (torch.OutOfMemoryError, torch.AcceleratorError, *NOT_OURS):
            raise
        except Exception as error:  # whatever the code of an architecture raises
            raise PlainError(
                f"a forward pass with nothing but tokens and cache fails ({reason_of(error)}), and "
                "the paper's protocol is such passes"
            ) from error
    return {"cache": next(iter(cache.values())), "logits": prefill.logits}


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
    predicted: int | str = "nothing was predicted",
) -> Record:
    """Baseline, call, peak. All values in bytes.

    baseline: after loading and a warm-up of the same shape, nothing of a call alive; peak: most in
    use during the call; held: in use after it with the cache (and, in the paper's protocol, the
    prompt's logits) alive; kv_tensor: the cache's tensors; kv_card: what the model card computes;
    workspace: peak - baseline - kv_tensor - logits, the rest. What more the device tells is in
    `hardware.memory_in_use`; what the second, followed call tells is in `where_it_peaks`.
    """
    device = model.device
    ids = prompt_ids(model, context, seed=seed)
    few = min(new_tokens, WARMUP_TOKENS)
    call(ids, few)
    earlier = new_states(
        model.net
    )  # held on to, so that the baseline has them and no call frees them
    device.empty_cache()
    with device.watch_memory(resident_bytes=model.card.weight_bytes) as values:
        alive = call(ids, new_tokens)
    values["predicted_bytes"] = predicted if isinstance(predicted, int) else None
    values["weight_bytes"] = weight_bytes(model.net)
    values["logits_bytes"] = tensor_bytes(alive["logits"]) if "logits" in alive else 0
    cached = cached_tokens(kind, context, new_tokens)
    states = new_states(model.net, earlier)
    cache_values, missing = cache_readings(alive["cache"], model.card, cached, states)
    cache_kind = "static" if is_static(alive["cache"]) else "dynamic"
    del alive, states
    values |= cache_values
    if cache_values["kv_tensor_bytes"] is not None:
        parts = ("baseline_bytes", "kv_tensor_bytes", "logits_bytes")
        values["workspace_bytes"] = values["peak_bytes"] - sum(values[name] for name in parts)
        if stack == STEPPED:
            values |= where_it_peaks(model, call, ids, few, values, earlier)
    missing |= {
        "workspace_bytes": missing["kv_tensor_bytes"],
        "peak_in": missing["kv_tensor_bytes"] or f"only the passes of {STEPPED} are followed",
        "predicted_bytes": str(predicted),
    }
    return Record(
        kind=kind,
        key=model.key(
            stack=stack, context=context, new_tokens=new_tokens, decoding="greedy", cache=cache_kind
        ),
        values={
            **model.source,
            **{k: v for k, v in values.items() if v is not None},
            "memory_source": device.memory_source,
        },
        missing={
            name: missing.get(name)
            or device.missing.get(name)
            or f"the {device.memory_source} does not report it"
            for name in READINGS
            if values.get(name) is None
        },
        warnings=tuple(card_warnings(values, model.card.weight_bytes)),
        env_id=env_id,
    )


def cache_readings(
    cache: Any, card: Any, tokens: int, states: Sequence[Any] = ()
) -> tuple[dict[str, int | None], dict[str, str]]:
    """Bytes of the cache held, of what stands behind it and by the card, and why one is None.

    A cache that is not understood is no reason to fail.
    """
    counts = {
        "kv_tensor_bytes": lambda: cache_bytes(cache, states),
        "kv_behind_bytes": lambda: behind_bytes(cache, states),
        "kv_card_bytes": lambda: card_bytes(card, cache, tokens),
    }
    values, missing = dict.fromkeys(counts), dict.fromkeys(counts, "")
    for name, count in counts.items():
        try:
            values[name] = count()
        except ValueError as error:
            missing[name] = str(error)
    return values, missing


def where_it_peaks(
    model: Any,
    call: Callable,
    ids: Any,
    tokens: int,
    measured: Mapping[str, Any],
    earlier: Sequence[Any] = (),
) -> dict[str, Any]:
    """In which stretch of a call the memory peaks, and what of cache and experts is alive there.

    From a second, shorter call that hooks follow (`phases`); a decode step at the end of
    the measured call has a cache that is longer by what grew in between. prefill_peak: baseline
    and the most during the prefill; peak_in: the stretch; kv_peak and kv_peak_behind: the cache's
    tensors there, and what they keep alive beyond their own bytes; expert_workspace: the most that
    the experts of a layer add in the prefill, decode_expert_workspace in a decode step.
    """

    def sizes(cache: Any) -> tuple[int, int]:
        states = new_states(model.net, earlier)
        return cache_bytes(cache, states), behind_bytes(cache, states)

    model.device.empty_cache()
    with phases.follow(model.net, model.device, sizes) as trace:
        shorter = sizes(call(ids, tokens)["cache"])
    longer = measured["kv_tensor_bytes"], measured["kv_behind_bytes"]
    grown = max(longer[0] - shorter[0], 0)
    _, where = max(
        (peak + grown * name.startswith("decode"), name) for name, _, peak in trace.stretches
    )
    there = longer if where.startswith("decode") else trace.prefill_cache or shorter
    return {
        "prefill_peak_bytes": measured["baseline_bytes"] + trace.peak_bytes("prefill"),
        "peak_in": where,
        "kv_peak_bytes": there[0],
        "kv_peak_behind_bytes": there[1],
        "expert_workspace_bytes": trace.grown_bytes(f"prefill {phases.EXPERTS}"),
        "decode_expert_workspace_bytes": trace.grown_bytes(f"decode {phases.EXPERTS}"),
    }


def cached_tokens(kind: str, context: int, new_tokens: int) -> int:
    """Tokens in the cache at the end: `generate()` never caches the last token that it returns."""
    return context + new_tokens if kind == "memory-paper" else context + new_tokens - 1
