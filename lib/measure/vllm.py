"""Rows of vLLM's engine: arms by the workbook's own definitions, and the check of its logits.

A shape is warm when two calls in a row compile nothing; a timed call that compiles has no times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib.hardware.device import time_call
from lib.models.card import computed
from lib.records.record import Record
from lib.stacks import logits_check
from lib.stacks.stack import MOST_ERROR, MOST_ERROR_DENSE
from lib.stacks.vllm import MOST_WARMUP_CALLS, EngineError, VllmEngine


def arm(
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
    clock; `warmup_s`. A timed call in which something was compiled or captured fails the row.
    """
    batch, context = len(ids), len(ids[0])
    shape = {"batch": batch, "context": context, "new_tokens": new_tokens}
    try:
        warmup = warm_up(engine, ids, new_tokens, most_warmup_calls)
        calls = []
        for _ in range(repeats):
            seconds, out = time_call(lambda: engine.generate(ids, new_tokens), engine)
            if out.prepare_s:
                raise EngineError(
                    "vLLM compiled or captured inside a timed call, after "
                    f"{len(warmup)} calls that warmed this shape up; measure it again"
                )
            calls.append((seconds, out))
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


def warm_up(engine: VllmEngine, ids: Any, new_tokens: int, most: int) -> list[tuple[float, float]]:
    """Calls until nothing was compiled or captured in two of them in a row: (seconds, those of them
    in a call that compiled). Sequences of a batch arrive in other groups each time, and some
    kernels are compiled for each size of a group."""
    calls: list[tuple[float, float]] = []
    while len(calls) < 2 or any(prepare_s for _, prepare_s in calls[-2:]):
        if len(calls) == most:
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


# --- the gate ----------------------------------------------------------------------------------


def barred(net: Any, chosen: int, *, seed: int) -> dict[str, list[float]]:
    """Biases with which every router of a net chooses the same `chosen` experts, by name.

    The choice that `experts.pinned` gives the net itself, for `VllmEngine.pinned`.
    """
    from lib.models import experts

    names = {id(parameter): name for name, parameter in net.named_parameters()}
    barred = {}
    for layer, bias in enumerate(experts.biases(net)):
        kept = experts.pins(len(bias), chosen, seed=seed, layer=layer, sequence=0)
        row = [value if n in kept else experts.BARRED for n, value in enumerate(bias.tolist())]
        barred[names[id(bias)]] = row
    return barred


def look(
    found: Any, expected: Any, again: Any, *, dtype: str, layers: int, how: str = ""
) -> logits_check.Look:
    """How far logits (batch, steps, vocabulary) of the engine are from those of our own net.

    `expected` are the net's along the same continuation, `again` the net's in another batch, which
    only changes the order of sums. Measures and tolerance are those of `stacks.logits_check`;
    `how` says that routers chose freely.
    """
    errors = logits_check.relative_errors(found, expected).mean(0).tolist()
    floor = logits_check.relative_errors(again, expected).mean().item()
    most = logits_check.FREE_MOST if how else MOST_ERROR_DENSE
    allowed = min(most, max(logits_check.tolerance(dtype, layers), logits_check.NOISE * floor))
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return logits_check.Look(errors, floor, allowed, same, how)


def gate_row(
    engine_key: Mapping[str, Any],
    seen: logits_check.Look,
    *,
    free: logits_check.Look | None = None,
    pinned_experts: int = 0,
    values: Mapping[str, Any],
    env_id: str | None,
) -> Record:
    """The `gate` row of looks that passed, as `logits_check.row` writes it; a GateError if not.

    `seen` is the look with pinned routers where there are any to pin, `free` the one with routers
    that choose as they like.
    """
    for one in filter(None, (seen, free)):
        too_much = one is seen and pinned_experts and not one.mean <= MOST_ERROR
        if too_much or not one.passed:
            raise logits_check.GateError(
                f"vLLM's logits differ from those of our net on the same weights by {one.text}: "
                "its times are not shown"
            )
    told, samples = {**seen.values, "pinned_experts": pinned_experts}, {}
    if free:
        told |= {f"free_{name}": value for name, value in free.values.items()}
        samples["free_error"] = free.errors
    return Record(
        "gate",
        dict(engine_key) | {"new_tokens": len(seen.errors)},
        samples={"relative_error": seen.errors, **samples},
        values={**values, **told},
        env_id=env_id,
    )


def sampled_errors(sampled: Mapping[str, Any], logits: Any) -> Any:
    """Errors (batch, steps) of a batch that the engine decoded by itself, from `sampled`.

    `logits` (batch, steps, vocabulary) are our net's, before each of the engine's tokens. The root
    of the mean square by which log-probabilities of the sampled ids differ, over the spread of the
    net's logits: the share of their norm that `look` tells, from some ids instead of all.
    """
    import torch

    logits = logits.float()
    ours = torch.log_softmax(logits, -1)[..., sampled["ids"]].cpu()
    differ = torch.tensor(sampled["logprobs"]) - ours
    return differ.pow(2).mean(-1).sqrt() / logits.std(-1).cpu()
