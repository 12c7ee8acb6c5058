"""Datasheet values of a card by the name that NVML and torch print, from params/gpus.yaml.

Nothing is guessed: an unknown card has no values, and says so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from typing_extensions import TypedDict

from lib.files import ParamsError, check, read_yaml, resolve

FILE = "params/gpus.yaml"
VALUES = ("memory_bytes_per_s", "bf16_flop_per_s", "memory_bytes", "cache_bytes", "tdp_w")


@dataclass(frozen=True)
class Datasheet:
    """What the maker states (SI units, unit in the name); `missing` says why a value is None."""

    gpu: str
    memory_bytes_per_s: float | None = None
    bf16_flop_per_s: float | None = None
    memory_bytes: int | None = None
    cache_bytes: int | None = None
    tdp_w: float | None = None
    source: list[str] = field(default_factory=list)
    date: str = ""
    missing: dict[str, str] = field(default_factory=dict)

    def times(self, count: int) -> Datasheet:
        """What so many of these cards have together."""
        values = {name: getattr(self, name) for name in VALUES}
        return replace(self, **{n: None if v is None else v * count for n, v in values.items()})


ENTRY = TypedDict("ENTRY", {k: v for k, v in get_type_hints(Datasheet).items() if k != "gpu"})


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
    where = f"card {gpu!r} in {FILE}"
    check(entry, ENTRY, where)
    if not entry["source"]:
        raise ParamsError(f"{where}: name a source")
    for name in VALUES:
        if ((entry[name] or 0) > 0) == (name in entry["missing"]):
            raise ParamsError(
                f"{where}: {name} is {entry[name]!r}; a null needs its reason in 'missing', and "
                "a number must have none and be above 0"
            )
    return Datasheet(gpu, **entry)
