"""Shapes of popular models that ship with the workbook, so that their cards need no hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from lib.files import read_yaml, resolve

FILE = "params/shapes.yaml"


def shipped(name: str, path: str | Path = FILE) -> tuple[str, dict[str, Any], str] | None:
    """Hub id, configuration and source of a model by its hub id or the part after the slash,
    whatever the case; None for one that is not here."""
    data = read_yaml(resolve(path))
    for hub, fields in data["models"].items():
        if name.casefold() in (hub.casefold(), hub.rpartition("/")[2].casefold()):
            source = data["sources"][fields["source"]]
            told = f"{source['text']}, commit {source['commit'][:12]} of {source['date']}"
            return hub, {key: x for key, x in fields.items() if key != "source"}, told
    return None


def names(path: str | Path = FILE) -> list[str]:
    """Hub ids of all that are here."""
    return list(read_yaml(resolve(path))["models"])


def hint(name: str = "", path: str | Path = FILE) -> str:
    """What else `make fit` takes, for who has no hub: the models here that have all words of the
    name first, else those that are called most alike."""
    asked = {hub.rpartition("/")[2].casefold(): hub for hub in names(path)}
    words = re.split(r"\W+", name.casefold())
    near = [hub for hub in asked.values() if all(word in hub.casefold() for word in words)]
    alike = difflib.get_close_matches(name.rpartition("/")[2].casefold(), asked, cutoff=0.7)
    near = near or [asked[key] for key in alike]
    such = f", such as {' or '.join(near[:3])}" if name and near else ""
    return (
        f"make fit needs no weights: a folder with a config.json alone will do (MODEL=<folder>), "
        f"and {len(names(path))} models of {FILE} need no hub{such}"
    )
