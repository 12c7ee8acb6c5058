"""A second study as data: its file is whole, and its numbers agree with arithmetic."""

from __future__ import annotations

import pytest

from lib.files import read_yaml, resolve
from lib.hardware import datasheets
from lib.studies import study as studies_study
from lib.studies import verdict

FILE = "params/published/arxiv-2605.30571.yaml"
FORMS = {"value", "ratio", "at_most", "falls_with", "order", "count"}


@pytest.fixture(scope="module")
def study():
    read_yaml(resolve(FILE))  # refuses repeated keys, and values that YAML misreads
    return studies_study.load(FILE)


def test_every_claim_is_an_entry_with_a_form_and_an_untestable_one_has_its_reason(study):
    assert len(study.data["claims"]) == 14
    for name, claim in study.data["claims"].items():
        assert claim["form"] in FORMS, name
        assert {"where", "text", "metric", "subjects", "value", "unit", "testable"} <= set(claim)
        assert claim["testable"] or claim["reason"], name
        assert claim.get("tolerance", "time") in verdict.TOLERANCES, name
        assert (claim["form"] in {"ratio", "falls_with"}) <= ("over" in claim), name


def test_only_claims_about_the_h100_are_testable(study):
    testable = {n for n, c in study.data["claims"].items() if c["testable"]}
    assert testable == {"floor-share-h100", "launch-side-h100", "graphs-gain-h100"}
    for name in testable:
        assert study.claim(name)["subjects"]["gpu"] == study.data["gpu"]


def test_cards_are_those_of_the_datasheets_and_models_have_entries(study):
    for card in study.data["gpus"].values():
        assert datasheets.datasheet(card["name"]).memory_bytes_per_s, card
    assert study.entry("Qwen2.5-7B")[0] == "Qwen2.5-7B"
    assert study.entry("Llama-3.1-8B")[0] == "Llama-3.1-8B"
    with pytest.raises(studies_study.Absent, match="no entry of Mistral-7B"):
        study.entry("Mistral-7B")  # its version is not known


def test_the_interval_of_the_graph_gain_holds_its_value(study):
    claim = study.claim("graphs-gain-h100")
    assert float(claim["low"]) < float(claim["value"]) < float(claim["high"])
    assert claim["n"] == 10


def test_the_floor_of_the_headline_cell_by_hand(study):
    """15.231 GB of weights and 2,048 x 57,344 bytes of cache over 3.35 TB/s are 4.58 ms.

    Table 1's 0.270 is then a step of 16.97 ms; table 8's 14.83 ms would be 0.309.
    """
    held = study.data["counted"]["Qwen2.5-7B"]
    floor_ms = 1e3 * (held["weight_bytes"] + 2048 * held["kv_bytes_per_token"]) / 3.35e12
    assert floor_ms == pytest.approx(4.58, abs=0.005)
    share = study.value(1, "2048", "H100 SXM5")
    assert floor_ms / share == pytest.approx(16.97, abs=0.01)
    step_ms = study.value(8, "H100 SXM5", "p50 unprofiled (ms)")
    assert floor_ms / step_ms == pytest.approx(0.309, abs=0.0005)
    # On the L4 table and abstract agree: 15.35 GB over 0.3 TB/s is 51.2 ms, 0.81 of 62.96 ms.
    l4_ms = floor_ms * 3.35e12 / 3.0e11
    assert l4_ms / study.value(8, "L4", "p50 unprofiled (ms)") == pytest.approx(0.81, abs=0.005)


@pytest.mark.parametrize("model", ["Qwen2.5-7B", "Llama-3.1-8B"])
def test_counts_are_those_of_the_model_card(study, model):
    models = pytest.importorskip("lib.models.load")
    card = models.card(model, "bfloat16")
    held = study.data["counted"][model]
    for name in ("total_params", "active_params", "lookup_params", "weight_bytes", "vocab_size"):
        assert held[name] == getattr(card, name), name
    assert held["kv_bytes_per_token"] == card.kv_bytes(1, cache="static")
