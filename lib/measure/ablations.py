"""Ablations: named arms that change one thing each. A new ablation is a dictionary entry.

The measuring function is an argument, so that this module knows no primitive. A failed arm is a
row with its error, as the paper's table 11 reports failures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.records import store
from lib.records.record import Record, first_line


def one_change(field: str, values: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Arms that set one field: {"context 512": {"context": 512}, ...}."""
    return {f"{field} {value}": {field: value} for value in values}


def run(
    kind: str,
    arms: Mapping[str, Mapping[str, Any]],
    *,
    base: Mapping[str, Any],
    measure: Callable[..., Record],
    failed_key: Callable[..., dict[str, Any]],
    env_id: str | None,
    records_path: str | Path,
    cleanup: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Measure `base` with one change per arm; every row is written as soon as it exists.

    `measure(kind=..., env_id=..., **arguments)` returns a record; `failed_key(**arguments)` gives
    the key of an arm that raised. An arm that sets a field which `base` lacks is a KeyError.
    """
    for name, change in arms.items():
        if unknown := change.keys() - base.keys():
            raise KeyError(f"arm {name!r} sets unknown {sorted(unknown)}; known: {sorted(base)}")
    rows = []
    for change in arms.values():
        arguments = {**base, **change}
        try:
            row = measure(kind=kind, env_id=env_id, **arguments)
        except Exception as error:  # whatever an arm raises is that arm's result
            row = Record(kind, failed_key(**arguments), error=first_line(error), env_id=env_id)
        cleanup()
        rows.append(store.append(records_path, row))
    return rows
