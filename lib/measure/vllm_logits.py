"""Gates of vLLM's engine: how far its logits are from those of our own net on the same weights.

Of one sequence while the engine runs, along our net's continuation; of a batch after it has ended,
from what it sampled. What our net computes is computed by another process (`vllm_gate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lib.measure import vllm_gate
from lib.models import origin
from lib.records import record
from lib.records.record import Record
from lib.stacks import logits_check
from lib.stacks.engine_process import EngineError
from lib.stacks.stack import MOST_ERROR, MOST_ERROR_DENSE, MOST_ERROR_FP8
from lib.stacks.vllm import VllmEngine
from lib.stacks.vllm_settings import held_card

GATE_STEPS = 8
ROOM = 0.8  # of a GPU's memory, for the weights of part of our own net


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
    most = min(vllm_gate.LAYERS_AT_ONCE, card.layers - 1) if weights == "random" else 0
    for layers in range(most, 1, -1):
        if held_card(where, "bfloat16", layers).weight_bytes <= ROOM * total // count:
            return layers, ""
    return 0, (
        f"its logits are not checked: our own net of {where.name} takes "
        f"{card.weight_bytes / 1e9:.0f} GB in bfloat16, and one {kind} has "
        f"{total / count / 1e9:.0f}"
    )


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
