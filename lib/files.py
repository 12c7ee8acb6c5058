"""Paths from the root, YAML and its schemas, atomic writes, hashes. Imports nothing of lib."""

from __future__ import annotations

import ctypes
import difflib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

ROOT = Path(__file__).resolve().parents[1]
CACHE_VARIABLE = "WORKBOOK_CACHE"
BATCH_VARIABLE = "WORKBOOK_BATCH"  # set by the runner for the kernels that it starts
START_VARIABLE = "WORKBOOK_START"  # when the run began, which is when its visit did
SHARED_VARIABLE = "WORKBOOK_GPU_SHARED"  # why others may use the GPU at the same time
NEIGHBOURS_VARIABLE = "WORKBOOK_NEIGHBOURS"  # how many jobs run on other GPUs of the host
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

_NEEDS = {  # what a value must be, by pydantic's name of the fault
    "string_type": "text (in quotes)",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
}


class ParamsError(ValueError):
    """Something in a profile, a slice or a parameter is wrong; the message says how to fix it."""


def expanded(path: str | Path) -> Path:
    """A path whose ~ or ~user is that home folder; raises ParamsError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ParamsError(
            f"{str(path)!r:.200} is no path: there is no such home folder; set HOME, or "
            "write the path out"
        ) from None


def resolve(path: str | Path) -> Path:
    """An absolute path; a relative one counts from the repository's root, whatever the cwd.

    Raises ParamsError where links lead in a circle, and for a home folder that is not there.
    """
    try:
        return (ROOT / expanded(path)).resolve()
    except RuntimeError as error:  # links lead in a circle
        raise ParamsError(f"{str(path)!r:.200} is no path: {error}; choose another") from None


def cache_dir() -> Path:
    """Where converted checkpoints are kept, and which pages were written; the variable
    WORKBOOK_CACHE moves it."""
    return expanded(os.environ.get(CACHE_VARIABLE) or "~/.cache/llm-deployment-workbook")


def split(text: str | Iterable[str] | None) -> tuple[str, ...]:
    """The items of a slice such as MODELS="a,b c", in order, without repeats.

    Existing files and folders stay whole, whatever their names hold.
    """
    if text is None:
        return ()
    parts = [text] if isinstance(text, str) else list(text)
    parts = [p for part in parts for p in ([part] if _is_path(part) else part.split(","))]
    return tuple(dict.fromkeys(item for part in parts for item in _words(part)))


def _words(part: str) -> Iterator[str]:
    """What white space separates, but no path that exists."""
    words = part.split()
    while words:
        count = next((n for n in range(len(words), 1, -1) if _is_path(" ".join(words[:n]))), 1)
        yield " ".join(words[:count])
        words = words[count:]


def _is_path(text: str) -> bool:
    try:
        return bool(text.strip()) and Path(text.strip()).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long for a name, or of no known user
        return False


def jupyter_path(folders: Iterable[str], before: str) -> str:
    """JUPYTER_PATH with the data of packages that PYTHONPATH brings (nbconvert's templates)."""
    shared = [Path(folder) / "share" / "jupyter" for folder in folders if folder]
    paths = [before, *(str(path) for path in shared if path.is_dir())]
    return os.pathsep.join(dict.fromkeys(filter(None, paths)))


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
        temporary.unlink(missing_ok=True)  # a link there would lead the text elsewhere
        # Half a pair of letters, as of a file's odd name, is none in UTF-8: it becomes a "?".
        with temporary.open("x", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """`data` as a JSON file, never half of one."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(text: str) -> Any:
    """What a text in JSON says; raises ValueError for what no file here holds: NaN, infinity, a
    number beyond 64 bits, half a pair of letters, or nesting without end."""

    def refuse(word: str) -> Any:
        raise ValueError(f"{word:.20} is no number")

    def whole(word: str) -> int:
        return int(word) if len(word) < 20 and -(2**63) <= int(word) < 2**63 else refuse(word)

    def real(word: str) -> float:
        return value if math.isfinite(value := float(word)) else refuse(word)

    try:
        data = json.loads(text, parse_constant=refuse, parse_int=whole, parse_float=real)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text.lower():
        json.dumps(data, ensure_ascii=False).encode()  # raises UnicodeEncodeError, a ValueError
    return data


ROOM_BYTES = 50_000_000  # what a run needs at least: notebooks, rows, pages


def require_room(folder: Path) -> None:
    """Make a folder, and raise where nothing can be written there: better before work than after.

    Raises ParamsError, which names the folder and what is in the way.
    """
    for path in (folder, *folder.parents):
        if path.exists() or path.is_symlink():
            if not path.is_dir():
                raise ParamsError(
                    f"OUT={short(folder)}: {short(path)} is no folder; choose another"
                )
            break
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        why = error.strerror or error
        raise ParamsError(
            f"OUT={short(folder):.200} cannot be written: {why}; choose another"
        ) from None
    if free < ROOM_BYTES:
        raise ParamsError(
            f"OUT={short(folder)}: {free / 1e6:.0f} MB are free there and {ROOM_BYTES / 1e6:.0f} "
            "are needed; make room, or choose another"
        )


def disk_fault(error: OSError) -> str:
    """A fault of a disk or a path in one line, with what to do; empty for any other error."""
    name = f"{str(error.filename)!r:.200}" if error.filename else "what is being written"
    advice = {
        errno.ENOSPC: "make room; what is finished is kept, the same command goes on from here",
        errno.EDQUOT: "make room; what is finished is kept, the same command goes on from here",
        errno.EROFS: "choose another OUT",
        errno.EACCES: "change who may read and write there, or choose another",
        errno.EPERM: "change who may read and write there, or choose another",
        errno.ENOTDIR: "a file is where a folder should be; choose another",
        errno.EISDIR: "a folder is where a file should be; choose another",
        errno.ENAMETOOLONG: "give a shorter name",
        errno.ELOOP: "links lead in a circle; remove them",
        errno.EIO: "the disk fails; what is finished is kept",
        errno.EXDEV: "results lie on one disk; unmount what is mounted inside them",
        errno.EBUSY: "a disk is mounted there, or another program holds it; unmount it",
        errno.ENOENT: "it has vanished; give the same command again",
    }
    return f"{name}: {error.strerror}; {advice[error.errno]}" if error.errno in advice else ""


def exchange(new: Path, old: Path) -> None:
    """Let two folders of one parent change places in one step that no crash can divide.

    Where the system cannot do that `old` is deleted first, its run.json before all, so that only
    `new` is whole until it stands in its place.
    """
    sys.audit("os.rename", str(new), str(old), -1, -1)
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(new), os.fsencode(old)
    if hasattr(libc, "renameat2"):  # Linux; -100: paths are not below a descriptor
        failed = libc.renameat2(-100, names[0], -100, names[1], 2)
    elif hasattr(libc, "renamex_np"):  # macOS
        failed = libc.renamex_np(*names, 2)
    else:
        failed = True
    if failed:
        (old / "run.json").unlink(missing_ok=True)
        shutil.rmtree(old)
        new.rename(old)


def alike(one: str, other: str) -> bool:
    """Whether a name is probably a misspelling of another."""
    return difflib.SequenceMatcher(None, one.casefold(), other.casefold()).ratio() > 0.8


def unknown(kind: str, value: str, choices: Iterable[str], *, hint: str = "") -> ParamsError:
    """An error that names the value, near matches, what there is to choose from, and a hint."""
    names = [str(name) for name in choices]
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(value[:100].casefold(), folded, n=2, cutoff=0.5)
    meant = f"; did you mean {' or '.join(repr(folded[name]) for name in near)}?" if near else "."
    every = ", ".join(names) or "none"
    value = f"{value!r:.100}"
    return ParamsError(f"unknown {kind} {value}{meant} Known: {every}.{hint and ' ' + hint}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a dict; repeated keys and values that YAML 1.1 misreads are errors."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _refuse_traps(node, path.name, set())
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise ParamsError(f"{path.name} is no valid YAML: {text}") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, ParamsError):
            raise
        text = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ParamsError(f"{path.name} cannot be read: {text}") from None
    if not isinstance(data, dict):
        raise ParamsError(f"{path.name} holds {type(data).__name__}, needs a mapping")
    return data


def _refuse_traps(node: yaml.Node, name: str, seen: set[int]) -> None:
    line = f"{name}, line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.ScalarNode):
        if id(node) in seen:  # a few nested ones stand for a thousand million values
            raise ParamsError(f"{line}: an alias (*) names a list or mapping; write it out again")
        seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        for pattern, advice in _TRAPS.items():
            if re.fullmatch(pattern, node.value):
                raise ParamsError(f"{line}: {node.value} is ambiguous: {advice}")
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ParamsError(f"{line}: a key is a word, no list or mapping")
            if key.value in keys:
                raise ParamsError(f"{line}: the key {key.value} appears twice")
            keys.add(key.value)
            _refuse_traps(key, name, seen)
            _refuse_traps(value, name, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_traps(item, name, seen)


def check(data: Any, schema: Any, where: str) -> None:
    """Raise unless the data, which are those of `where`, are what a schema says.

    A schema is a TypedDict, or a generic type of such. Nothing is converted, and no key is allowed
    that it does not name. Only this uses pydantic, and imports it when it is called: records are
    read and written without it.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(schema).validate_python(data, strict=True, extra="forbid")
    except ValidationError as error:
        faults = error.errors(include_url=False)
    else:
        return
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    path, above = fault["loc"], [*fault["loc"][:-1]]
    if fault["type"] == "extra_forbidden":
        keys = get_type_hints(_at(schema, above))
        raise unknown(f"key of {_place(where, above)}:", str(path[-1]), keys)
    if fault["type"] == "missing":
        absent = [f["loc"] for f in faults if f["type"] == "missing"]
        names = [name for *place, name in absent if place == above]
        raise ParamsError(f"{_place(where, above)} lacks {', '.join(names)}")
    path = path[: _depth(data, path)]
    needs = dict.fromkeys(  # by every type that a value may have
        _NEEDS.get(f["type"]) or f["msg"].removeprefix("Input should be ")
        for f in faults
        if f["loc"][: len(path)] == path and f["input"] is fault["input"]
    )
    if NoneType in get_args(_at(schema, path)):
        needs["null"] = None
    place, value = _place(where, path), f"{fault['input']!r:.80}"
    raise ParamsError(f"{place} is {value}, needs {' or '.join(needs)}")


def _place(where: str, path: Iterable[Any]) -> str:
    return ", ".join([where, *map(str, path)])


def _depth(data: Any, path: Sequence[Any]) -> int:
    """How many keys of a path lead into the data; those after them name members of a union."""
    for depth, key in enumerate(path):
        try:
            data = data[key]
        except (LookupError, TypeError):
            return depth
    return len(path)


def _at(schema: Any, path: Iterable[Any]) -> Any:
    """What a schema says of the value at a path; a list or mapping names its items' type last."""
    for key in path:
        if NoneType in get_args(schema):
            schema = get_args(schema)[0]
        schema = (get_args(schema) or [get_type_hints(schema)[key]])[-1]
    return schema
