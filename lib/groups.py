"""Which rows belong together: those of one model in one setup, and what such a group is called.

Every table, figure and sentence that is about one model at a time goes through here, so that rows
of two stacks, number formats, sources of weights, experts implementations or GPUs never meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lib.records.kinds import DTYPES, STACKS, model_order
from lib.records.record import Record, environments

SETUP = ("weights", "dtype", "stack", "experts", "gpu")
ARM = ("context", "new_tokens", "batch", "decoding")  # what tells the arms of one setup apart
# Where they are listed; a value that is not here comes after them, by name.
ORDER = {
    "dtype": DTYPES, "stack": STACKS,
    "experts": ("none", "grouped_mm", "batched_mm", "loop", "all_experts"),
}  # fmt: skip
WORDS = {
    "weights": "{} weights",
    "experts": "experts {}",
    "batch": "batch {}",
    "context": "{} tokens",
}


def arm_text(key: dict[str, Any]) -> str:
    """The fields of a key that say which arm it is."""
    fields = ("weights", "dtype", "stack", "experts", *ARM)
    return ", ".join(
        f"{f.replace('_', ' ')} {key[f]}" for f in fields if key.get(f) not in (None, "none")
    )


class Name(NamedTuple):
    """What a group is called in a figure or sentence, and its place among setups (a line style)."""

    label: str
    place: int


@dataclass(frozen=True)
class Group:
    """Rows of one model in one setup; `setup` holds the values of SETUP.

    `label` is the model, and in brackets what tells this group from the others beside it.
    """

    model: str
    setup: tuple[str, ...]
    label: str
    place: int
    rows: tuple[Record, ...]

    def of(self, name: str) -> str:
        """A value of the setup."""
        return self.setup[SETUP.index(name)]

    def but(self, *names: str) -> tuple[str, ...]:
        """The setup less some of its fields."""
        return tuple(v for n, v in zip(SETUP, self.setup, strict=True) if n not in names)


def setup_value(row: Record, name: str, envs: dict[str, dict[str, Any]]) -> str:
    """A field of SETUP as text; the GPU is that of the row's environment."""
    if name == "gpu":
        return str(envs.get(row.env_id or "", {}).get("gpu") or "none (CPU)")
    return str(row.key.get(name))


def setup_of(row: Record, envs: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """The values of SETUP of a row."""
    return tuple(setup_value(row, name, envs) for name in SETUP)


def setup_order(setup: Sequence[Any]) -> tuple[tuple[int, str], ...]:
    """Sorts setups: the study's stack and number format first, then the others."""
    names = (*SETUP, *[""] * (len(setup) - len(SETUP)))
    return tuple(_place(name, value) for name, value in zip(names, setup, strict=True))


def _place(name: str, value: Any) -> tuple[int, str]:
    known = ORDER.get(name, ())
    number = value if isinstance(value, int) else len(known)
    return (known.index(value) if value in known else number, str(value))


def by_setup(
    rows: Iterable[Record],
    kinds: str | Sequence[str],
    *,
    without: Sequence[str] = (),
    failed: bool = False,
) -> list[Group]:
    """Rows of these kinds apart by model and setup, the models in the order of params/models.yaml.

    `without` names fields of SETUP that do not set rows apart (what an ablation changes). Rows that
    failed are left out unless `failed`.
    """
    rows, kinds = list(rows), (kinds,) if isinstance(kinds, str) else kinds
    envs = environments(rows)
    found: dict[tuple[str, ...], list[Record]] = {}
    for row in rows:
        if row.kind in kinds and (failed or not row.error):
            setup = ("" if n in without else setup_value(row, n, envs) for n in SETUP)
            found.setdefault((str(row.key.get("model")), *setup), []).append(row)
    keys = sorted(found, key=lambda key: (model_order(key[0]), setup_order(key[1:])))
    names = named(keys)
    return [Group(key[0], key[1:], *names[key], tuple(found[key])) for key in keys]


def named(keys: Sequence[tuple], more: Sequence[str] = ()) -> dict[tuple, Name]:
    """What each group is called; a key is the model, the values of SETUP, and those of `more`.

    Beside the model a label holds the fields in which the groups of this model differ, and those in
    which any groups differ that must not be compared: where one line is of another stack, every
    line says its stack. Experts are a model's own affair. Groups of the same place have the same
    setup, as far as it is said.
    """
    fields = dict(enumerate((*SETUP, *more), start=1))
    shared = [at for at, name in fields.items() if name != "experts"]
    everywhere = {at for at in shared if len({key[at] for key in keys}) > 1}
    texts = {}
    for key in keys:
        mine = [other for other in keys if other[0] == key[0]]
        told = {at for at in fields if len({other[at] for other in mine}) > 1} | everywhere
        words = (WORDS.get(fields[at], "{}").format(key[at]) for at in sorted(told))
        texts[key] = ", ".join(words)
    listed = sorted(keys, key=lambda key: setup_order(key[1:]))
    places = list(dict.fromkeys(texts[key] for key in listed if texts[key]))
    return {
        key: Name(f"{key[0]} ({text})", places.index(text)) if text else Name(str(key[0]), 0)
        for key, text in texts.items()
    }
