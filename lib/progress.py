"""A progress bar for people; silent in batch, where the runner shows progress itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from lib.files import BATCH_VARIABLE


def track(items: Sequence, description: str) -> Iterable:
    """Iterate with a bar and the time left, unless a runner executes the notebook."""
    batch = BATCH_VARIABLE in os.environ
    # JupyterLab shows the standard error stream on red.
    return tqdm(items, desc=description, leave=False, disable=batch, file=sys.stdout)
