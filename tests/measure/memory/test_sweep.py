"""Memory: the arithmetic of peak, baseline, cache, logits and rest on a fake allocator."""

import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    MambaConfig,
    StaticCache,
)

from lib.analysis.memory import tables
from lib.hardware.device import CpuDevice, open_device
from lib.measure.memory import bytes_alive, phases, sweep
from lib.models import experts, load
from lib.models.card import ModelError
from lib.records import store
from lib.stacks import registry
from lib.stacks.registry import STACKS
from lib.stacks.stack import StackError
from tests.fakes.device import FakeCache, FakeDevice, FakeModel, opened
from tools import tiny


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel(FakeDevice())
    monkeypatch.setitem(STACKS, "hf-eager", opened("hf-eager", fake.open_stack))
    fake.net = FakeNet(fake.device)
    return fake


class Takes(torch.nn.Module):
    """Takes so many bytes a token while it runs, and keeps a share of them."""

    def __init__(self, device, bytes_taken, bytes_kept):
        super().__init__()
        self.device, self.bytes_taken, self.bytes_kept = device, bytes_taken, bytes_kept

    def forward(self, tokens):
        self.device.allocate(self.bytes_taken * tokens)
        self.device.allocated -= (self.bytes_taken - self.bytes_kept) * tokens
        return self.bytes_kept * tokens


