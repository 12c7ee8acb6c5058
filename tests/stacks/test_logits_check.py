"""The correctness gate: what it lets pass, and planted defects that it must stop."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.hardware.device import open_device
from lib.models import experts, load
from lib.stacks import fused, generate, graph, layer_check, logits_check, registry


@pytest.fixture(scope="module")
def model():
    return load.load("tiny-gpt-oss", dtype="float32", device=open_device("cpu"))


@pytest.fixture(scope="module")
def rounded():
    """The same in the number format that studies use, where rounding hides more."""
    return load.load("tiny-gpt-oss", dtype="bfloat16", device=open_device("cpu"))


def test_the_gate_lets_a_right_stack_pass(model):
    row = logits_check.row(model, stack="graph", context=40, seed=0, env_id="e", steps=6)
    assert row.kind == "gate" and row.key["stack"] == "graph" and row.key["cache"] == "static"
    assert len(row.samples["relative_error"]) == 6
    assert row.values["max_error"] < 1e-5 and row.values["same_choice"] == 1.0


def test_the_gate_of_a_batch_takes_its_floor_from_the_halves(model, monkeypatch):
    """A doubled batch might not fit where the batch itself does."""
    sizes, forced = [], generate.GenerateStack.forced_logits
    monkeypatch.setattr(
        generate.GenerateStack,
        "forced_logits",
        lambda stack, ids, continuation: sizes.append(len(ids)) or forced(stack, ids, continuation),
    )
    for batch in (1, 3):
        row = logits_check.row(
            model, stack="graph-compiled", context=40, seed=0, env_id="e", steps=4, batch=batch
        )
        assert row.key["batch"] == batch and row.values["max_error"] < 1e-5
        assert row.values["floor_error"] < 1e-5
    # of logits: the batch and its halves; of layers: which run once, how even scores are, and
    # they themselves, pinned; then which run once, and they themselves, free
    assert sizes == [1, 2, *[1] * 5] + [3, 2, 1, *[3] * 5]


def looks(monkeypatch, *found):
    """The gate sees these, one after another; returns what it asked for: at logits or layers, seed,
    steps, pinned experts, and whether routers chose freely."""
    asked, left = [], list(found)

    def sees(what):
        def look(model, **arguments):
            names = ("seed", "steps", "pins", "turns")
            asked.append((what, *(arguments.get(name, 0) for name in names)))
            return left.pop(0)

        return look

    monkeypatch.setattr(logits_check, "look", sees("logits"))
    monkeypatch.setattr(logits_check, "look_at_layers", sees("layers"))
    return asked


RIGHT_LAYERS = logits_check.LayerLook([0.01] * 4, 0.03, "", 1.0, worst=True)


def test_turned_experts_in_some_steps_are_no_alarm(model, monkeypatch):
    """As on an H100 with gpt-oss-20b: a router nearly tied, in the reference against itself too.
    By medians, 0.19 against three times 0.04 would be an alarm."""
    itself = [0.02, 0.02, 0.3, 0.06, 0.02, 0.25, 0.1, 0.02]  # mean 0.09875, median 0.04
    stack = [0.026, 0.183, 0.029, 0.154, 0.2, 0.233, 0.2, 0.526]  # mean 0.193875, median 0.1915
    found = looked(monkeypatch, model, [stack], [itself], turns=True)
    assert found.floor == pytest.approx(0.09875) and found.errors == pytest.approx(stack)
    assert found.allowed == pytest.approx(3 * 0.09875) and found.passed
    assert not logits_check.Look([0.5] * 8, found.floor, found.allowed, 0.0).passed
    assert not logits_check.Look([float("nan")] * 8, found.floor, found.allowed, 0.0).passed


def looked(monkeypatch, model, stack, itself, *, turns):
    """A look that found these errors (batch, steps), of the stack and of the reference."""
    left = [torch.tensor(stack), torch.tensor(itself)]
    monkeypatch.setattr(logits_check, "relative_errors", lambda found, reference: left.pop(0))
    return logits_check.look(
        model, stack="graph", context=40, seed=0, batch=len(stack), steps=8, turns=turns
    )


def test_of_a_batch_the_worst_counts_unless_routers_turn(model, monkeypatch):
    """One sequence of four in which they do: 0.4 among 0.02."""
    stack, itself = [[0.02], [0.4], [0.02], [0.04]], [[0.01], [0.01], [0.05], [0.01]]
    found = looked(monkeypatch, model, stack, itself, turns=False)
    assert found.errors == pytest.approx([0.4]) and found.floor == pytest.approx(0.05)
    found = looked(monkeypatch, model, stack, itself, turns=True)
    assert found.errors == pytest.approx([0.12]) and found.floor == pytest.approx(0.02)


def test_no_floor_allows_logits_that_have_nothing_in_common(model, monkeypatch):
    found = looked(monkeypatch, model, [[0.71]], [[0.5]], turns=True)  # three floors are 1.5
    assert found.allowed == pytest.approx(0.5**0.5) and not found.passed


def test_no_floor_allows_more_than_a_tenth_where_no_choice_turns(model, monkeypatch):
    found = looked(monkeypatch, model, [[0.101]], [[0.5]], turns=False)
    assert found.allowed == 0.10 and not found.passed


def test_an_alarm_by_chance_is_checked_on_another_prompt(model, monkeypatch):
    pinned = logits_check.Look([0.02] * 4, 0.01, 0.0765, 1.0)
    alarm = logits_check.Look([0.18] * 4, 0.0255, 0.0765, 0.5)
    free = logits_check.LayerLook([0.02] * 4, 0.03, "", 1.0, worst=False)
    asked = looks(monkeypatch, alarm, pinned, RIGHT_LAYERS, free)
    row = logits_check.row(model, stack="graph", context=40, seed=3, env_id="e", steps=4)
    assert asked == [
        ("logits", 3, 4, 2, 0), ("logits", 4, 16, 2, 0), ("layers", 3, 4, 2, 0),
        ("layers", 3, 4, 0, True),
    ]  # fmt: skip
    assert row.key["new_tokens"] == 4 and row.samples["alarm_error"] == [0.18] * 4
    assert row.values["mean_error"] == pytest.approx(0.02) and row.values["allowed_error"] == 0.0765
    assert row.values["layer_max_error"] == 0.01 and row.values["layer_allowed_error"] == 0.03
    assert row.values["free_mean_error"] == pytest.approx(0.02)
    assert row.values["pinned_experts"] == 2 and row.samples["layer_error"] == [0.01] * 4
    (warning,) = row.warnings
    assert warning["code"] == "gate_repeated" and "18.00% of their norm" in warning["text"]


WRONG = {
    "logits": lambda: [logits_check.Look([0.18] * 4, 0.0255, 0.0765, 0.5)] * 2,
    "one layer": lambda: [
        logits_check.Look([0.02] * 4, 0.01, 0.0765, 1.0),
        *[logits_check.LayerLook([0.01, 0.2, 0.01, 0.01], 0.03, "", 1.0, worst=True)] * 2,
    ],
    "free routers": lambda: [
        logits_check.Look([0.02] * 4, 0.01, 0.0765, 1.0),
        RIGHT_LAYERS,
        *[logits_check.LayerLook([0.2] * 4, 0.03, logits_check.FREELY, 1.0, worst=False)] * 2,
    ],
    "no number": lambda: [logits_check.Look([float("nan")] * 4, 0.01, 0.0765, 1.0)] * 2,
    "no number in a layer": lambda: [
        logits_check.Look([0.02] * 4, 0.01, 0.0765, 1.0),
        *[logits_check.LayerLook([0.01, float("nan")], 0.03, "", 1.0, worst=True)] * 2,
    ],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_alarm_that_repeats_stops_the_stack(model, monkeypatch, wrong):
    looks(monkeypatch, *WRONG[wrong]())
    with pytest.raises(logits_check.GateError, match=r"differs? by .* and on another prompt .*by"):
        logits_check.row(model, stack="graph", context=40, seed=3, env_id="e", steps=4)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-gpt-oss"])
def test_a_dense_model_and_routers_that_cannot_be_pinned_are_judged_by_small_tolerances(
    name, monkeypatch
):
    loaded = load.load(name, dtype="float32", device=open_device("cpu"))
    monkeypatch.setattr(experts, "routers", lambda net: [])
    asked = looks(monkeypatch, logits_check.Look([0.0], 0.0, 0.1, 1.0), RIGHT_LAYERS)
    row = logits_check.row(loaded, stack="graph", context=40, seed=3, env_id="e", steps=4)
    assert asked == [("logits", 3, 4, 0, 0), ("layers", 3, 4, 0, 0)]
    assert row.values["pinned_experts"] == 0 and "free_mean_error" not in row.values


def test_a_pinned_router_chooses_the_same_experts_for_all_tokens(model):
    """With the weights that its own logits give them, and as it was afterwards."""
    router = model.net.get_decoder().layers[0].mlp.router
    generator = torch.Generator().manual_seed(0)
    kind, hidden = type(router), torch.randn(20, router.weight.shape[1], generator=generator)
    before = router.bias.clone()
    free = router(hidden)[2]
    assert len(set(free.flatten().tolist())) == 8  # of 8 experts, 2 for a token
    chosen = {}
    for seed in (0, 1):
        with experts.pinned(model.net, 2, seed=seed):
            _, weights, index = router(hidden)
        (chosen[seed],) = set(map(frozenset, index.tolist()))
        own = torch.nn.functional.linear(hidden, router.weight, before).gather(1, index)
        torch.testing.assert_close(weights, own.softmax(-1))
    assert chosen[0] != chosen[1]
    with pytest.raises(KeyError), experts.pinned(model.net, 2, seed=0):
        raise KeyError
    assert type(router) is kind and torch.equal(router.bias, before)
    assert not any("bars" in name for name, _ in model.net.named_buffers())


ROUTED = dict(
    hidden_size=32, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=97, pad_token_id=0,
    num_experts=8, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
LATENT = dict(
    n_routed_experts=8, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=8, num_key_value_heads=4, n_group=1, topk_group=1, first_k_dense_replace=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "more"),
    [("gpt_oss", {}), ("mixtral", {}), ("qwen3_moe", {}), ("olmoe", {}), ("deepseek_v3", LATENT)],
)
def test_each_sequence_is_pinned_to_experts_of_its_own(monkeypatch, model_type, more):
    """Whatever the router: with a bias or without, by softmax or sigmoid, in prefill and decode."""
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**ROUTED, **more}), dtype=torch.float32
    ).eval()
    for router in experts.routers(net):
        torch.nn.init.normal_(router.weight)
    used = []
    for path, module in net.named_modules():
        if path.endswith(".experts"):
            module.register_forward_pre_hook(lambda m, a: used.append(a[1].reshape(3, -1)))
    ids = torch.arange(5, 35).reshape(3, 10)
    stack = registry.open_stack("hf-eager", net)
    with torch.no_grad(), experts.pinned(net, 2, seed=1, sequences=range(3)):
        stack.forced_logits(ids, ids[:, :2])
    assert len(used) == 2 * 3  # layers, prefill and two steps
    for number, chosen in enumerate(used):
        sets = [set(row.tolist()) for row in chosen]
        layer = number % 2
        expected = [experts.pins(8, 2, seed=1, layer=layer, sequence=n) for n in range(3)]
        assert sets == [set(pins) for pins in expected]
        assert not (sets[0] & sets[1] or sets[1] & sets[2] or sets[0] & sets[2])


def test_all_experts_have_their_turn_before_one_comes_again():
    chosen = [experts.pins(32, 4, seed=0, layer=3, sequence=n) for n in range(16)]
    assert sorted(e for pins in chosen[:8] for e in pins) == list(range(32))
    assert sorted(e for pins in chosen[8:] for e in pins) == list(range(32))
    assert len({tuple(pins) for pins in chosen}) == 16
    assert experts.pins(32, 4, seed=0, layer=4, sequence=0) != chosen[0]


def planted(monkeypatch, defect):
    start, fill, chosen = graph.Step.start, graph.HeldLayer.fill, fused.chosen_experts
    if defect == "position":  # one off, as a captured counter easily is
        monkeypatch.setattr(
            graph.Step,
            "start",
            lambda step, cache, tokens, first: start(step, cache, tokens + 1, first),
        )
    if defect == "cache":  # the prompt is lost
        monkeypatch.setattr(graph.HeldLayer, "fill", lambda *_: None)
    if defect == "window":  # a sliding layer keeps its oldest tokens
        monkeypatch.setattr(
            graph.HeldLayer,
            "fill",
            lambda layer, source, tokens: fill(layer, source, tokens + 3 * layer.is_sliding),
        )
    if defect == "row":  # every sequence of a batch gets the experts of the first one
        monkeypatch.setitem(
            fused.ALL_EXPERTS_FUNCTIONS._global_mapping,
            fused.EXPERTS,
            lambda self, hidden, index, weights: chosen(
                self, hidden, index[:1].expand_as(index), weights
            ),
        )
    if defect == "weights":  # the second expert's weight is the first one's and the other way round
        monkeypatch.setitem(
            fused.ALL_EXPERTS_FUNCTIONS._global_mapping,
            fused.EXPERTS,
            lambda self, hidden, index, weights: chosen(self, hidden, index, weights.flip(-1)),
        )


DEFECTS = {  # with the stack and the batch that show them
    "position": ("graph", 1), "cache": ("graph", 1), "window": ("graph", 1),
    "row": ("graph-compiled", 4), "weights": ("graph-compiled", 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_gate_stops_a_wrong_stack(request, monkeypatch, defect, dtype):
    tested = request.getfixturevalue({"float32": "model", "bfloat16": "rounded"}[dtype])
    stack, batch = DEFECTS[defect]
    common = {"stack": stack, "context": 40, "seed": 0, "env_id": "e", "steps": 6, "batch": batch}
    logits_check.row(tested, **common)  # without the defect
    planted(monkeypatch, defect)
    with pytest.raises(logits_check.GateError, match="computes something else"):
        logits_check.row(tested, **common)


def test_experts_that_are_not_pinned_are_tested_by_free_routers(model, monkeypatch):
    """Expert 7 is computed as expert 6; no layer is pinned to 7."""
    common = {"stack": "graph-compiled", "context": 40, "steps": 8, "batch": 1}
    seed = next(n for n in range(100) if not chosen_anywhere(model, 7, seed=n))
    right = fused.chosen_experts
    monkeypatch.setitem(
        fused.ALL_EXPERTS_FUNCTIONS._global_mapping,
        fused.EXPERTS,
        lambda self, hidden, index, weights: right(self, hidden, index.clamp(max=6), weights),
    )
    common |= {"seed": seed}
    for look in (logits_check.look, logits_check.look_at_layers):
        assert look(model, **common, pins=2).passed
        assert not look(model, **common, turns=True).passed


def chosen_anywhere(model, expert, *, seed):
    layers = range(model.card.layers)
    return any(expert in experts.pins(8, 2, seed=seed, layer=n, sequence=0) for n in layers)


def test_a_layer_in_two_places_has_no_input_of_its_own():
    class Stack:
        def forced_logits(self, ids, continuation):
            for tokens in (ids.shape[1], *[1] * continuation.shape[1]):
                for layer in (twice, once, twice):
                    layer(torch.ones(1, tokens, 2))

    twice, once, never = (torch.nn.Identity() for _ in range(3))
    ids = torch.arange(5, 15)[None]
    found = layer_check.once_a_token([twice, once, never], Stack(), ids, ids[:, :2])
    assert len(found) == 1 and found[0] is once


def test_the_error_of_a_layer_by_hand():
    """It adds (3, 4) to (1, 1); found are half of a unit more in one place, and a last place."""
    place = 2**-23 * 4  # of a float32 from 4 up to 8
    before, expected = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[4.0, 5.0]]])
    seen = layer_check.Seen([[before]], [[expected]])
    for change, error in (
        ([0.5, 0.0], 0.1),
        ([0.0, place], 0.0),
        ([0.0, 3 * place], 2 * place / 5),
    ):
        found = layer_check.Seen([[before]], [[expected + torch.tensor(change)]])
        assert layer_check.errors(found, seen).item() == pytest.approx(error, rel=1e-5)
    lost = layer_check.Seen([[before]], [[expected * float("nan")]])
    assert layer_check.errors(lost, seen).isnan().all()


def test_the_error_of_the_gate_by_hand():
    reference = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])  # norms 5 and 2
    found = torch.tensor([[[3.0, 4.5], [1.0, 2.0]]])  # differences 0.5 and 1
    assert logits_check.relative_errors(found, reference).tolist() == [pytest.approx([0.1, 0.5])]


def test_the_tolerance_grows_like_a_random_walk():
    assert logits_check.tolerance("bfloat16", 64) == pytest.approx(
        32 * 2**-8
    )  # sqrt(16 * 64) roundings
    assert logits_check.tolerance("float32", 4) == logits_check.LEAST
