"""Experts: every implementation computes the same function; `all_experts` reads every weight."""

import pytest
import torch

from lib.hardware.device import CpuDevice, open_device
from lib.measure.memory import sweep
from lib.models import experts, load
from lib.models.prompts import prompt_ids
from lib.records import store
from lib.stacks import registry


@pytest.fixture(scope="module")
def model():
    return load.load("tiny-gpt-oss", dtype="float32", device=open_device("cpu"))


@pytest.fixture(autouse=True)
def back_to_default(model):
    before = model.experts
    yield
    experts.use(model.net, before)


def logits(model, name, context=48):
    experts.use(model.net, name)
    with torch.inference_mode():
        return model.net(prompt_ids(model, context, seed=0)).logits


@pytest.mark.parametrize("name", ["loop", "batched_mm", "all_experts"])
def test_every_implementation_gives_the_same_logits(model, name):
    expected = logits(model, "grouped_mm")
    torch.testing.assert_close(logits(model, name), expected, atol=1e-4, rtol=1e-3)


def test_the_key_names_what_is_in_use(model):
    experts.use(model.net, "all_experts")
    assert model.key()["experts"] == "all_experts"
    assert registry.experts_in_decode(model.net, "hf-eager") == "all_experts"
    experts.use(model.net, "loop")
    assert model.key()["experts"] == "loop"


@pytest.mark.parametrize(("name", "reads_all"), [("all_experts", True), ("loop", False)])
def test_only_all_experts_reads_the_experts_that_the_router_did_not_choose(model, name, reads_all):
    experts.use(model.net, name)
    module = next(m for m in model.net.modules() if hasattr(m, "_apply_gate"))
    kept = module.down_proj.clone()
    tokens, index = torch.randn(1, module.hidden_size), torch.tensor([[0, 1]])
    with torch.no_grad():
        module.down_proj[2:] = float("nan")  # poison what was not chosen: reading it shows
        out = module(tokens, index, torch.tensor([[0.5, 0.5]]))
        module.down_proj.copy_(kept)
    assert bool(out.isnan().any()) is reads_all


def peak_bytes(module, tokens):
    args = (
        torch.randn(tokens, module.hidden_size),
        torch.zeros(tokens, 2, dtype=torch.long),
        torch.ones(tokens, 2),
    )
    with CpuDevice().watch_memory(resident_bytes=0) as usage, torch.inference_mode():
        module(*args)
    return usage["peak_bytes"]


def test_all_experts_needs_room_for_every_expert_on_every_token(model):
    module = next(m for m in model.net.modules() if hasattr(m, "_apply_gate"))
    sizes = {}
    for name in ("all_experts", "loop"):
        experts.use(model.net, name)
        sizes[name] = peak_bytes(module, 100) - peak_bytes(module, 50)
    inner = 2 * module.intermediate_size  # gate and up projections of one token, float32
    assert sizes["all_experts"] >= 50 * module.num_experts * inner * 4
    assert sizes["loop"] < sizes["all_experts"] / 2  # one expert at a time, its own tokens only


def test_memory_measures_further_implementations_in_the_same_job(model, tmp_path):
    path = tmp_path / "records.jsonl"
    rows = sweep.sweep(
        model, contexts=[16], new_tokens=2, seed=0, also_experts=["all_experts"], records_path=path
    )
    measured = [(r.key["experts"], r.kind) for r in rows[2:]]
    assert measured == [
        (name, kind)
        for name in ("grouped_mm", "all_experts")
        for kind in ("memory-paper", "memory")
    ]
    assert store.load(path) == rows


def test_a_dense_model_has_one_implementation(tmp_path):
    dense = load.load("tiny-yi", dtype="float32", device=open_device("cpu"))
    rows = sweep.sweep(
        dense,
        contexts=[16],
        new_tokens=2,
        seed=0,
        also_experts=["all_experts"],
        records_path=tmp_path / "records.jsonl",
    )
    assert [r.kind for r in rows] == ["environment", "card", "memory-paper", "memory"]


def test_an_unknown_name_is_an_error_with_the_known_ones(model):
    with pytest.raises(ValueError, match="unknown experts 'fast'.*all_experts"):
        experts.use(model.net, "fast")
