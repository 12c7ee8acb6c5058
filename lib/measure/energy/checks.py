"""Two checks on joules: do the values of the weights matter, and does another tool agree?

Kind `energy-weights`: the same dense model and cell, its matrices refilled in place with other
values, in turns. The spread over the values bounds what random weights change against real ones: a
systematic term. Kind `energy-real` is a model with its real weights beside random ones.

Kind `energy-peer`: Zeus (PyPI `zeus`, github ml-energy/zeus) on the same windows. ZeusMonitor
subtracts two readings of the board's counter, one at each edge of a window. Here both measure the
same calls at the same time: long windows, and short ones as they were usual. Where Zeus is not
installed, the row holds the reason.
"""

from __future__ import annotations

import importlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib.hardware import validity
from lib.hardware.host import version
from lib.measure.energy import blocks, windows
from lib.measure.energy.sweep import Session, measure_round, open_session, row_of
from lib.models import card, load
from lib.records import record, store
from lib.records.record import Record

SHORT_S = 1.6  # as long as the runs that the paper took readings around
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
    session = open_session(model, stack, Path(records_path), seed, env_id, [context], new_tokens)
    try:
        for number, order in enumerate(blocks.plan(cells, seed), start=1):
            measure_round(
                session,
                order,
                f"trace-weights-{number}",
                window_s,
                lambda cell: refill(model.net, cell.weights, seed),
            )
    finally:
        restore(model, name, seed)
    return [store.append(records_path, row_of(session, cell)) for cell in session.blocks]


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
        open_session(model, stack, Path(records_path), seed, env_id, [context], new_tokens)
        for model in twins
    ]
    for session in sessions:
        session.ids |= sessions[0].ids
    for number in range(repeats):
        for session in sessions if number % 2 else sessions[::-1]:
            name = f"trace-real-{number + 1}-{session.model.weights}"
            measure_round(session, [cell], name, window_s)
    return [store.append(records_path, row_of(session, cell)) for session in sessions]


def load_twins(name: str, dtype: str, device: Any, seed: int) -> tuple[str, list[Any]]:
    """The model with real and with random weights, or the reason why it is not at hand."""
    try:
        return "", [
            load.load(name, weights=weights, dtype=dtype, device=device, seed=seed)
            for weights in ("checkpoint", "random")
        ]
    except (card.ModelError, OSError) as error:
        return f"{name} could not be loaded: {error}", []


def compare(
    model: Any,
    *,
    stack: str,
    context: int,
    new_tokens: int,
    peer_windows: int,
    window_s: float,
    seed: int,
    env_id: str | None,
    records_path: str | Path,
) -> list[Record]:
    """One row: joules of each long and each short window by Zeus and by this workbook.

    samples `zeus_long_j` and `ours_long_j` belong together, as do `long_s` and the short ones. A
    window that this workbook does not believe is left out of both.
    """
    if not peer_windows:
        return []
    key = model.key(stack=stack, context=context, new_tokens=new_tokens)
    reason = model.device.missing.get("energy") or ""
    monitor, why = (None, reason) if reason else open_monitor(model.device)
    if monitor is None:
        row = Record(
            "energy-peer",
            key,
            values=dict(model.source),
            missing={"zeus_long_j": why},
            env_id=env_id,
        )
        return [store.append(records_path, row)]
    session = open_session(model, stack, Path(records_path), seed, env_id, [context], new_tokens)
    lead = session.lead(context, new_tokens)
    lengths = {
        "long": (session.call(context, new_tokens), window_s),
        "short": (lead, min(SHORT_S, window_s)),
    }
    samples: dict[str, list[float]] = {}
    for name, (call, seconds) in lengths.items():
        for joules, zeus_j, long_s in both(session, monitor, lead, call, seconds, peer_windows):
            for sample, value in (("ours", joules), ("zeus", zeus_j)):
                samples.setdefault(f"{sample}_{name}_j", []).append(value)
            samples.setdefault(f"{name}_s", []).append(long_s)
    row = Record(
        "energy-peer", key, samples, {**model.source, "zeus": version("zeus")}, env_id=env_id
    )
    return [store.append(records_path, row)]


def open_monitor(device: Any) -> tuple[Any, str]:
    """A ZeusMonitor of this GPU, or None and why there is none.

    Zeus reads GPU numbers, and numbers only, from CUDA_VISIBLE_DEVICES, when it is first used; for
    that moment the variable is this board's number. CUDA has long read its own.
    """
    try:
        make = importlib.import_module("zeus.monitor").ZeusMonitor  # an extra of pyproject.toml
    except ImportError as error:
        return None, f"zeus is not installed: {error}"
    index = device.board_state().get("nvml_index")
    if index is None:
        return None, "zeus cannot measure here: the number of the GPU is not known"
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index)
    try:
        return make(gpu_indices=[0], cpu_indices=[]), ""
    except Exception as error:
        return None, f"zeus cannot measure here: {error}"
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def both(
    session: Session,
    monitor: Any,
    lead: windows.Call,
    call: windows.Call,
    seconds: float,
    count: int,
) -> list[tuple[float, float, float]]:
    """(ours, Zeus's, seconds) of windows one after another with the board kept busy between."""
    device, spans, theirs = session.model.device, [], []
    with device.power_trace(uuids=session.gpus) as trace:
        for number in range(count):
            windows.keep_busy(lead, windows.LEAD_S, device)
            monitor.begin_window(f"{number}", sync_execution=False)  # `keep_busy` has waited
            spans.append(windows.fill(call, device, seconds))
            theirs.append(monitor.end_window(f"{number}", sync_execution=False).total_energy)
        windows.keep_busy(lead, windows.LEAD_S, device)
    ours = [
        validity.judge(trace, span.start_s, span.stop_s, calls_s=span.calls_s).energy_j
        for span in spans
    ]
    return [
        (joules, zeus_j, span.seconds)
        for joules, zeus_j, span in zip(ours, theirs, spans, strict=True)
        if joules is not None
    ]
