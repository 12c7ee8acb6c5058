"""Predictions that were written down before anybody measured, and their seal.

outputs/predictions/2026-11-27-capacity.json holds date, commit, hashes of rows and question, the
fitted laws with intervals, their leave-one-out errors, the target, and every cell. The model that
made it did its work once and is in the history: at commit 5222f68 the command

    python -m lib.capacity register --date 2026-11-27

writes the same bytes again. The other cards of the datasheet list, -cards.json, were made by the
same laws at commit a471251: `python -m lib.analysis.capacity.registry cards --date 2026-11-27`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.files import ROOT, file_sha, read_yaml
from lib.models.card import ModelCard

FOLDER = "outputs/predictions"
QUESTIONS = "params/predictions"


class Registered(ValueError):
    """A registered file that is not what was registered."""


def newest(root: Path = ROOT) -> Path | None:
    """The registered file of the last date; None where outputs/ was deleted with it."""
    return max((root / FOLDER).glob("*-capacity.json"), default=None)


def sealed(path: Path) -> dict[str, Any]:
    """The registered predictions, if neither they nor their page were changed since."""
    lines = path.with_suffix(".sha256").read_text(encoding="utf-8").splitlines()
    stated = {name: sha for sha, name in (line.split() for line in lines)}
    for file in (path, path.with_suffix(".md")):
        if file_sha(file) != stated.get(file.name):
            raise Registered(
                f"{file.name} is not what was registered: its sha256 is {file_sha(file)}; "
                "take it from the history"
            )
    return json.loads(path.read_text(encoding="utf-8"))


def other_cards(path: Path) -> dict[str, Any]:
    """What the same laws say of cards that the registered file does not hold."""
    beside = path.with_name(path.name.replace("-capacity", "-cards"))
    return json.loads(beside.read_text(encoding="utf-8"))


def model_cards(path: Path) -> dict[str, ModelCard]:
    """The cards that the question of a registered file asked about, by model and number format."""
    question = read_yaml(ROOT / QUESTIONS / f"{path.stem}.yaml")
    return {name: _card(data) for name, data in question["cards"].items()}


def _card(data: Mapping[str, Any]) -> ModelCard:
    """A model card from the question's entry; layers of one kind stand together there."""
    layers = tuple(
        (kind["elements"], kind["window"])
        for kind in data["kv_layers"]
        for _ in range(kind["layers"])
    )
    return ModelCard.from_dict({**data, "kv_layers": layers})
