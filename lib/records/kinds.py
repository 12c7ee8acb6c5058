"""The values that the key of a row can take, in the order in which they are shown."""

from __future__ import annotations

import functools
from pathlib import Path

from lib import files
from lib.files import read_yaml

WEIGHTS = ("random", "checkpoint", "gguf")
DTYPES = ("bfloat16", "float16", "float32")
STUDY_STACK = "hf-eager"  # statements are about this stack first, then what others change
PROTOCOLS = {"memory-paper": "paper", "memory": "generate()"}


def listed_models() -> tuple[str, ...]:
    """Names in params/models.yaml, in its order; the file is read again only when it changed."""
    file = files.resolve("params/models.yaml")
    return _names(file, file.stat().st_mtime_ns) if file.exists() else ()


@functools.lru_cache(maxsize=4)
def _names(file: Path, changed_ns: int) -> tuple[str, ...]:
    return tuple(read_yaml(file))


def model_order(name: str) -> tuple[int, str]:
    """Sorts models as params/models.yaml lists them, unlisted ones after them by name."""
    names = listed_models()
    return (names.index(name) if name in names else len(names), name)
