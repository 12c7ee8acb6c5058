"""Rows of vLLM's engine: opened for a notebook, arms by the workbook's own definitions, its gates.

A shape is warm when two calls in a row compile nothing; a timed call that compiles has no times.
What our own net computes on the same weights is computed by another process (`vllm_gate`), before
the engine starts or after it ended, since one GPU does not hold both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.hardware.apart import open_apart
from lib.hardware.device import time_call
from lib.measure import vllm_gate
from lib.models import origin
from lib.models.card import computed
from lib.models.load import tokenizer_of
from lib.records import record
from lib.records.record import Record
from lib.stacks import logits_check
from lib.stacks.engine_process import EngineError
from lib.stacks.stack import MOST_ERROR, MOST_ERROR_DENSE, MOST_ERROR_FP8
from lib.stacks.vllm import MOST_WARMUP_CALLS, VllmEngine, prompt_of
from lib.stacks.vllm_settings import GRAPH_SIZES, Settings, held_card, interpreter, require_runs

PIECE, BEYOND = 2048, 256  # an engine's longest sequence is some pieces and a little
BATCHED_TOKENS = 8192
GATE_STEPS = 8
ROOM = 0.8  # of a GPU's memory, for the weights of part of our own net
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
    layers is compared when this one has ended (`late_gates`)."""
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
        first_layers, unchecked = layers_that_fit(where, weights, machine.environment())
    known = {"name": name, "weights": weights, "form": dtype, "seed": seed, "layers": first_layers}
    ours: dict[str, Any] = {"looks": [], "barred": [], "pins": 0, "block": 0}
    rounds = card.experts or dtype == "fp8"  # some of it has to be looked at at once
    if contexts and not (first_layers or unchecked) and (batch == 1 or rounds):
        looks = [
            {"ids": [prompt_of(config, tokenizer, context, seed)], "steps": GATE_STEPS}
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


def layers_that_fit(
    where: origin.Origin, weights: str, environment: Mapping[str, Any]
) -> tuple[int, str]:
    """How many of the first layers of our own net one GPU holds in bfloat16, at most LAYERS_AT_ONCE
    (0: all of them, or none); and where none can be compared, why."""
    kind, count = record.board(environment)
    total = environment.get("gpu_total_bytes")
    card = held_card(where, "bfloat16")
    if total is None or card.weight_bytes <= total // count:
        return 0, ""
    for layers in range(min(vllm_gate.LAYERS_AT_ONCE, card.layers - 1), 1, -1):
        if weights == "random" and (
            held_card(where, "bfloat16", layers).weight_bytes <= ROOM * total // count
        ):
            return layers, ""
    return 0, (
        f"its logits are not checked: our own net of {where.name} takes "
        f"{card.weight_bytes / 1e9:.0f} GB in bfloat16, and one {kind} has "
        f"{total / count / 1e9:.0f}"
    )


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


# --- the gate ----------------------------------------------------------------------------------


def allowed_error(form: str, layers: int, floor: float, *, freely: bool = False) -> float:
    """How far an engine's logits may be from those of our net in bfloat16, as share of their norm.

    Of MXFP4 our net has the very values. Of FP8 it has not: what that rounds is in the difference,
    of a few layers at once by 0.2 to 0.5, so that only logits of something else are refused, which
    differ by 1.2 and more. So it is where routers choose freely: one choice that rounding turns
    moves all logits after it, and eight steps see few or many of them.
    """
    if form == "fp8":
        return MOST_ERROR_FP8
    if freely:
        return logits_check.FREE_MOST
    dtype = "bfloat16" if form == "mxfp4" else form
    rounding = max(logits_check.tolerance(dtype, layers), logits_check.NOISE * floor)
    return min(MOST_ERROR_DENSE, rounding)


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
    allowed = allowed_error(dtype, layers, floor, freely=bool(how))
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return logits_check.Look(errors, floor, allowed, same, how)


def gate_row(
    engine_key: Mapping[str, Any],
    looks: Sequence[logits_check.Look],
    *,
    free: logits_check.Look | None = None,
    pinned_experts: int = 0,
    layers_at_once: int = 0,
    values: Mapping[str, Any],
    env_id: str | None,
) -> Record:
    """The `gate` row of looks that passed, as `logits_check.row` writes it; a GateError if not.

    `looks` are those with pinned routers, or with some layers at once, a round each, where there
    are such, else the one there is; the row tells the one that is furthest off, and its samples are
    of all. `free` is the look with routers that choose as they like.
    """
    seen = max(looks, key=lambda one: one.mean / one.allowed)
    for one in filter(None, (*looks, free)):
        too_much = one is not free and pinned_experts and not one.mean <= MOST_ERROR
        if too_much or not one.passed:
            raise logits_check.GateError(
                f"vLLM's logits differ from those of our net on the same weights by {one.text}: "
                "its times are not shown"
            )
    told, samples = {**seen.values, "pinned_experts": pinned_experts}, {}
    if pinned_experts:
        told["pinned_rounds"] = len(looks)
    if layers_at_once:
        told |= {"layers_at_once": layers_at_once, "layer_rounds": len(looks)}
    if free:
        told |= {f"free_{name}": value for name, value in free.values.items()}
        samples["free_error"] = free.errors
    return Record(
        "gate",
        dict(engine_key) | {"new_tokens": len(seen.errors)},
        samples={"relative_error": [error for one in looks for error in one.errors], **samples},
        values={**values, **told},
        env_id=env_id,
    )


def not_checked(engine: VllmEngine, env_id: str | None, **place: Any) -> Record:
    """The `gate` row of a model that our own net cannot hold: an error that says so."""
    return Record("gate", engine.key(**place), error=engine.unchecked, env_id=env_id)


def gates(engine: VllmEngine, env_id: str | None) -> Iterator[Record]:
    """The `gate` row of each context that the engine was opened for: decode steps of one sequence.

    One that our net cannot hold is a row with its error; of one that it holds in part there is none
    yet. Raises GateError where its logits are those of something else.
    """
    if engine.unchecked:
        yield not_checked(engine, env_id)
    for expected in engine.expected:
        ids, looks, free = expected["ids"], [], None
        if "error" in expected:
            yield Record(
                "gate", engine.key(context=len(ids[0])), error=expected["error"], env_id=env_id
            )
            continue
        for barred, ours in zip(engine.barred, expected["pinned"], strict=False):
            looks.append(_look_along(engine, ids, ours, barred))
        if expected["free"]:
            how = logits_check.FREELY if engine.pins else ""
            free = _look_along(engine, ids, expected["free"], {}, how)
        yield gate_row(
            engine.key(context=len(ids[0])),
            looks or [free],
            free=free if looks else None,
            pinned_experts=engine.pins,
            layers_at_once=engine.block,
            values=engine.values,
            env_id=env_id,
        )


def late_gates(
    engine: VllmEngine, contexts: Sequence[int], seed: int, env_id: str | None
) -> Iterator[Record]:
    """What `gates` gives, of a model that our net holds only in part: an engine with its first
    layers beside our net with the same. `engine` is ended for it; where that other engine cannot
    be had, the rows say why."""
    if not engine.first_layers:
        return
    engine.close()
    prompts = [engine.prompt(context, seed=seed) for context in contexts]
    looks = [{"ids": ids, "steps": GATE_STEPS} for ids in prompts]
    try:
        ours = vllm_gate.computed(engine.known, looks, _kind(engine))
        with _part_of(engine, ours) as part:
            part.expected = ours["looks"]
            rows = list(gates(part, env_id))
    except EngineError as error:
        keys = [engine.key(context=context) for context in contexts]
        rows = [Record("gate", k, error=record.first_line(error), env_id=env_id) for k in keys]
    for row in rows:
        place = {name: row.key[name] for name in ("context", "new_tokens")}
        values = {**row.values, **engine.values, "first_layers": engine.first_layers}
        yield replace(row, key=engine.key(**place), values={} if row.error else values)


def _part_of(engine: VllmEngine, rounds: Mapping[str, Any]) -> VllmEngine:
    """An engine with the first layers of a model, to be looked at in these rounds."""
    part = engine.anew(layers=engine.first_layers)
    part.barred = rounds["barred"]
    for one in (engine, part):
        one.pins, one.block = rounds["pins"], rounds["block"]
    return part


def _sampled_in_part(engine: VllmEngine, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an engine with the first layers decodes of the same batches."""
    with _part_of(engine, vllm_gate.computed(engine.known, [], _kind(engine))) as part:
        return [sampled(part, one["ids"], len(one["sampled"]["tokens"][0])) for one in batches]


def _kind(engine: VllmEngine) -> str:
    return engine.device.kind if engine.device else "cpu"


def _look_along(
    engine: VllmEngine, ids: Any, ours: Mapping[str, Any], barred: Mapping, how: str = ""
) -> logits_check.Look:
    """The engine's logits along our net's continuation beside our net's, some parameters `barred`
    in both."""
    with engine.pinned(barred):
        found = engine.forced_logits(ids, ours["continuation"])
    expected, again = ours["expected"], ours["again"]
    return look(found, expected, again, dtype=engine.form, layers=engine.card.layers, how=how)


def sampled(engine: VllmEngine, ids: Any, steps: int) -> dict[str, Any]:
    """What `batch_gates` needs of a batch: what the engine decoded in its first round."""
    with engine.pinned(engine.barred[0] if engine.barred else {}):
        return {"ids": ids, "sampled": engine.sampled(ids, steps)}


def batch_gates(
    engine: VllmEngine, batches: Sequence[dict[str, Any]], env_id: str | None
) -> Iterator[Record]:
    """A `gate` row for each batch that was sampled; `engine` is ended first.

    A batch that computes something else, or that our net cannot hold, is a row with its error.
    """
    engine.close()
    if engine.unchecked:
        for one in batches:
            place = {"context": len(one["ids"][0]), "batch": len(one["ids"])}
            yield not_checked(engine, env_id, **place)
        return
    try:
        if engine.first_layers:
            batches = _sampled_in_part(engine, batches)
        seen = vllm_gate.computed(engine.known, batches, _kind(engine))["looks"]
    except EngineError as error:  # what was timed stands by itself, as a lead
        seen = [{"error": record.first_line(error)}] * len(batches)
    for one, ours in zip(batches, seen, strict=True):
        ids, steps = one["ids"], len(one["sampled"]["tokens"][0])
        key = engine.key(context=len(ids[0]), batch=len(ids))
        try:
            if "error" in ours:
                raise EngineError(ours["error"])
            layers = engine.first_layers or engine.card.layers
            allowed = allowed_error(engine.form, layers, ours["floor"])
            shares = ours["errors"], ours["floor"], allowed, ours["same_choice"]
            of_batch = logits_check.Look(*shares, " of a batch")
            part = {"first_layers": engine.first_layers} if engine.first_layers else {}
            yield gate_row(
                key,
                [of_batch],
                pinned_experts=engine.pins,
                layers_at_once=engine.block,
                values={**engine.values, **part},
                env_id=env_id,
            )
        except (EngineError, logits_check.GateError) as error:
            key |= {"new_tokens": steps}
            yield Record("gate", key, error=record.first_line(error), env_id=env_id)
