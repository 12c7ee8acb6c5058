"""One model at growing batches, stack by stack: gate, times, energy, experts of a step.

A batch is of different prompts of one length. Where a stack fails, a row holds the error, and the
batches of that stack end, since the next would need more memory. Only a failed gate is about this
batch alone. An engine is judged at all its batches when it has ended: our net needs its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.measure import energy, experts, latency, vllm, vllm_logits
from lib.measure.session import track
from lib.models import load
from lib.records import record, store
from lib.records.record import Record
from lib.stacks import logits_check
from lib.stacks.registry import STACKS

GATE_STEPS = 4


def sweep(
    model: Any,
    *,
    stacks: Sequence[str],
    batches: Sequence[int],
    context: int,
    new_tokens: Sequence[int],
    repeats: int,
    energy_windows: int,
    window_s: float,
    idle_s: float,
    trace_stacks: Sequence[str],
    seed: int,
    env_id: str | None,
    records_path: str | Path,
) -> list[Record]:
    """Every stack at every batch in ascending order, each row written at once.

    A batch has a `gate` row; for one token (TTFT) and each of `new_tokens` (two, for slopes) a
    `batch` row of `repeats` calls; for each of `new_tokens` a `batch-energy` row of
    `energy_windows` windows of calls; and, for `trace_stacks`, a `trace` row. Idle power is
    measured once, before all.
    """
    path, rows = Path(records_path), []
    session = energy.sweep.open_session(model, stacks[0], path, seed, env_id, (), 0)
    idle = energy.sweep.idle_power(session, idle_s, "before")
    idle |= energy.sweep.idle_both(idle)
    arguments = {
        "new_tokens": new_tokens,
        "repeats": repeats,
        "windows": energy_windows,
        "window_s": window_s,
        "idle": idle,
        "path": path,
    }
    engine = STACKS[stacks[0]].apart
    sampled: list[dict[str, Any]] = []
    for stack in stacks:
        common = {"stack": stack, "context": context, "seed": seed, "env_id": env_id}
        traced = stack in trace_stacks
        for batch in track(sorted(batches), f"batches of {model.name} on {stack}"):
            place, here, go_on = common | {"batch": batch}, [], True
            try:
                if engine:
                    model.require_batch(batch)
                    ids = model.prompt(context, seed=seed, batch=batch)
                    sampled.append(vllm_logits.sampled(model, ids, GATE_STEPS))
                for row in _place(model, place, traced=traced, **arguments):
                    if row.error:
                        raise vllm.EngineError(row.error.partition(": ")[2])
                    here.append(store.append(path, row))
            except Exception as error:  # the memory refuses, or the stack computes something else
                here.append(store.append(path, _failed(model, place, new_tokens, here, error)))
                go_on = isinstance(error, logits_check.GateError)
            rows += here
            model.device.empty_cache()
            if not go_on:
                break
    for row in _of_engine(model, sampled, trace_stacks, context, seed, env_id) if engine else ():
        rows.append(store.append(path, row))
    return rows


def _of_engine(
    model: Any,
    sampled: Sequence[dict[str, Any]],
    trace_stacks: Sequence[str],
    context: int,
    seed: int,
    env_id: str | None,
) -> Iterator[Record]:
    """How an engine was started, its batches' gates, and the experts of their steps."""
    if model.ended:
        return
    yield model.start_row(env_id)
    yield from vllm_logits.batch_gates(model, sampled, env_id)
    if trace_stacks:
        batches = [len(one["ids"]) for one in sampled]
        yield from vllm.traced(model, context=context, batches=batches, seed=seed, env_id=env_id)


def _place(
    model: Any,
    place: dict[str, Any],
    *,
    traced: bool,
    new_tokens: Sequence[int],
    repeats: int,
    windows: int,
    window_s: float,
    idle: dict[str, Any],
    path: Path,
) -> Iterator[Record]:
    """The rows of one stack at one batch; what the timed calls held is given back after them."""
    engine, tokens = STACKS[place["stack"]].apart, place["context"] + max(new_tokens)
    if not engine:  # it has reserved its memory, and is judged when it has ended
        load.require_fits(model.card, model.device, tokens, place["batch"], loaded=True)
        if place["stack"] != logits_check.REFERENCE:
            yield logits_check.row(model, steps=GATE_STEPS, **place)
    for tokens in dict.fromkeys((1, *new_tokens)):  # a batch's prefill, for itself
        yield latency.arm(model, new_tokens=tokens, repeats=repeats, kind="batch", **place)
    model.device.empty_cache()
    if windows:
        yield from _energy(model, place, new_tokens, windows, window_s, idle, path)
    if traced and not engine:
        yield experts.row(model, model.experts, **place)


def _energy(
    model: Any,
    place: dict[str, Any],
    new_tokens: Sequence[int],
    windows: int,
    window_s: float,
    idle: dict[str, Any],
    path: Path,
) -> list[Record]:
    """Windows of calls of each length in turns, then the same reversed, one after another."""
    stack, context, batch, seed = (place[n] for n in ("stack", "context", "batch", "seed"))
    cells = [energy.blocks.Cell(context, tokens, windows, "batch-energy") for tokens in new_tokens]
    session = energy.sweep.open_session(
        model, stack, path, seed, place["env_id"], [context], max(new_tokens), batch=batch
    )
    session.values |= idle
    order = [cell for cells_in_turn in energy.blocks.plan(cells, seed) for cell in cells_in_turn]
    energy.sweep.measure_together(session, order, f"trace-{stack}-{batch}", window_s)
    return [energy.sweep.row_of(session, cell) for cell in session.blocks]


def _failed(
    model: Any,
    place: dict[str, Any],
    new_tokens: Sequence[int],
    here: Sequence[Record],
    error: Exception,
) -> Record:
    """The error in the place of the first row that is missing, so that it replaces no other."""
    timed = [row.key["new_tokens"] for row in here if row.kind == "batch"]
    untimed = [tokens for tokens in new_tokens if tokens not in timed]
    shape = {name: place[name] for name in ("stack", "context", "batch")}
    key = model.key(
        **shape, new_tokens=(untimed or new_tokens)[0], cache=STACKS[place["stack"]].cache
    )
    return Record(
        "batch" if untimed else "batch-energy",
        key,
        error=record.first_line(error),
        env_id=place["env_id"],
    )
