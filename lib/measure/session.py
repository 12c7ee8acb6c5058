"""What every measurement starts with: the first rows of its file, and a prompt on the device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib.files import BATCH_VARIABLE, START_VARIABLE
from lib.records import record, store
from lib.records.record import Record


def begin_records(model: Any, records_path: str | Path) -> list[Record]:
    """Write the environment and the model card as the first rows, so that reading needs neither.

    Returns both; the rows that follow carry the environment's id.
    """
    env = environment(model.device)
    values = {**model.source, **model.card.as_dict(), "load_s": model.load_s}
    card = Record("card", model.key(), values=values, env_id=env.env_id)
    return [store.append(records_path, row) for row in (env, card)]


def environment(device: Any) -> Record:
    """The machine of now as a record, with the visit; the jobs of one run share its start."""
    values = device.environment()
    start = os.environ.get(START_VARIABLE) or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    visit = record.visit_of({**values, "date": start})
    return record.environment_record({**values, "visit": visit})


def track(items: Sequence, description: str) -> Iterable:
    """Iterate with a bar and the time left, unless a runner executes the notebook."""
    batch = BATCH_VARIABLE in os.environ
    # JupyterLab shows the standard error stream on red.
    return tqdm(items, desc=description, leave=False, disable=batch, file=sys.stdout)
