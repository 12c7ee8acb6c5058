"""What the files of a checkpoint hold, from their headers; no weight is read.

A file that is cut off, a shard that is missing, and numbers that need a scale which no method
applies are found here, before anything is loaded.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib.models.card import ModelError

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
# Numbers that mean something only with scales beside them, by the names of the file format.
SCALED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I32", "U32", "I16", "U16")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
# What older code saved beside weights, and today's makes by itself: causal masks and the number in
# their place, the numbers of positions, the frequencies of rotations.
_MADE_ANEW = re.compile(r"(attn|attention)\.bias|masked_bias|position_ids|rotary_emb\.inv_freq")
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header: name, the format's name of its dtype, shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def tensors(folder: Path) -> list[Tensor]:
    """Every tensor of the files that are loaded; raises ModelError for missing or broken ones.

    These are the single file, or the shards that the index names: others may lie beside them.
    """
    return [tensor for name in _file_names(folder) for tensor in _header(folder / name)]


def is_made_anew(tensor: Tensor) -> bool:
    """Whether a tensor is no weight but a constant, which older code saved as well."""
    named_so = _MADE_ANEW.search(tensor.name)
    return bool(named_so) and (not tensor.name.endswith(".bias") or len(tensor.shape) == 4)


def _file_names(folder: Path) -> list[str]:
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if gone := [path.name for path in files if not path.is_file()]:
            raise ModelError(
                f"{title(folder)}: {named(gone)} is a folder, or a link that leads nowhere; fetch "
                "the checkpoint again"
            )
        names = [path.name for path in files]
        raise ModelError(
            f"{title(folder)} holds {named(names)} and no {INDEX} that tells which belong "
            f"together; fetch the whole checkpoint, or rename a single file to {SINGLE}"
        )
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in shards if not (folder / name).is_file()]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{index} cannot be read as an index of shards ({error}); fetch it again"
        ) from error
    if not shards:
        raise ModelError(f"{index} names no shard; fetch it again")
    if missing:
        raise ModelError(
            f"{title(folder)} lacks {named(missing)} of {len(shards)} shards; fetch the whole "
            "checkpoint"
        )
    return shards


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
    listed = [
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
    return listed


def require_scales(folder: Path, method: str | None) -> None:
    """Raise where weights are numbers that need a scale, and none would be applied.

    Either no method is named that applies it, or, in eight bits of floating point, no scale of its
    own lies beside the matrix.
    """
    numbers, names = scaled(folder), {t.name for t in tensors(folder)}
    if method is None and numbers:
        raise ModelError(
            f"{title(folder)} holds {named([t.name for t in numbers])} in "
            f"{', '.join(sorted({t.dtype for t in numbers}))}, and its config.json names no "
            "quantization_config that says how they are scaled: read as they are they would be "
            "other weights. Give a checkpoint with its quantisation, or one that is not quantised"
        )
    if bare := [t.name for t in numbers if t.dtype in EIGHT_BITS and not _scales(t.name, names)]:
        raise ModelError(
            f"{title(folder)} holds {named(bare)} in eight bits of floating point, and no scale "
            "beside them: read as they are they would be other weights; fetch the whole checkpoint"
        )


def scaled(folder: Path) -> list[Tensor]:
    """The tensors whose numbers are not yet those of weights."""
    return [t for t in tensors(folder) if _means_more(t) and not is_made_anew(t)]


def _means_more(tensor: Tensor) -> bool:
    """Whether its numbers are not yet those of a weight."""
    if tensor.dtype.startswith("F8_"):
        return bool(tensor.shape)
    # Tables and masks may be whole numbers.
    other = tensor.dtype[0] in "IUBC" and tensor.dtype != "BF16"
    if other and tensor.name.endswith("weight"):
        return True
    return tensor.dtype in SCALED and len(tensor.shape) > 1


def _scales(name: str, names: set[str]) -> list[str]:
    """What scales a matrix, beside it; scales of activations do not."""
    owner, _, own = name.rpartition(".")
    like = re.compile(rf"{re.escape(owner)}\.({re.escape(own)}\W?_?)?scale(_inv)?(\W.*)?")
    return [other for other in names if like.fullmatch(other)]


def dtypes(folder: Path) -> dict[str, int]:
    """Bytes by dtype, by the format's names."""
    counted: Counter[str] = Counter()
    for tensor in tensors(folder):
        counted[tensor.dtype] += tensor.size_bytes
    return dict(counted)


def title(folder: Path) -> str:
    """What a folder of a checkpoint is called: the repository where the hub's client made it."""
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.name


def named(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
