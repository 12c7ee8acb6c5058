"""Datasheet values of a card by the name that NVML and torch print, from params/gpus.yaml.

Nothing is guessed: an unknown card has no values, and says so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.files import ParamsError, read_yaml, resolve, unknown

FILE = "params/gpus.yaml"
VALUES = ("memory_bytes_per_s", "bf16_flop_per_s", "memory_bytes", "cache_bytes", "tdp_w")
KEYS = (*VALUES, "source", "date", "missing")


@dataclass(frozen=True)
class Datasheet:
    """What the maker states (SI units, unit in the name); `missing` says why a value is None."""

    gpu: str
    memory_bytes_per_s: float | None = None
    bf16_flop_per_s: float | None = None
    memory_bytes: int | None = None
    cache_bytes: int | None = None
    tdp_w: float | None = None
    source: tuple[str, ...] = ()
    date: str = ""
    missing: dict[str, str] = field(default_factory=dict)


def datasheet(gpu: str | None, path: str | Path = FILE) -> Datasheet:
    """The card's values; all None with the reason for a card that is not listed, or a CPU."""
    entry = datasheets(path).get(gpu or "")
    if entry is not None:
        return entry
    why = f"{gpu!r} is not in {FILE}" if gpu else "no datasheet is kept for processors"
    return Datasheet(gpu or "CPU", missing=dict.fromkeys(VALUES, why))


def datasheets(path: str | Path = FILE) -> dict[str, Datasheet]:
    """Every card of the file by name; the file is read again only when it changed."""
    file = resolve(path)
    return _read(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(file: Path, changed_ns: int) -> dict[str, Datasheet]:
    return {gpu: _checked(gpu, entry or {}) for gpu, entry in read_yaml(file).items()}


def _checked(gpu: str, entry: dict[str, Any]) -> Datasheet:
    """The entry as a datasheet; a value without a number needs a reason, and only such a one."""
    for key in entry:
        if key not in KEYS:
            raise unknown(f"key of card {gpu!r} in {FILE}:", key, KEYS)
    if absent := [key for key in KEYS if key not in entry]:
        raise ParamsError(f"card {gpu!r} in {FILE} lacks {', '.join(absent)}")
    if not entry["source"] or not isinstance(entry["date"], str):
        raise ParamsError(f"card {gpu!r} in {FILE}: name a source, and the date in quotes")
    for name in VALUES:
        value = entry[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if not number and value is not None:
            raise ParamsError(
                f"card {gpu!r} in {FILE}: {name} is {value!r}, needs a number or null"
            )
        if (value is None) != (name in entry["missing"]):
            raise ParamsError(
                f"card {gpu!r} in {FILE}: {name} is {value!r}; a null needs its reason in "
                "'missing', and a number must have none"
            )
    return Datasheet(gpu, **{**entry, "source": tuple(entry["source"])})
