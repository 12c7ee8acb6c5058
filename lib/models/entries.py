"""The entries of params/models.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib import files
from lib.files import read_yaml


def models(path: str | Path = "params/models.yaml") -> dict[str, dict[str, Any]]:
    """Entries of params/models.yaml by name."""
    return read_yaml(file) if (file := files.resolve(path)).exists() else {}
