"""What a notebook may be given: the names that its cell tagged `parameters` assigns.

The literals there are the defaults, and their types are those that other values must have.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.files import ParamsError, unknown

_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*\.?[0-9]*([eE][-+]?[0-9]+)?")


def notebook_parameters(path: str | Path) -> dict[str, Any]:
    """Name and literal default of each parameter, from the notebook's cell tagged `parameters`."""
    path = Path(path)
    if not path.is_file():
        raise ParamsError(f"no notebook {path}")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ParamsError(f"{path.name}: {len(tagged)} cells are tagged 'parameters'; needs one")
    parameters = {}
    for line in ast.parse("".join(tagged[0]["source"])).body:
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        try:
            parameters[target.id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError):
            raise ParamsError(
                f"{path.name}: the parameters cell may only assign literals, not "
                f"{ast.unparse(line)!r}"
            ) from None
    return parameters


def check_parameters(
    values: Mapping[str, Any], signature: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """The values, if the notebook knows each name and each has the type of its default."""
    for name in values:
        if name not in signature:
            raise unknown(f"parameter of {where}:", name, signature)
    return {
        name: _typed(value, signature[name], f"{where}: {name}") for name, value in values.items()
    }


def _typed(value: Any, default: Any, where: str) -> Any:
    """The value if it has the default's type (an integer may stand for a float)."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        hint = ""
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            hint = "; YAML 1.1 reads it as text: write it without quotes, and 1e-3 as 1.0e-3"
        elif isinstance(default, str):
            hint = "; write it in quotes"
        expected, got = type(default).__name__, type(value).__name__
        raise ParamsError(f"{where} is {value!r} ({got}), needs {expected} like {default!r}{hint}")
    if isinstance(value, list):
        kinds = {type(item) for item in default or []}
        pattern = default[0] if len(kinds) == 1 else None
        return [_typed(item, pattern, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ParamsError(f"{where}: the key {odd[0]!r} is no text; write it in quotes")
        defaults = default or {}
        return {key: _typed(x, defaults.get(key), f"{where}.{key}") for key, x in value.items()}
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise ParamsError(f"{where} is {value!r} ({type(value).__name__}); write it in quotes")
    return value
