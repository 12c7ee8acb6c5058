"""Does the energy of decoding depend on the values of the weights? Kind `energy-weights`.

The same dense model and cell, its matrices refilled in place with other values, in turns. The
spread over the values bounds what random weights change against real ones: a systematic term.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib import blocks, energy
from lib.models import card, load
from lib.records import record, store
from lib.records.record import Record

# What each parameter of two or more dimensions is filled with, drawn from a seeded generator.
FILLS: dict[str, Callable[[Any, Any], Any]] = {
    "normal": lambda tensor, generator: tensor.normal_(std=0.02, generator=generator),
    "tiny": lambda tensor, generator: tensor.uniform_(-1e-3, 1e-3, generator=generator),
    "constant": lambda tensor, generator: tensor.fill_(0.01),
    "zero": lambda tensor, generator: tensor.zero_(),
}


def sweep(
    model: Any,
    *,
    name: str,
    stack: str,
    context: int,
    new_tokens: int,
    weight_values: Sequence[str],
    repeats: int,
    window_s: float,
    seed: int,
    env_id: str | None,
    records_path: str | Path,
) -> list[Record]:
    """A row for each of `weight_values`, in `repeats` blocks in balanced order; none for none.

    The model has its own random weights again afterwards. `name` is what it was loaded by.
    """
    if unknown := [value for value in weight_values if value not in FILLS]:
        raise ValueError(f"unknown weight values {unknown}; known: {list(FILLS)}")
    cells = [
        blocks.Cell(context, new_tokens, repeats, "energy-weights", value)
        for value in weight_values
    ]
    if not cells:
        return []
    if reason := refusal(model):
        key = model.key(stack=stack, context=context, new_tokens=new_tokens)
        row = Record(
            "energy-weights",
            key,
            values=dict(model.source),
            missing={"energy_j": reason},
            env_id=env_id,
        )
        return [store.append(records_path, row)]
    session = energy.open_session(
        model, stack, Path(records_path), seed, env_id, [context], new_tokens
    )
    try:
        for number, order in enumerate(blocks.plan(cells, seed), start=1):
            energy.measure_round(
                session,
                order,
                f"trace-weights-{number}",
                window_s,
                lambda cell: refill(model.net, cell.weights, seed),
            )
    finally:
        restore(model, name, seed)
    return [
        store.append(records_path, energy.row_of(session, cell, found))
        for cell, found in session.blocks.items()
    ]


def against_real(
    real_model: str,
    *,
    dtype: str,
    device: Any,
    stack: str,
    context: int,
    new_tokens: int,
    repeats: int,
    window_s: float,
    seed: int,
    env_id: str | None,
    records_path: str | Path,
) -> list[Record]:
    """A small dense model with its real weights and with random ones, in turns: kind `energy-real`.

    Both are loaded, and both are given the same prompt. None for "".
    """
    if not real_model:
        return []
    reason, twins = device.missing.get("energy") or "", []
    if not reason:
        reason, twins = load_twins(real_model, dtype, device, seed)
    if reason:
        row = Record(
            "energy-real",
            dict.fromkeys(record.KEY_FIELDS) | {"model": real_model},
            missing={"energy_j": reason},
            env_id=env_id,
        )
        return [store.append(records_path, row)]
    cell = blocks.Cell(context, new_tokens, repeats, "energy-real")
    sessions = [
        energy.open_session(model, stack, Path(records_path), seed, env_id, [context], new_tokens)
        for model in twins
    ]
    for session in sessions:
        session.ids |= sessions[0].ids
    for number in range(repeats):
        for session in sessions if number % 2 else sessions[::-1]:
            name = f"trace-real-{number + 1}-{session.model.weights}"
            energy.measure_round(session, [cell], name, window_s)
    return [store.append(records_path, energy.row_of(s, cell, s.blocks[cell])) for s in sessions]


def load_twins(name: str, dtype: str, device: Any, seed: int) -> tuple[str, list[Any]]:
    """The model with real and with random weights, or the reason why it is not at hand."""
    try:
        return "", [
            load.load(name, weights=weights, dtype=dtype, device=device, seed=seed)
            for weights in ("checkpoint", "random")
        ]
    except (card.ModelError, OSError) as error:
        return f"{name} could not be loaded: {error}", []


def refusal(model: Any) -> str:
    """Why this model's weights are left alone; empty if they may be refilled."""
    if reason := model.device.missing.get("energy"):
        return reason
    if model.card.experts:
        return "a mixture of experts routes by its values: other values are another workload"
    if model.weights != "random":
        return f"{model.weights} weights cannot be drawn again from a seed"
    return ""


def refill(net: Any, value: str, seed: int) -> None:
    """Fill every matrix of a network in place; scales and biases stay, so that signals do not die
    for another reason than the matrices."""
    import torch

    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() >= 2:
                generator = torch.Generator(device=parameter.device)
                FILLS[value](parameter, generator.manual_seed(seed + zlib.crc32(name.encode())))


def restore(model: Any, name: str, seed: int) -> None:
    """The model's own random weights again, drawn from the seed; two copies would not fit."""
    import torch

    for parameter in model.net.parameters():
        parameter.data = torch.empty(0, device=parameter.device, dtype=parameter.dtype)
    model.device.empty_cache()
    fresh = load.load(
        name, weights="random", dtype=model.dtype, device=model.device, seed=seed, experts=None
    )
    model.net = fresh.net
