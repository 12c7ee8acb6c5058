"""What the files of a checkpoint hold, from their headers; no weight is read.

A file that is cut off, a shard that is missing, and numbers that need a scale which no method
applies are found here, before anything is loaded.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib.models.card import ModelError

INDEX = "model.safetensors.index.json"
# Numbers that mean something only with scales beside them, by the names of the file format.
SCALED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I32", "U32", "I16", "U16", "I64")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header: name, the format's name of its dtype, shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def tensors(folder: Path) -> list[Tensor]:
    """Every tensor of the safetensors files in a folder; raises ModelError for broken files."""
    return [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in _header(path)]


def _header(path: Path) -> list[Tensor]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            entries = json.loads(file.read(length)) if length < size else None
    except (struct.error, ValueError):
        entries = None
    if not isinstance(entries, dict):
        raise ModelError(f"{path.name} is no safetensors file, or is cut off; fetch it again")
    entries.pop("__metadata__", None)
    found = [
        Tensor(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    ]
    end = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
    if size < end:
        raise ModelError(
            f"{path.name} is cut off: it has {size} of the {end} bytes that its header names; "
            "fetch it again"
        )
    return found


def require_whole(folder: Path) -> None:
    """Raise unless every shard that the index names is there, and no file is cut off."""
    index = folder / INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read as an index of shards ({error})") from error
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            raise ModelError(
                f"{folder.name} lacks {named(missing)} of {len(shards)} shards; fetch the whole "
                "checkpoint"
            )
    elif not (folder / "model.safetensors").is_file():
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ModelError(
            f"{folder.name} holds {named(names)} and no {INDEX} that tells which belong together; "
            "fetch the whole checkpoint, or rename a single file to model.safetensors"
        )
    tensors(folder)


def require_scales(folder: Path, method: str | None) -> None:
    """Raise where weights are numbers that need a scale, and none would be applied.

    Either no method is named that applies it, or, in eight bits of floating point, no scale lies
    beside the matrix.
    """
    held = tensors(folder)
    scaled = [t for t in held if t.dtype in SCALED and len(t.shape) > 1]
    if method is None and scaled:
        raise ModelError(
            f"{folder.name} holds {named([t.name for t in scaled])} in "
            f"{', '.join(sorted({t.dtype for t in scaled}))}, and its config.json names no "
            "quantization_config that says how they are scaled: read as they are they would be "
            "other weights. Give a checkpoint with its quantisation, or one that is not quantised"
        )
    beside = {_module(t.name) for t in held if "scale" in t.name.rpartition(".")[2]}
    bare = [t.name for t in scaled if t.dtype in EIGHT_BITS and _module(t.name) not in beside]
    if bare:
        raise ModelError(
            f"{folder.name} holds {named(bare)} in eight bits of floating point, and no scale "
            "beside them: read as they are they would be other weights; fetch the whole checkpoint"
        )


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def dtypes(folder: Path) -> dict[str, int]:
    """Bytes by dtype, by the format's names."""
    counted: Counter[str] = Counter()
    for tensor in tensors(folder):
        counted[tensor.dtype] += tensor.size_bytes
    return dict(counted)


def named(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
