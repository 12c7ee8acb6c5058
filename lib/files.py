"""Paths from the repository's root, strict YAML, atomic writes, hashes. Imports nothing of lib."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
BATCH_VARIABLE = "WORKBOOK_BATCH"  # set by the runner for the kernels that it starts
_TRAPS = {
    r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?[0-9]+\.[0-9]*[eE][0-9]+": (
        "YAML 1.1 reads it as text; for a number write a point and a sign, as in 1.0e-3 or "
        "1.0e+3, for text quotes"
    ),
    r"(?i)yes|no|on|off": "YAML 1.1 reads it as true or false; write true, false, or quotes",
    r"[-+]?0[0-9_]+": "YAML 1.1 reads it as an octal number; for text write quotes",
    r"[-+]?[0-9]+(_[0-9]+)+": "write the number without underscores, or text in quotes",
    r"[-+]?[0-9]+(:[0-9]{1,2})+(\.[0-9]*)?": "YAML 1.1 reads it in base 60; write quotes",
    r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*": "YAML 1.1 reads it as a date; write quotes",
    r"(?i)[-+]?\.(inf|nan)": "infinity and NaN are no parameters; use null with a reason",
}


class ParamsError(ValueError):
    """Something in a profile, a slice or a parameter is wrong; the message says how to fix it."""


def resolve(path: str | Path) -> Path:
    """An absolute path; a relative one counts from the repository's root, whatever the cwd."""
    return (ROOT / Path(path).expanduser()).resolve()


def split(text: str | Iterable[str] | None) -> tuple[str, ...]:
    """The items of a slice such as MODELS="a,b c", in order, without repeats."""
    if text is None:
        return ()
    joined = text if isinstance(text, str) else " ".join(text)
    return tuple(dict.fromkeys(item for item in re.split(r"[,\s]+", joined) if item))


def short(path: Path) -> str:
    """The path from the repository's root where it lies below it."""
    path = resolve(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def file_sha(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """`data` as a JSON file, never half of one."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def unknown(kind: str, value: str, choices: Iterable[str], *, hint: str = "") -> ParamsError:
    """An error that names the value, near matches, what there is to choose from, and a hint."""
    names = [str(name) for name in choices]
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(value.casefold(), folded, n=2, cutoff=0.5)
    meant = f"; did you mean {' or '.join(repr(folded[name]) for name in near)}?" if near else "."
    every = ", ".join(names) or "none"
    return ParamsError(f"unknown {kind} {value!r}{meant} Known: {every}.{hint and ' ' + hint}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a dict; repeated keys and values that YAML 1.1 misreads are errors."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _refuse_traps(node, path.name)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ParamsError(f"{path.name} is no valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ParamsError(f"{path.name} holds {type(data).__name__}, needs a mapping")
    return data


def _refuse_traps(node: yaml.Node, name: str) -> None:
    line = f"{name}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        for pattern, advice in _TRAPS.items():
            if re.fullmatch(pattern, node.value):
                raise ParamsError(f"{line}: {node.value} is ambiguous: {advice}")
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if key.value in keys:
                raise ParamsError(f"{line}: the key {key.value} appears twice")
            keys.add(key.value)
            _refuse_traps(key, name)
            _refuse_traps(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_traps(item, name)