class FakeNet(torch.nn.Module):
    """Forward passes over a vocabulary of 5: logits of all positions, float32.

    For each token 7 bytes outside, 90 in the experts (kept while the pass runs: 10), 20 of logits.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.seen = device, []
        self.weight = torch.nn.Parameter(torch.zeros(20, dtype=torch.uint8), requires_grad=False)
        self.experts, self.head = Takes(device, 90, 10), Takes(device, 20, 20)

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids, past_key_values=None, use_cache=True):
        tokens = ids.shape[1]
        self.seen.append(tokens)
        self.device.allocate(7 * tokens)
        self.experts(tokens)
        self.device.allocated -= 17 * tokens
        self.head(tokens)
        logits = torch.zeros(1, tokens, 5)
        return SimpleNamespace(logits=logits, past_key_values=past_key_values or FakeCache())


def test_the_paper_protocol_prefills_once_and_holds_all_logits():
    net = FakeNet(FakeDevice())
    alive = sweep.paper_call(net, torch.zeros(1, 7, dtype=torch.long), 3)
    assert net.seen == [7, 1, 1, 1]
    assert bytes_alive.tensor_bytes(alive["logits"]) == 7 * 5 * 4
    assert bytes_alive.cache_bytes(alive["cache"]) == 400


def test_the_parts_of_the_peak_add_up(model):
    def call(ids, tokens):
        model.device.allocate(1000)  # peak 2000 above the baseline of 1000, then half is freed
        model.device.allocate(1000)
        model.device.allocated -= 1000
        return {"cache": FakeCache(), "logits": torch.zeros(30)}

    row = sweep.arm(
        model,
        kind="memory-paper",
        call=call,
        stack="hf-eager",
        context=8,
        new_tokens=4,
        seed=0,
        env_id="e",
    )
    v = row.values
    assert (v["baseline_bytes"], v["peak_bytes"], v["held_bytes"]) == (1000, 3000, 2000)
    assert (v["kv_tensor_bytes"], v["logits_bytes"]) == (400, 120)
    assert v["workspace_bytes"] == 3000 - 1000 - 400 - 120
    assert row.warnings == ()


def test_generate_caches_one_token_less_than_the_paper():
    assert sweep.cached_tokens("memory-paper", 2048, 64) == 2112
    assert sweep.cached_tokens("memory", 2048, 64) == 2111


def test_what_is_unlike_the_card_is_a_warning():
    same = {"kv_tensor_bytes": 400, "kv_card_bytes": 400, "weight_bytes": 20}
    assert bytes_alive.card_warnings(same, 20) == []
    assert bytes_alive.card_warnings(same | {"kv_card_bytes": None}, 20) == []
    warnings = bytes_alive.card_warnings(same | {"kv_card_bytes": 500}, 30)
    assert [warning["code"] for warning in warnings] == ["kv-card", "weights-card"]


def test_what_the_allocator_does_not_report_is_missing_with_a_reason(model):
    row = sweep.arm(
        model,
        kind="memory",
        call=lambda ids, g: {"cache": FakeCache()},
        stack="hf-eager",
        context=8,
        new_tokens=4,
        seed=0,
        env_id="e",
    )
    assert "reserved_bytes" not in row.values
    silent = "the fake allocator does not report it"
    assert row.missing == {
        "reserved_bytes": silent,
        "used_bytes": silent,
        "predicted_bytes": "nothing was predicted",
    }


def test_on_a_cpu_every_byte_that_torch_allocates_is_seen():
    with CpuDevice().watch_memory(resident_bytes=1000) as usage:
        tensor = torch.zeros(250)  # 1,000 bytes
        torch.zeros(500)  # 2,000 bytes, dropped at once
    assert usage["baseline_bytes"] == 1000
    assert usage["held_bytes"] == 1000 + tensor.nbytes == 2000
    assert usage["peak_bytes"] == 4000


def test_the_sweep_runs_both_protocols_at_every_context(model, tmp_path):
    path = tmp_path / "records.jsonl"
    rows = sweep.sweep(model, contexts=[8, 16], new_tokens=4, seed=0, records_path=path)
    assert [(r.kind, r.key["context"]) for r in rows[2:]] == [
        ("memory-paper", 8),
        ("memory", 8),
        ("memory-paper", 16),
        ("memory", 16),
    ]
    assert store.load(path) == rows


# --- where the peak is


def paper_arm(model, context=100, **changes):
    arguments = {
        "kind": "memory-paper",
        "stack": "hf-eager",
        "context": context,
        "new_tokens": 4,
        "seed": 0,
        "env_id": "e",
    }
    arguments["call"] = lambda ids, g: sweep.paper_call(model.net, ids, g)
    return sweep.arm(model, **(arguments | changes))


def test_the_stretches_of_a_call_by_hand(model):
    with phases.follow(model.net, model.device, bytes_alive.cache_bytes) as trace:
        sweep.paper_call(model.net, torch.zeros(1, 100, dtype=torch.long), 2)
    assert trace.stretches[:5] == [
        ("prefill", 0, 0),  # until the first pass begins
        ("prefill", 0, 700),  # 7 bytes a token until the experts
        ("prefill experts", 700, 9700),  # 90 bytes a token more
        ("prefill", 1700, 1700),  # 10 of them kept; they and the 7 are given back before the head
        ("prefill logits", 0, 2000),  # 20 bytes a token
    ]
    assert trace.prefill_cache == 400
    assert trace.peak_bytes("prefill") == 9700
    assert trace.grown_bytes("prefill experts") == 9000
    assert trace.grown_bytes("decode experts") == 90
    assert trace.grown_bytes("decode attention") is None
    assert not model.net.experts._forward_hooks and not model.net._forward_pre_hooks


def test_hooks_are_taken_away_when_the_call_fails(model):
    with pytest.raises(KeyError), phases.follow(model.net, model.device, bytes_alive.cache_bytes):
        raise KeyError("out of memory")
    assert not model.net.head._forward_hooks and not model.net._forward_pre_hooks


def test_a_peak_in_the_experts_of_the_prefill(model):
    v = paper_arm(model).values
    assert (v["peak_bytes"], v["prefill_peak_bytes"]) == (1000 + 9700, 1000 + 9700)
    assert (v["peak_in"], v["expert_workspace_bytes"]) == ("prefill experts", 9000)
    assert v["decode_expert_workspace_bytes"] == 90
    assert (v["kv_peak_bytes"], v["kv_peak_behind_bytes"]) == (400, 0)
    assert (v["weight_bytes"], v["logits_bytes"]) == (20, 100 * 5 * 4)


def test_a_peak_where_the_logits_are_made_or_while_decoding(model):
    model.net.experts.bytes_taken = model.net.experts.bytes_kept = 10
    assert paper_arm(model).values["peak_in"] == "decode logits"  # those of the prompt stay alive
    model.net.head.bytes_kept = 0
    v = paper_arm(model).values
    assert v["peak_in"] == "prefill logits"
    assert v["prefill_peak_bytes"] == 1000 + 2000


def test_a_longer_cache_at_the_end_can_move_the_peak_to_decoding(model):
    """The followed call has 2 new tokens; what the cache grew by until the end is added."""
    measured = {"baseline_bytes": 1000, "kv_tensor_bytes": 400 + 9000, "kv_behind_bytes": 5}
    ids = torch.zeros(1, 100, dtype=torch.long)

    def call(ids, tokens):
        return sweep.paper_call(model.net, ids, tokens)

    values = sweep.where_it_peaks(model, call, ids, 2, measured)
    assert (values["peak_in"], values["kv_peak_bytes"]) == ("decode experts", 9400)
    assert values["kv_peak_behind_bytes"] == 5
    values = sweep.where_it_peaks(model, call, ids, 2, measured | {"kv_tensor_bytes": 400})
    assert (values["peak_in"], values["kv_peak_bytes"]) == ("prefill experts", 400)


def test_other_stacks_are_not_followed(model):
    row = paper_arm(model, stack="graph")
    assert "peak_in" not in row.values
    assert row.missing["peak_in"] == "only the passes of hf-eager are followed"


def test_a_dense_model_has_no_workspace_of_experts(model):
    del model.net.experts
    model.net.experts = lambda tokens: None
    v = paper_arm(model).values
    assert "expert_workspace_bytes" not in v and v["peak_in"] == "decode logits"


# --- caches that the card or the counting does not know


def test_a_cache_that_the_card_cannot_size_is_a_reason_not_a_failure(model):
    def refuse(tokens):
        raise ModelError("the size of the cache is unknown")

    model.card.kv_bytes = refuse
    row = paper_arm(model)
    assert row.missing["kv_card_bytes"] == "the size of the cache is unknown"
    assert row.values["kv_tensor_bytes"] == 400 and row.values["workspace_bytes"] > 0
    assert row.warnings == ()


def test_a_cache_of_states_is_counted_and_the_card_agrees():
    """16 channels with 4 inputs of the convolution and 4 states each, in float32."""
    config = MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=64, state_size=4)
    net = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = net(torch.zeros(1, 4, dtype=torch.long), use_cache=True).cache_params
    values, missing = sweep.cache_readings(cache, load.card(config, "float32"), 4)
    assert values == {
        "kv_tensor_bytes": 16 * (4 + 4) * 4,
        "kv_behind_bytes": 0,
        "kv_card_bytes": 16 * (4 + 4) * 4,
    }
    assert not any(missing.values())
    with pytest.raises(ValueError, match="a NoneType has no layers"):
        bytes_alive.cache_bytes(None)


def test_a_state_space_model_is_measured_without_its_cache(model):
    row = sweep.arm(
        model,
        kind="memory",
        call=lambda ids, g: {"cache": SimpleNamespace()},
        stack="hf-eager",
        context=8,
        new_tokens=4,
        seed=0,
        env_id="e",
    )
    no_layers = "a SimpleNamespace has no layers of keys and values"
    for name in ("kv_tensor_bytes", "workspace_bytes", "peak_in"):
        assert row.missing[name] == no_layers and name not in row.values
    assert row.values["peak_bytes"] == 1000


def test_bytes_behind_a_view_are_counted_apart():
    whole = torch.zeros(10, dtype=torch.uint8)
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=whole[2:], values=whole[:2])])
    assert bytes_alive.cache_bytes(cache) == 8 + 2
    assert bytes_alive.behind_bytes(cache) == (10 - 8) + (10 - 2)


def test_weights_are_counted_by_storage():
    net = torch.nn.Module()
    net.a = torch.nn.Parameter(torch.zeros(6))
    net.b = torch.nn.Parameter(net.a.data[2:])  # a view of it
    net.c = torch.nn.Parameter(torch.zeros(3))
    assert bytes_alive.weight_bytes(net) == 4 * (6 + 3)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_static_cache_is_sized_by_its_capacity(kind):
    config = AutoConfig.for_model(
        "llama",
        hidden_size=16,
        intermediate_size=8,
        vocab_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    static = kind is StaticCache
    cache = kind(config=config, **({"max_cache_len": 40} if static else {}))
    with torch.no_grad():
        net(torch.zeros(1, 9, dtype=torch.long), past_key_values=cache)
    assert bytes_alive.is_static(cache) is static
    per_token = 2 * 2 * 2 * 4 * 2  # layers, keys and values, heads, elements, bytes
    computed = bytes_alive.card_bytes(load.card(config), cache, 9)
    assert bytes_alive.cache_bytes(cache) == computed == per_token * (40 if static else 9)


def test_a_net_that_only_generate_can_run_has_the_row_of_generate(tmp_path):
    """CPM-Ant takes positions that `generate()` hands to it and tokens do not tell."""
    AutoConfig.for_model(**tiny.fields("cpmant")).save_pretrained(tmp_path)
    loaded = load.load(str(tmp_path), dtype="float32", device=open_device("cpu"))
    rows = sweep.sweep(
        loaded, stack="hf-eager", contexts=[40], new_tokens=3, seed=0, records_path=tmp_path / "x"
    )
    paper, generated = rows[2:]
    assert paper.kind == "memory-paper" and paper.key["context"] == 40
    assert paper.error.startswith("PlainError: a forward pass with nothing but tokens and cache")
    assert generated.error is None and generated.values["peak_bytes"] > 0


def test_a_device_without_room_is_no_fault_of_the_net(model):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        sweep.paper_call(full, torch.zeros(1, 7, dtype=torch.long), 3)


# --- predictions


MLA = {  # keys are 16 + 8 wide and values 16, which the CPU's fused kernel does not take
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "vocab_size": 320,
}


FALCON = {  # one head of keys for all queries, spread over them in the product
    "model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 320, "multi_query": True, "new_decoder_architecture": False,
}  # fmt: skip
MAMBA = {
    "model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 3200,
    "intermediate_size": 128, "state_size": 8,
}  # fmt: skip


BOTH = ["bfloat16", "float32"]
PREDICTED = [
    *product(BOTH, [("tiny-gpt-oss", ["all_experts"], 200)]),
    *product(BOTH, [(name, [], 512) for name in ("tiny-yi", MLA, MAMBA, FALCON)]),
    # An image's token is looked for; a mask for the window.
    *product(["float32"], [(tiny.fields(name), [], 512) for name in ("gemma4", "mistral")]),
    # Positions are counted; the part that decodes names no model by itself.
    *product(["float32"], [(tiny.fields(name), [], 100) for name in ("opt", "emu3")]),
]


@pytest.mark.parametrize(("dtype", "case"), PREDICTED)
def test_shapes_predict_what_the_profiler_of_the_cpu_sees(dtype, case, tmp_path):
    name, also, context = case
    if isinstance(name, dict):
        (tmp_path / "config.json").write_text(json.dumps(name))
        name = str(tmp_path)
    loaded = load.load(name, dtype=dtype, device=open_device("cpu"))
    generate = registry.open_stack("hf-eager", loaded.net)
    calls = {
        "memory-paper": lambda ids, g: sweep.paper_call(loaded.net, ids, g),
        "memory": lambda ids, g: {"cache": generate(ids, g).cache},
    }
    predictions = sweep.predict(loaded, [context], 4, also)
    assert len(predictions) == 2 * (1 + len(also))
    for (kind, implementation, _), predicted in predictions.items():
        if implementation != "none":
            experts.use(loaded.net, implementation)
        row = paper_arm(loaded, context, kind=kind, predicted=predicted, call=calls[kind])
        v = row.values
        above = v["peak_bytes"] - v["baseline_bytes"]
        assert (
            v["predicted_bytes"]
            == predicted
            == pytest.approx(above, rel=0.15 if context == 100 else 0.1)
        )
        assert "predicted_bytes" not in row.missing
        assert v["weight_bytes"] == loaded.card.weight_bytes and row.warnings == ()


@pytest.mark.parametrize(
    ("model_type", "stack"),
    [
        *product(["gpt_oss", "llama", "bamba", "minimax"], ["hf-eager", "hf-static", "graph"]),
        ("qwen4_exp_text", "hf-eager"),
        ("qwen4_exp_text", "hf-static"),  # beside the static layers, positions of every token
        ("recurrent_gemma", "hf-eager"),  # the net holds the states
    ],
)
def test_the_cache_of_every_stack_is_the_cards(model_type, stack, tmp_path):
    """Sliding, full and recurrent layers; counters of a recorded step are no cache."""
    made = AutoConfig.for_model(**tiny.fields(model_type))
    made.save_pretrained(tmp_path)
    loaded = load.load(str(tmp_path), dtype="float32", device=open_device("cpu"))
    try:
        rows = sweep.sweep(
            loaded, stack=stack, contexts=[40], new_tokens=3, seed=0, records_path=tmp_path / "rows"
        )
    except StackError:
        refused = {("bamba", "graph"), ("minimax", "graph"), ("minimax", "hf-static")}
        assert (model_type, stack) in refused
        return
    paper, generated = rows[2:]
    for row in (generated,) if paper.error else (paper, generated):
        assert row.values["kv_tensor_bytes"] == row.values["kv_card_bytes"] > 0
        assert row.warnings == ()
    assert paper.error or paper.key["cache"] == "dynamic"
    assert bool(paper.error) == (model_type == "recurrent_gemma")  # it runs in generate() alone
    assert generated.key["cache"] == STACKS[stack].cache


def test_the_sweep_passes_predictions_on(model, tmp_path):
    predictions = {("memory-paper", "none", 8): 77, ("memory", "none", 8): "no shapes"}
    rows = sweep.sweep(
        model,
        contexts=[8],
        new_tokens=4,
        seed=0,
        predicted=predictions,
        records_path=tmp_path / "records.jsonl",
    )[2:]
    assert rows[0].values["predicted_bytes"] == 77
    assert rows[1].missing["predicted_bytes"] == "no shapes"


def test_what_cannot_be_predicted_says_why():
    loaded = load.load("tiny-gpt-oss", device=open_device("cpu"), experts="loop")
    predictions = sweep.predict(loaded, [8], 2)
    assert set(predictions) == {("memory-paper", "loop", 8), ("memory", "loop", 8)}
    reasons = predictions.values()
    assert all(r.startswith("its code does not run without values (") for r in reasons)
    table = tables.prediction_table(predictions).frame()
    assert list(table["protocol"]) == ["paper", "generate()"]
