"""Old attentions and states have sizes and bounds; what a card cannot size is missing, and the
arms go on."""

import json
from dataclasses import replace

import pytest

from lib.analysis import bounds
from lib.analysis.memory import tables
from lib.hardware.device import open_device
from lib.measure import latency
from lib.measure.memory import sweep
from lib.models import load
from lib.stacks import registry

SMALL = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 64,
             "bos_token_id": 1, "eos_token_id": 2},
    "falcon": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
               "vocab_size": 64},
    "mamba": {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 8, "vocab_size": 64},
}  # fmt: skip
# Two layers of 32 numbers for each key and value head kept, over 8 + 3 tokens, 4 bytes each.
# Mamba: 64 channels with 4 inputs of the convolution and 8 states.
HELD = {"gpt2": 2 * 2 * 32 * 11 * 4, "falcon": 2 * 2 * 8 * 11 * 4, "mamba": 2 * 64 * (4 + 8) * 4}


@pytest.fixture(scope="module", params=SMALL)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = {"model_type": request.param, **SMALL[request.param]}
    (folder / "config.json").write_text(json.dumps(config))
    return load.load(str(folder), dtype="float32", device=open_device("cpu"))


@pytest.fixture
def unknown(model):
    """The same model with a card that does not understand its cache."""
    why = "nobody has looked"
    return replace(model, card=replace(model.card, kv_layers=None, kv_reason=why))


def latency_row(model):
    return latency.arm(
        model, stack="hf-eager", context=8, new_tokens=3, repeats=2, seed=0, env_id=None
    )


def memory_row(model, kind):
    generate = registry.open_stack("hf-eager", model.net)
    call = {
        "memory-paper": lambda ids, tokens: sweep.paper_call(model.net, ids, tokens),
        "memory": lambda ids, tokens: {"cache": generate(ids, tokens).cache},
    }[kind]
    tokens = 3 if kind == "memory-paper" else 4  # 11 tokens in the cache either way
    return sweep.arm(
        model,
        kind=kind,
        call=call,
        stack="hf-eager",
        context=8,
        new_tokens=tokens,
        seed=0,
        env_id=None,
    )


def test_latency_has_the_bytes_of_a_step(model):
    held = HELD[model.card.model_type]
    growing = held if model.card.state_bytes == 0 else 0
    weights = 4 * model.card.active_params
    row = latency_row(model)
    # Half way through three new tokens; states are read whole.
    assert weights < row.values["decode_bytes"] <= weights + held
    assert row.values["decode_bytes"] >= weights + held - growing
    assert "decode_bytes" not in row.missing


def test_latency_is_measured_without_a_bound(unknown):
    row = latency_row(unknown)
    assert len(row.samples["e2e_s"]) == 2 and "decode_bytes" not in row.values
    assert "the size of the cache is unknown" in row.missing["decode_bytes"]


@pytest.mark.parametrize("kind", ["memory-paper", "memory"])
def test_the_card_computes_what_the_cache_holds(model, kind):
    row = memory_row(model, kind)
    assert row.values["kv_tensor_bytes"] == HELD[model.card.model_type]
    assert row.values["kv_card_bytes"] == row.values["kv_tensor_bytes"]
    assert row.values["peak_bytes"] > row.values["baseline_bytes"] > 0 and row.warnings == ()


@pytest.mark.parametrize("kind", ["memory-paper", "memory"])
def test_memory_is_measured_without_the_cards_cache(unknown, kind):
    row = memory_row(unknown, kind)
    assert row.values["kv_tensor_bytes"] == HELD[unknown.card.model_type]
    assert "kv_card_bytes" not in row.values and row.warnings == ()
    assert "the size of the cache is unknown" in row.missing["kv_card_bytes"]


def test_what_is_expected_is_a_dash_with_the_reason(unknown):
    bound = bounds.expected(unknown.card, [8, 16], 1e9)
    cache = tables.expected(unknown.card, [8, 16], 4)
    for table in (bound, cache):
        assert [row[0] for row in table.rows] == [8, 16]
        for cell in (cell for row in table.rows for cell in row[1:]):
            assert cell.value is None and "the size of the cache is unknown" in cell.reason


def test_where_the_cache_is_known_there_is_no_such_column():
    card = load.card("tiny-yi")
    assert all(cell.value for cell in bounds.expected(card, [8], 1e9).rows[0][1:])
    assert tables.expected(card, [8], 4).rows[0][1].value == card.kv_bytes(12) / 1e6
