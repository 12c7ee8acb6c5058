"""Which experts a step really uses: chosen, touched, and what that makes of active parameters."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from lib import models
from lib.hardware.device import open_device
from lib.measure import experts
from lib.measure.experts import Call
from lib.models.card import ModelError
from lib.models.prompts import prompt_ids
from lib.records import store
from lib.stacks import fused

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DEEPSEEK = SMALL | {
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
JAMBA = SMALL | {
    "num_hidden_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 4,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts_per_tok": 2,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
}
LLAMA4 = SMALL | {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 32,
    "head_dim": 8,
    "interleave_moe_layer_step": 1,
}


@pytest.fixture(scope="module")
def model():
    return models.load.load("tiny-gpt-oss", dtype="float32", device=open_device("cpu"))


def load(folder, model_type, config):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    return models.load.load(str(folder), dtype="float32", device=open_device("cpu"))


def traced(model, path, **changes):
    arguments = {"context": 16, "batches": [1], "seed": 0, "env_id": "e"} | changes
    return experts.rows(model, records_path=path / "records.jsonl", **arguments)


# --- the definition, on modules that a reader can check


class Experts(torch.nn.Module):
    """Expert e multiplies by its weight; `also(choice)` names experts that join for every token."""

    def __init__(self, count, also=lambda choice: [], hide=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(count, 1), requires_grad=False)
        self.also, self.hide, self.calls = also, hide, 0

    def forward(self, hidden, choice, weights):
        self.calls += 1
        out = hidden * (self.weight[choice].squeeze(-1) * weights).sum(-1, keepdim=True)
        for expert in self.also(choice):
            out = out + 0 * self.weight[expert]
        return out.nan_to_num() if self.hide else out


def call(module, *choices):
    choice = torch.tensor(choices)
    return Call(module, (torch.ones(len(choice), 3), choice), {"weights": torch.ones(choice.shape)})


def test_an_expert_is_touched_if_its_weights_reach_the_output():
    assert experts.touched(call(Experts(8), [1, 2], [2, 3])) == 3
    assert experts.touched(call(Experts(8, also=lambda choice: [0]), [1, 2], [2, 3])) == 4
    everything = Experts(8, also=lambda choice: range(8))  # each times zero
    assert experts.touched(call(everything, [1, 2], [2, 3])) == 8


def test_one_token_of_a_step_has_touched_experts_of_its_own():
    own, shared = Experts(8), Experts(8, also=lambda choice: choice.unique().tolist())
    assert experts.touched(call(own, [1, 2], [3, 4]), token=0) == 2
    assert experts.touched(call(shared, [1, 2], [3, 4]), token=0) == 4


def test_experts_left_alone_cost_three_calls_and_others_are_tried_one_by_one():
    frugal, wasteful = Experts(40), Experts(40, also=lambda choice: range(40))
    assert experts.touched(call(frugal, [1, 2])) == 2 and frugal.calls == 3
    assert experts.touched(call(wasteful, [1, 2])) == 40 and wasteful.calls == 3 + 38


def test_of_many_experts_a_sample_is_tried():
    even = Experts(200, also=lambda choice: range(0, 200, 2))
    assert abs(experts.touched(call(even, [0, 2])) - 100) < 25
    assert even.calls == 3 + experts.PROBES
    everything = Experts(200, also=lambda choice: range(200))
    assert experts.touched(call(everything, [0, 2])) == 200


def test_a_module_that_hides_nan_is_refused():
    with pytest.raises(ModelError, match="Experts cannot be probed"):
        experts.touched(call(Experts(8, hide=True), [1, 2]))


def bits(module):
    return module.weight.view(torch.int32).clone()


def test_weights_come_back_bit_for_bit_also_after_an_error():
    module = Experts(4)
    odd = torch.tensor([[0.0], [-0.0], [float("nan")], [1e-45]])  # of which == would not tell all
    odd.view(torch.int32)[2] += 1  # a NaN with another payload
    module.weight.copy_(odd)
    before = bits(module)
    with pytest.raises(KeyError), experts.poisoned(module, [0, 1, 2, 3]):
        assert module.weight.isnan().all()
        raise KeyError
    assert torch.equal(bits(module), before)


def test_only_the_named_experts_are_poisoned():
    module = Experts(4)
    with torch.inference_mode(), experts.poisoned(module, [1, 3]):
        assert module.weight.isnan().flatten().tolist() == [False, True, False, True]
    assert module.weight.flatten().tolist() == [1, 1, 1, 1] and not module.weight.is_inference()


@pytest.mark.parametrize(
    "choices, expected", [([[0, 1], [2, 3]], 2.0), ([[5], [5]], 0.0), ([[0], [0], [0], [7]], 0.811)]
)
def test_entropy_of_choices(choices, expected):
    assert experts.entropy_bits(torch.tensor(choices)) == pytest.approx(expected, abs=1e-3)


# --- on models


@pytest.mark.parametrize("name", ["loop", "grouped_mm", "batched_mm"])
def test_these_implementations_use_what_the_router_chose(model, tmp_path, name):
    (row,) = traced(model, tmp_path, experts=[name])
    values = row.values
    assert (row.key["experts"], row.key["batch"], row.key["new_tokens"]) == (name, 1, None)
    assert values["experts_chosen_decode"] == values["experts_touched_decode"] == 2
    assert values["active_params_realised"] == values["active_params_nominal"]
    assert values["active_params_nominal"] == model.card.active_params
    assert values["decode_bytes_realised"] == values["decode_bytes"] == model.card.decode_bytes(16)
    assert 2 < values["experts_touched_prefill"] < 8
    assert 0 < values["routing_entropy_bits"] < 3  # log2 of 8 experts
    assert row.missing == {} and row.warnings == ()


def test_all_experts_uses_everything_but_the_lookup_table(model, tmp_path):
    (row,) = traced(model, tmp_path, experts=["all_experts"])
    card, values = model.card, row.values
    assert values["experts_touched_decode"] == values["experts_touched_prefill"] == 8
    assert values["experts_chosen_decode"] == 2
    assert values["active_params_realised"] == card.total_params - card.lookup_params
    step_bytes = card.weight_bytes - card.lookup_bytes + card.kv_bytes(16)
    assert values["decode_bytes_realised"] == step_bytes
    (warning,) = row.warnings
    assert warning["code"] == "active-params" and "choose an implementation" in warning["text"]


def test_gpt_oss_20b_would_use_20_billion_parameters():
    card = models.load.card("gpt-oss-20b")
    assert round(card.params_used(32) / 1e9, 2) == 20.34
    assert card.params_used(32) == card.total_params - card.lookup_params
    assert card.params_used(4) == card.active_params


def test_several_prompts_share_a_step(model, tmp_path):
    rows = traced(model, tmp_path, batches=[1, 4], experts=["grouped_mm", "all_experts"])
    one, four, _, every = (row.values for row in rows)
    assert one["experts_chosen_decode"] == 2 < four["experts_chosen_decode"] <= 8
    assert four["experts_touched_decode"] == four["experts_chosen_decode"]
    assert four["active_params_realised"] == four["active_params_nominal"]  # of one token
    expected = model.card.decode_bytes(16, 4, four["experts_chosen_decode"])
    assert four["decode_bytes"] == four["decode_bytes_realised"] == expected
    assert every["experts_touched_decode"] == 8
    assert every["active_params_realised"] > four["active_params_realised"]
    assert store.load(tmp_path / "records.jsonl") == rows


def test_weights_and_implementation_are_as_before(model, tmp_path):
    before, copies = model.experts, {n: p.clone() for n, p in model.net.named_parameters()}
    traced(model, tmp_path, experts=["all_experts", "loop"])
    assert model.experts == before
    assert all(torch.equal(copies[n], p) for n, p in model.net.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.net.modules())


def exchange_in_decode(model, monkeypatch):
    """Decode steps of `generate()` run all experts, as on a GPU they run another implementation."""

    @contextlib.contextmanager
    def switched():
        before = model.experts
        models.experts.use(model.net, "all_experts")
        yield
        models.experts.use(model.net, before)

    monkeypatch.setattr(model.net, "_optimize_model_for_decode", switched)


def test_decode_is_probed_as_generate_runs_it(model, tmp_path, monkeypatch):
    """On a GPU the library changes the implementation for decode steps; here to another one."""
    exchange_in_decode(model, monkeypatch)
    (row,) = traced(model, tmp_path, experts=["grouped_mm"])
    assert (row.key["experts"], row.values["decode_experts"]) == ("grouped_mm", "all_experts")
    assert row.values["experts_touched_decode"] == 8 > row.values["experts_touched_prefill"]
    assert model.experts == "grouped_mm"


@pytest.mark.parametrize(
    "stack, name, used",
    [
        ("hf-eager", "grouped_mm", "all_experts"),
        ("hf-static", "grouped_mm", "all_experts"),
        ("graph", "grouped_mm", "grouped_mm"),
        ("graph", "batched_mm", "batched_mm"),
        ("graph-compiled", "all_experts", fused.EXPERTS),
    ],
)
def test_each_stack_is_probed_with_the_experts_of_its_own_steps(
    model, tmp_path, monkeypatch, stack, name, used
):
    """`generate()` exchanges them, here for all experts; a captured step runs those configured, a
    compiled one its own, and the prefill before it what is configured."""
    exchange_in_decode(model, monkeypatch)
    (row,) = traced(model, tmp_path, experts=[name], stack=stack, batches=[3])
    values = row.values
    assert (row.key["stack"], row.key["experts"], row.key["batch"]) == (stack, name, 3)
    assert row.key["cache"] == ("dynamic" if stack == "hf-eager" else "static")
    assert values["decode_experts"] == used and model.experts == "grouped_mm"
    expected = 8 if used == "all_experts" else values["experts_chosen_decode"]
    assert values["experts_touched_decode"] == expected and values["experts_chosen_decode"] < 8
    assert (values["experts_touched_prefill"] == 8) == (name == "all_experts")


def test_the_router_chooses_alike_on_every_stack(model, tmp_path):
    rows = [
        traced(model, tmp_path, stack=stack, batches=[4])[0]
        for stack in ("hf-eager", "graph", "graph-compiled")
    ]
    assert len({row.values["experts_chosen_decode"] for row in rows}) == 1
    assert len({row.values["routing_entropy_bits"] for row in rows}) == 1


def test_an_implementation_that_fails_is_a_row_and_the_others_follow(model, tmp_path):
    bad, good = traced(model, tmp_path, experts=["no_such", "loop"])
    assert bad.error.startswith("ValueError: unknown experts 'no_such'") and bad.values == {}
    assert bad.key["experts"] == "no_such" and good.error is None


@pytest.mark.parametrize(
    "model_type, config, name",
    [
        ("mixtral", SMALL | {"num_local_experts": 4}, "all_experts"),
        ("deepseek_v3", DEEPSEEK, "all_experts"),
        ("deepseek_v3", DEEPSEEK, "grouped_mm"),
    ],
)
def test_other_mixtures_of_experts(tmp_path, model_type, config, name):
    """Also where the first layer is dense and further experts are shared by all tokens."""
    model = load(tmp_path, model_type, config)
    (row,) = traced(model, tmp_path, experts=[name])
    every = name == "all_experts"
    assert row.values["experts_touched_decode"] == (model.card.experts if every else 2)
    used = model.card.total_params - model.card.lookup_params
    assert row.values["active_params_realised"] == (used if every else model.card.active_params)


def test_where_the_cache_is_not_understood_the_rest_is_there(tmp_path):
    model = load(tmp_path, "jamba", JAMBA)
    model.card = replace(model.card, kv_layers=None, kv_reason="nobody looked")
    (row,) = traced(model, tmp_path)
    assert row.values["experts_touched_decode"] == 2 and row.error is None
    assert row.missing.keys() == {"decode_bytes", "decode_bytes_realised"}
    assert "the size of the cache is unknown" in row.missing["decode_bytes"]


def test_a_hybrid_has_the_bytes_of_its_step(tmp_path):
    (row,) = traced(load(tmp_path, "jamba", JAMBA), tmp_path)
    assert row.missing == {} and row.values["decode_bytes"] == row.values["decode_bytes_realised"]


def test_experts_that_are_told_no_choice_compute_everything(tmp_path):
    """Llama 4 sends every token to all experts, weighted with zero where they are not chosen."""
    model = load(tmp_path, "llama4_text", LLAMA4)
    one, two = traced(model, tmp_path, batches=[1, 2])
    assert one.values["experts_touched_decode"] == 4
    used = model.card.total_params - model.card.lookup_params
    assert one.values["active_params_realised"] == used > model.card.active_params
    assert one.missing.keys() == {"experts_chosen_decode", "routing_entropy_bits"}
    assert "active_params_realised" in two.missing  # whose token is whose is not known


def test_experts_that_are_called_one_by_one_are_refused():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))

    with pytest.raises(ModelError, match="experts was called 0 times"):
        experts.captured(Block(), lambda ids, tokens: None, torch.zeros(1, 1))


def test_a_dense_model_has_rows_without_a_router(tmp_path):
    model = models.load.load("tiny-yi", dtype="float32", device=open_device("cpu"))
    row, four = traced(model, tmp_path, batches=[1, 4], experts=["loop"])
    assert four.key["batch"] == 4 and four.values["decode_bytes"] == model.card.decode_bytes(16, 4)
    values = row.values
    assert values["note"] == "no router" and row.key["experts"] == "none"
    assert values["active_params_realised"] == values["active_params_nominal"]
    assert values["decode_bytes_realised"] == values["decode_bytes"] == model.card.decode_bytes(16)


def test_prompts_of_a_batch_are_the_same_or_each_its_own():
    model = models.load.load("tiny-yi", dtype="float32", device=open_device("cpu"))
    same = prompt_ids(model, 8, seed=3, batch=3)
    assert (same == same[0]).all()
    distinct = prompt_ids(model, 8, seed=3, batch=3, distinct=True)
    singles = [prompt_ids(model, 8, seed=seed) for seed in (3, 4, 5)]
    assert torch.equal(distinct, torch.cat(singles)) and len({*map(tuple, distinct.tolist())}) == 3
