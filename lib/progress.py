"""A progress bar for people; silent in batch, where the runner shows progress itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from tqdm import tqdm

BATCH_VARIABLE = "WORKBOOK_BATCH"  # set by the runner for the kernels that it starts


def track(items: Sequence, description: str) -> Iterable:
    """Iterate with a bar and the time left, unless a runner executes the notebook."""
    return tqdm(items, desc=description, leave=False, disable=BATCH_VARIABLE in os.environ)
