"""What every measurement starts with: what it measures, and the first rows of its file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib.files import BATCH_VARIABLE, NEIGHBOURS_VARIABLE, SHARED_VARIABLE, START_VARIABLE
from lib.hardware.device import open_device
from lib.models import load
from lib.records import record, store
from lib.records.kinds import STUDY_STACK
from lib.records.record import Record
from lib.stacks.registry import STACKS, require_devices


def opened(
    name: str,
    *,
    stack: str = STUDY_STACK,
    weights: str,
    dtype: str,
    device: str,
    seed: int,
    contexts: Sequence[int] = (),
    tokens: int,
    batch: int = 1,
    devices: int = 1,
    records_path: str | Path,
) -> Any:
    """What a notebook measures: a model loaded on a device, or, for a stack that is an engine, the
    engine with the model in it.

    `tokens` is the longest sequence of the calls to come and `batch` the most of them at once; an
    engine reserves for both. At each of `contexts` its logits are to be compared with our net's.
    `devices` are the GPUs that an engine shards the model over.
    """
    require_devices(stack, devices)
    if not STACKS[stack].apart:
        return load.load(name, weights=weights, dtype=dtype, device=open_device(device), seed=seed)
    from lib.measure import vllm

    return vllm.opened(
        name,
        weights=weights,
        dtype=dtype,
        device=device,
        seed=seed,
        contexts=contexts,
        tokens=tokens,
        batch=batch,
        devices=devices,
        folder=Path(records_path).parent,
    )


def begin_records(model: Any, records_path: str | Path) -> list[Record]:
    """Write the environment and the model card as the first rows, so that reading needs neither.

    Returns both; the rows that follow carry the environment's id.
    """
    env = environment(model.device)
    values = {**model.source, **model.card.as_dict(), "load_s": model.load_s}
    doubts = getattr(model, "warnings", ())
    card = Record("card", model.key(), values=values, warnings=doubts, env_id=env.env_id)
    return [store.append(records_path, row) for row in (env, card)]


def environment(device: Any) -> Record:
    """The machine of now as a record, with the visit; the jobs of one run share its start."""
    values = device.environment()
    start = os.environ.get(START_VARIABLE) or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    visit = record.visit_of({**values, "date": start})
    if reason := os.environ.get(SHARED_VARIABLE):
        values["gpu_shared"] = reason
    if neighbours := os.environ.get(NEIGHBOURS_VARIABLE):
        values["neighbours"] = int(neighbours)
    return record.environment_record({**values, "visit": visit})


def track(items: Sequence, description: str) -> Iterable:
    """Iterate with a bar and the time left, unless a runner executes the notebook."""
    batch = BATCH_VARIABLE in os.environ
    # JupyterLab shows the standard error stream on red.
    return tqdm(items, desc=description, leave=False, disable=batch, file=sys.stdout)
