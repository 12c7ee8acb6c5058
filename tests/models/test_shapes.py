"""Shapes that ship: each is counted, is as large as its name says, and has its source."""

from __future__ import annotations

import re

import pytest

from lib.files import read_yaml, resolve
from lib.models import entries, load, shapes
from lib.models.origin import Origin

DATA = read_yaml(resolve(shapes.FILE))
# Billions of parameters where the name says none, or rounds: as the models' cards state them.
STATED = {
    "microsoft/Phi-3.5-mini-instruct": 3.82,
    "microsoft/Phi-4-mini-instruct": 3.84,
    "microsoft/phi-4": 14.7,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46.7,
    "deepseek-ai/DeepSeek-V2-Lite-Chat": 15.7,
    "deepseek-ai/DeepSeek-V3": 671.0,
    "google/gemma-2-2b-it": 2.61,
    "meta-llama/Llama-3.2-1B-Instruct": 1.24,
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-1.7B": 1.72,
}


def stated(hub: str) -> float:
    """Billions of parameters by the list above or the name."""
    number, unit = re.search(r"(\d+(?:\.\d+)?)([bBM])(?![a-z])", hub.rpartition("/")[2]).groups()
    return STATED.get(hub) or float(number) * (1e-3 if unit == "M" else 1)


@pytest.mark.parametrize("hub", DATA["models"])
def test_each_is_counted_and_as_large_as_its_publisher_says(hub):
    name, fields, _ = shapes.shipped(hub)
    card = load.card(Origin(name, config=fields))
    billions = STATED.get(hub) or stated(hub)
    assert abs(card.total_params / 1e9 / billions - 1) < (0.01 if hub in STATED else 0.12)
    assert card.name == hub and card.kv_layers is not None
    assert card.context_limit == fields["max_position_embeddings"]
    assert card.vocab_size == fields["vocab_size"]


def test_each_has_a_source_with_a_date_and_none_is_an_entry_already():
    assert len(DATA["models"]) >= 30
    for fields in DATA["models"].values():
        source = DATA["sources"][fields["source"]]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", source["date"])
        assert re.fullmatch(r"[0-9a-f]{40}", source["commit"])
    assert not {*DATA["models"]} & {entry.get("hub") for entry in entries.models().values()}


def test_a_model_is_found_by_its_hub_id_or_its_own_name_whatever_the_case():
    for name in ("Qwen/Qwen3-8B", "qwen3-8b"):
        hub, fields, source = shapes.shipped(name)
        assert (hub, fields["num_hidden_layers"]) == ("Qwen/Qwen3-8B", 36)
        assert "source" not in fields and "alibaba/InferSim" in source
    assert shapes.shipped("somebody/Qwen3-8B") is None


@pytest.mark.parametrize(
    ("name", "alike"),
    [("Qwen3-8BB", "as Qwen/Qwen3-8B"), ("me/qwen3_8b", "as Qwen/Qwen3-8B"), ("zzz", "no hub")],
)
def test_a_name_that_is_unknown_gets_the_models_that_are_called_alike(name, alike):
    assert alike in shapes.hint(name).rpartition("need ")[2]
