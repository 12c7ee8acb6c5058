"""Rows of vLLM's engine: opened for a notebook, arms by the workbook's own definitions, experts.

A shape is warm when two calls in a row compile nothing; a timed call that compiles has no times.
What our own net computes on the same weights is computed by another process (`vllm_gate`), before
the engine starts or after it ended, since one GPU does not hold both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.hardware.apart import open_apart
from lib.hardware.device import time_call
from lib.measure import vllm_gate, vllm_logits
from lib.models import origin
from lib.models.card import computed
from lib.models.load import tokenizer_of
from lib.records import record
from lib.records.record import Record
from lib.stacks.engine_process import EngineError
from lib.stacks.vllm import MOST_WARMUP_CALLS, VllmEngine, prompt_of
from lib.stacks.vllm_settings import GRAPH_SIZES, Settings, held_card, interpreter, require_runs

PIECE, BEYOND = 2048, 256  # an engine's longest sequence is some pieces and a little
BATCHED_TOKENS = 8192
TRACED_TOKENS = 17
# The kernels of MXFP4 route inside themselves and tell nobody; Marlin's are given the choice.
TRACED_WITH = {"mxfp4": {"moe_backend": "marlin"}}
MOST_WINDOWS = 3  # times that a window is measured until nothing was compiled in it


def opened(
    name: str,
    *,
    weights: str,
    dtype: str,
    device: Any,
    seed: int,
    contexts: Sequence[int] = (),
    tokens: int,
    batch: int = 1,
    devices: int = 1,
    folder: str | Path,
) -> VllmEngine:
    """An engine with the model in it, and what our own net computes at each of `contexts`. An
    engine for a `batch` is compared when it has ended, so that before it only the rounds are made
    in which that is done. Of a model that our net holds only in part, another engine with those
    layers is compared when this one has ended (`vllm_logits.late_gates`)."""
    where = origin.find(name)
    interpreter()  # before any work
    require_runs(where, weights, dtype, devices)
    machine = open_apart(device, devices) if isinstance(device, str) else device
    config = origin.config_of(where)
    card = held_card(where, dtype)
    checkpoint, tokenizer, source = None, None, {"model_source": "random weights drawn by name"}
    if weights != "random":
        checkpoint, source = origin.files(where)
        tokenizer = tokenizer_of(checkpoint)
    settings = Settings(
        max_model_len=min(longest(tokens), card.context_limit or longest(tokens)),
        max_num_seqs=max(batch, *GRAPH_SIZES),
        form=dtype,
        weights=weights,
        checkpoint=checkpoint and str(checkpoint),
        seed=seed,
        max_num_batched_tokens=BATCHED_TOKENS,
        devices=devices,
    )
    first_layers, unchecked = 0, ""
    if machine.kind == "cuda":
        first_layers, unchecked = vllm_logits.layers_that_fit(where, weights, machine.environment())
    known = {"name": name, "weights": weights, "form": dtype, "seed": seed, "layers": first_layers}
    ours: dict[str, Any] = {"looks": [], "barred": [], "pins": 0, "block": 0}
    rounds = card.experts or dtype == "fp8"  # some of it has to be looked at at once
    if contexts and not (first_layers or unchecked) and (batch == 1 or rounds):
        looks = [
            {"ids": [prompt_of(config, tokenizer, context, seed)], "steps": vllm_logits.GATE_STEPS}
            for context in (contexts if batch == 1 else ())
        ]
        ours = vllm_gate.computed(known, looks, machine.kind)
    engine = VllmEngine(
        where.name,
        config,
        card,
        settings,
        folder=folder,
        device=machine,
        source=source,
        tokenizer=tokenizer,
    )
    engine.known, engine.expected, engine.barred = known, ours["looks"], ours["barred"]
    engine.pins, engine.block = ours["pins"], ours["block"]
    engine.first_layers, engine.unchecked = first_layers, unchecked
    return engine


def longest(tokens: int) -> int:
    """What an engine is started for so that it can hold `tokens`: few sizes, so that notebooks of
    one model measure the same engine."""
    return max(1, -(-(tokens - BEYOND) // PIECE)) * PIECE + BEYOND


def arm(engine: VllmEngine, *, context: int, seed: int, batch: int = 1, **arguments: Any) -> Record:
    """`measured` with prompts of this context and batch."""
    return measured(engine, engine.prompt(context, seed=seed, batch=batch), **arguments)


def measured(
    engine: VllmEngine,
    ids: Any,
    *,
    new_tokens: int,
    repeats: int,
    env_id: str | None,
    kind: str = "latency",
    most_warmup_calls: int = MOST_WARMUP_CALLS,
    warnings_of: Callable[[Sequence[float]], list] = lambda samples: [],
) -> Record:
    """One arm: warm up its shape, then `repeats` timed calls of exactly `new_tokens` tokens each.

    samples: `ttft_s` for one new token, `e2e_s` otherwise; `engine_s`, the same by the engine's own
    clock; `warmup_s`. Where something was compiled or captured in a timed call, all of them were
    warm-up, and others are timed; a shape that is still not warm after `most_warmup_calls` fails
    the row.
    """
    batch, context = len(ids), len(ids[0])
    shape = {"batch": batch, "context": context, "new_tokens": new_tokens}
    try:
        warmup, calls = warm_up(engine, ids, new_tokens, most_warmup_calls), []
        while len(calls) < repeats:
            seconds, out = time_call(lambda: engine.generate(ids, new_tokens), engine)
            calls.append((seconds, out))
            if prepare_s := out.prepare_s:
                warmup += [*((s, 0.0) for s, _ in calls[:-1]), (seconds, prepare_s)]
                warmup, calls = warm_up(engine, ids, new_tokens, most_warmup_calls, warmup), []
    except EngineError as error:
        text = str(error).strip().splitlines()[0]
        return Record(
            kind, engine.key(**shape), values=engine.values, error=f"EngineError: {text}",
            env_id=env_id,
        )  # fmt: skip
    samples_s = [seconds for seconds, _ in calls]
    told = [out.scheduler for _, out in calls]
    engine._share = max(engine._share, *(t["cache_share"] for t in told))
    sizes, missing = computed(
        decode_bytes=lambda: engine.card.decode_bytes(context + new_tokens // 2, batch)
    )
    share = max(t["cache_share"] for t in told)
    if not share:
        missing["cache_used_bytes"] = (
            "sequences that end with their first token were gone when asked"
        )
    values = {
        **engine.values,
        **sizes,
        "prepare_s": sum(prepare_s for _, prepare_s in warmup),
        "steps": max(t["steps"] for t in told),
        "waiting_peak": max(t["waiting"] for t in told),
        "running_peak": max(t["running"] for t in told),
        "preempted": 0,
        "prefix_queries": sum(t["prefix_queries"] for t in told),
        "prefix_hits": 0,
        "cache_used_bytes": engine.cache_bytes(share),
    }
    return Record(
        kind,
        engine.key(**shape),
        samples={
            "ttft_s" if new_tokens == 1 else "e2e_s": samples_s,
            "engine_s": [out.engine_s for _, out in calls],
            "warmup_s": [seconds for seconds, _ in warmup],
        },
        values={n: v for n, v in values.items() if v is not None},
        missing=missing,
        warnings=tuple(warnings_of(samples_s)),
        env_id=env_id,
    )


def warm_up(
    engine: VllmEngine,
    ids: Any,
    new_tokens: int,
    most: int = MOST_WARMUP_CALLS,
    before: Sequence[tuple[float, float]] = (),
) -> list[tuple[float, float]]:
    """Calls until nothing was compiled or captured in two of them in a row: (seconds, those of them
    in a call that compiled); `before` are calls that have already been made."""
    calls = list(before)
    while len(calls) < 2 or any(prepare_s for _, prepare_s in calls[-2:]):
        if len(calls) >= most:
            raise EngineError(
                f"vLLM still compiles after {most} calls of this shape; it is never warm"
            )
        seconds, out = time_call(lambda: engine.generate(ids, new_tokens), engine)
        calls.append((seconds, out.prepare_s))
    return calls


def distinct_experts(routed: Sequence, context: int) -> list[float]:
    """Distinct experts a decode step, the mean over layers: one number for each step.

    `routed` holds for each sequence the choices (tokens, layers, k) of prompt and new tokens. A
    decode step reads the experts that any sequence of the batch chose for its token. Raises where
    a token has one expert twice: then nothing was captured.
    """
    steps = min(len(choices) for choices in routed) - context
    means = []
    for place in range(context, context + steps):
        layers = zip(*(choices[place] for choices in routed), strict=True)
        counts = []
        for chosen in layers:
            if any(len(set(one)) != len(one) for one in chosen):
                raise EngineError(
                    "vLLM does not capture the experts' choice with these kernels: an expert came "
                    "twice for one token; trace with others (moe_backend)"
                )
            counts.append(len({expert for one in chosen for expert in one}))
        means.append(sum(counts) / len(counts))
    return means


def while_warm(model: Any, measure: Callable[[], Any]) -> Any:
    """What `measure()` gives, done again where an engine compiled or captured something in it;
    raises where it did each of MOST_WINDOWS times."""
    compiled = getattr(model, "something_compiled", bool)
    compiled()
    for _ in range(MOST_WINDOWS):
        measured = measure()
        if not compiled():
            return measured
    raise EngineError(
        f"vLLM compiled or captured inside a window, {MOST_WINDOWS} times in a row; measure it "
        "again"
    )


def traced(
    engine: VllmEngine,
    *,
    context: int,
    batches: Sequence[int],
    seed: int,
    env_id: str | None,
) -> Iterator[Record]:
    """Rows of the distinct experts that decode steps of each batch chose; none of a dense model.

    Another engine on the same weights, that tells the choices: it runs step by step, so that it is
    not timed. `engine` is ended for it.
    """
    if not engine.card.experts:
        return
    more = TRACED_WITH.get(engine.settings.form, {})
    try:
        other = engine.anew(routed_experts=True, enforce_eager=True, more=more)
    except EngineError as error:  # what was timed before stands by itself
        for batch in batches:
            key = engine.key(context=context, new_tokens=TRACED_TOKENS, batch=batch)
            yield Record("engine-trace", key, error=record.first_line(error), env_id=env_id)
        return
    with other:
        for batch in batches:
            key = other.key(context=context, new_tokens=TRACED_TOKENS, batch=batch)
            try:
                ids = other.prompt(context, seed=seed, batch=batch)
                routed = other.generate(ids, TRACED_TOKENS).routed
                if routed is None:
                    raise EngineError("vLLM told no choice of experts")
                samples = {"distinct_experts": distinct_experts(routed, context)}
                yield Record("engine-trace", key, samples, other.values, env_id=env_id)
            except EngineError as error:
                yield Record("engine-trace", key, error=record.first_line(error), env_id=env_id)
