"""Captured and compiled stacks: the same logits as `generate()`, on a CPU without capture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.hardware.device import CpuDevice
from lib.measure import latency, stacks
from lib.models import experts, load
from lib.records import store
from lib.stacks import fused, graph, logits_check, registry

STACKS = ["hf-static", "graph", "graph-compiled"]
WINDOW = 16
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
ARCHITECTURES = {
    "sinks, sliding and full, experts": dict(
        model_type="gpt_oss", sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], pad_token_id=0),
    "grouped heads, normed queries": dict(model_type="qwen3"),
    "grouped heads": dict(model_type="llama"),
    "one key for all heads": dict(model_type="llama", num_key_value_heads=1),
    "all layers sliding": dict(model_type="mistral", sliding_window=WINDOW),
    "experts that are gated and concatenated": dict(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "experts without a window": dict(
        model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def build(name, **changes):
    torch.manual_seed(3)
    config = AutoConfig.for_model(**{**SMALL, **ARCHITECTURES[name], **changes})
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
        net.get_output_embeddings().weight.mul_(20)  # rounding decides no token
    return net.requires_grad_(False)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def net(request):
    return build(request.param)


def prompt(net, tokens, batch=1):
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, net.config.vocab_size, (batch, tokens), generator=generator)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("context", [5, WINDOW - 4, WINDOW, 2 * WINDOW + 3])
def test_logits_before_at_and_past_the_window(net, stack, context):
    ids = prompt(net, context)
    reference = registry.open_stack("hf-eager", net)
    out = reference(ids, 12)
    expected = reference.forced_logits(ids, out.tokens)
    tested = registry.open_stack(stack, net, capacity=context + 12)
    torch.testing.assert_close(
        tested.forced_logits(ids, out.tokens), expected, atol=1e-4, rtol=1e-4
    )
    assert tested(ids, 12).tokens.tolist() == out.tokens.tolist()


@pytest.mark.parametrize("stack", STACKS)
def test_a_batch_decodes_each_row_as_if_alone(net, stack):
    ids = prompt(net, 20, batch=3)
    out = registry.open_stack(stack, net)(ids, 6).tokens
    alone = [registry.open_stack("hf-eager", net)(row[None], 6).tokens[0].tolist() for row in ids]
    assert out.tolist() == alone


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("new_tokens", [1, 2, 7])
def test_exactly_the_tokens_that_were_asked_for(net, stack, new_tokens):
    called = []
    generate = registry.open_stack(stack, net, capacity=40)
    out = generate(prompt(net, 9), new_tokens, on_token=lambda: called.append(0))
    assert out.tokens.shape == (1, new_tokens) and len(called) == new_tokens
    assert out.tokens.tolist() == generate(prompt(net, 9), new_tokens).tokens.tolist()


@pytest.mark.parametrize("stack", ["graph", "graph-compiled"])
def test_only_a_first_or_longer_call_prepares(stack):
    net = build("grouped heads")
    generate = registry.open_stack(stack, net, capacity=60)
    prepared = [
        generate(prompt(net, context), tokens).prepare_s > 0
        for context, tokens in ((20, 8), (20, 8), (52, 8), (200, 8))
    ]
    assert prepared == [True, False, False, True]
    assert generate(prompt(net, 20, batch=2), 8).prepare_s > 0  # another batch, other buffers


def test_a_buffer_is_as_long_as_it_must_be():
    """Attention reads all of it at every step."""
    net = build("sinks, sliding and full, experts")
    cache = registry.open_stack("graph", net, capacity=60)(prompt(net, 20), 8).cache
    assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW, 64, WINDOW]


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm", "all_experts"])
def test_every_implementation_of_experts_that_can_be_captured(name):
    net = build("sinks, sliding and full, experts")
    ids, expected = prompt(net, 20), registry.open_stack("hf-eager", net)(prompt(net, 20), 8).tokens
    experts.use(net, name)
    assert registry.open_stack("graph", net)(ids, 8).tokens.tolist() == expected.tolist()
    assert registry.experts_in_decode(net, "graph") == name


def test_what_cannot_be_captured_says_why():
    net = build("sinks, sliding and full, experts")
    experts.use(net, "loop")
    with pytest.raises(ValueError, match="experts 'loop' look on the host"):
        registry.open_stack("graph", net)(prompt(net, 20), 8)
    with pytest.raises(ValueError, match="greedily only, not 'top-p 0.9'"):
        registry.open_stack("graph", net, decoding="top-p 0.9")
    dense = build("grouped heads")
    dense.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attention 'flex_attention' cannot be captured"):
        graph.require_capturable(dense, graph.DynamicCache(config=dense.config))


def test_fused_layers_leave_the_net_as_it_was(net):
    registry.open_stack("graph-compiled", net)(prompt(net, 20), 4)
    assert not any("forward" in layer.__dict__ for layer in net.get_decoder().layers)
    assert net.config._attn_implementation != fused.ATTENTION


def test_the_compiler_tries_tiles_where_a_product_is_long_enough_to_be_told_apart(monkeypatch):
    told = []
    monkeypatch.setattr(torch, "compile", lambda run, options: told.append(options) or run)
    net = build("grouped heads")
    layer, held = net.get_decoder().layers[0], SimpleNamespace(is_sliding=False)
    largest = max(p.nbytes for p in layer.parameters())
    for least in (largest, largest + 1):
        monkeypatch.setattr(fused, "_FUNCTIONS", {})
        monkeypatch.setattr(fused, "TUNED_FROM_BYTES", least)
        fused.Layers(net, compiled=True)._function(layer, held)
    assert [options["max_autotune_pointwise"] for options in told] == [True, False]
    assert all(options.items() >= fused.OPTIONS.items() for options in told)


def test_fused_attention_reads_no_key_beyond_the_mask():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, 4, generator=generator)
        for heads, length in ((4, 1), (2, 6), (2, 6))
    )
    mask = torch.zeros(1, 1, 1, 6)
    mask[..., 4:] = torch.finfo(mask.dtype).min
    module = torch.nn.Module()
    found, _ = fused.attend(module, query, key, value, mask)
    one_by_one = [
        torch.softmax(query[0, head, 0] @ key[0, head // 2, :4].T / 2, -1) @ value[0, head // 2, :4]
        for head in range(4)
    ]
    torch.testing.assert_close(found[0, 0], torch.stack(one_by_one))


@pytest.fixture(scope="module")
def model():
    return load.load("tiny-gpt-oss", dtype="float32", device=CpuDevice())


def test_a_captured_stack_times_its_steps_apart_from_the_prefill(model):
    common = {"context": 40, "new_tokens": 9, "repeats": 3, "seed": 0, "env_id": "e"}
    samples = latency.arm(model, stack="graph", **common).samples
    assert len(samples["decode_s"]) == 3
    assert all(
        0 < steps < call for steps, call in zip(samples["decode_s"], samples["e2e_s"], strict=True)
    )
    assert "decode_s" not in latency.arm(model, stack="hf-eager", **common).samples
    one = latency.arm(model, stack="graph", **(common | {"new_tokens": 1})).samples
    assert "decode_s" not in one  # there is no step


def test_marks_are_read_in_the_clock_of_their_device():
    class Event:
        def elapsed_time(self, last):
            return 250.0  # ms

    assert graph.between_s(Event(), Event()) == 0.25
    assert graph.between_s(2.0, 2.5) == 0.5


def test_a_stack_that_fails_the_gate_has_no_throughput(model, monkeypatch):
    monkeypatch.setattr(graph.HeldLayer, "fill", lambda *_: None)
    with pytest.raises(logits_check.GateError):
        latency.gated_arm(
            model, stack="graph", context=40, new_tokens=4, repeats=1, seed=0, env_id="e"
        )


def test_a_gated_row_says_by_how_much_it_passed(model):
    row = latency.gated_arm(
        model, stack="graph", context=40, new_tokens=4, repeats=2, seed=0, env_id="e"
    )
    assert row.values["gate_max_error"] < row.values["gate_allowed_error"]
    assert row.key["stack"] == "graph" and row.values["prepare_s"] > 0


def test_a_choice_by_counting_is_a_choice_by_sorting():
    scores = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    values, index = fused._topk(scores, 4)
    expected = scores.topk(4)
    assert index.tolist() == expected.indices.tolist()
    torch.testing.assert_close(values, expected.values)
    tied = fused._topk(torch.tensor([[2.0, 5.0, 5.0, 5.0]]), 2)
    assert tied[0].tolist() == [[5.0, 5.0]] and len(set(tied[1][0].tolist())) == 2


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "experts" in name])
def test_few_and_many_choices_of_experts_agree(name, monkeypatch):
    """Two of 16 for each token: to four tokens each choice is read, from five on they are sorted
    by expert, so that none is read twice."""
    net = build(
        name, **{n: 16 for n in ("num_local_experts", "num_experts") if n in ARCHITECTURES[name]}
    )
    module = next(m for path, m in net.named_modules() if path.endswith(".experts"))
    library, many = fused.grouped_mm_experts_forward, []
    monkeypatch.setattr(
        fused,
        "grouped_mm_experts_forward",
        lambda *given: many.append(len(given[1])) or library(*given),
    )
    for tokens in (1, 4, 5, 9):
        generator = torch.Generator().manual_seed(tokens)
        hidden = torch.randn(tokens, 32, generator=generator)
        weights, index = torch.rand(tokens, 16, generator=generator).topk(2)
        found = fused.chosen_experts(module, hidden, index, weights)
        torch.testing.assert_close(found, library(module, hidden, index, weights))
    assert many == [5, 9]


def test_a_capture_inside_a_timed_call_is_refused(model, monkeypatch):
    monkeypatch.setattr(graph.GraphStack, "_fits", lambda *_: False)
    with pytest.raises(RuntimeError, match="captured or compiled inside a timed call"):
        latency.arm(model, stack="graph", context=40, new_tokens=60, repeats=1, seed=0, env_id="e")


def test_a_sweep_over_stacks_writes_gate_times_and_errors(model, tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    common = {
        "contexts": [8, 40],
        "new_tokens": [4, 6],
        "repeats": 2,
        "slope_repeats": 1,
        "busy_tokens": 1,
        "harness_pairs": 2,
        "seed": 0,
        "env_id": "e",
        "records_path": path,
    }
    rows = stacks.sweep(model, stacks=["hf-eager", "graph"], **common)
    assert store.load(path) == rows
    kinds = [(r.kind, r.key["stack"], r.key["context"]) for r in rows]
    assert kinds.count(("gate", "graph", 8)) == 1 and ("gate", "hf-eager", 8) not in kinds
    assert [k for k in kinds if k[0] == "harness"] == [("harness", "graph", 40)]
    assert kinds.count(("latency", "graph", 40)) == 3 and kinds.count(("busy", "hf-eager", 8)) == 1
    monkeypatch.setattr(graph.HeldLayer, "fill", lambda *_: None)
    failed = stacks.sweep(model, stacks=["graph"], **common)
    assert [r.kind for r in failed] == ["latency", "latency"]
    assert all("GateError" in r.error and not r.samples for r in failed)
