"""Compiled layers share code only where they are alike, and a failure leaves the net as it was."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.stacks import fused, graph, registry

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0,
)  # fmt: skip


def build(model_type="llama", **changes):
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)  # so that attention is far from even
    return net.requires_grad_(False)


def off(net):
    """How far the compiled layers are from `generate()`, on a CPU without the compiler."""
    ids = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(0))
    reference = registry.open_stack("hf-eager", net)
    continuation = reference(ids, 5).tokens
    expected = reference.forced_logits(ids, continuation)
    found = registry.open_stack("graph-compiled", net).forced_logits(ids, continuation)
    return float((found - expected).norm() / expected.norm())


class Odd(torch.nn.Module):
    """A block that does something else depending on what it holds, in a way that a key by shapes
    does not see."""

    def __init__(self, inner, held=1.0):
        super().__init__()
        self.inner, self.held, self.layer_idx = inner, held, 0
        self.table = {"factors": [1.0, 1.0]}
        self.change = abs
        self.config = copy.deepcopy(inner.config)
        self.register_buffer("gain", torch.ones(1), persistent=False)
        self.beside = torch.ones(1)

    def factor(self):
        return 2.0 if self.layer_idx == 2 else 1.0

    def forward(self, hidden):
        scale = self.held * self.table["factors"][1] * self.change(1) * self.factor()
        if getattr(self.config, "doubled", False):
            scale = 2 * scale
        return self.inner(hidden) * scale * self.gain * self.beside


class Doubled(torch.nn.Module):
    def forward(self, hidden):
        return 2 * torch.nn.functional.silu(hidden)


def doubled(factor):
    return lambda number: factor * abs(number)


CHANGES = {
    "a number": lambda layer: setattr(layer.mlp, "held", 2.0),
    "a number deep inside": lambda layer: layer.mlp.table["factors"].__setitem__(1, 2.0),
    "a function with its own number": lambda layer: setattr(layer.mlp, "change", doubled(2)),
    "a partial": lambda layer: setattr(layer.mlp, "change", partial(lambda a, b: a * b, 3)),
    "a flag of the configuration": lambda layer: setattr(layer.mlp.config, "doubled", True),
    "a buffer": lambda layer: layer.mlp.gain.mul_(2),
    "a tensor that is no buffer": lambda layer: setattr(layer.mlp, "beside", torch.ones(1) * 2),
    "which layer it is": lambda layer: setattr(layer.mlp, "layer_idx", 2),
    "another kind of module": lambda layer: setattr(layer.mlp.inner, "act_fn", Doubled()),
    "a module left out": lambda layer: setattr(layer.mlp.inner, "act_fn", torch.nn.Identity()),
    "a scale of attention": lambda layer: setattr(layer.self_attn, "scaling", 2.0),
    "another width": lambda layer: setattr(layer.mlp, "gain", torch.full((1, 32), 2.0)),
    "a hook on a part": lambda layer: layer.mlp.register_forward_hook(lambda m, a, out: 2 * out),
    "a hook on the layer": lambda layer: layer.register_forward_hook(lambda m, a, out: 2 * out),
    "a part's own forward": lambda layer: setattr(
        layer.mlp, "forward", partial(Odd.forward, Odd(layer.mlp.inner, 2.0))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", [0, 1])
def test_layers_that_differ_share_no_code(change, first):
    """Whichever layer comes first; all but the named one are alike."""
    net = build()
    for layer in net.get_decoder().layers:
        layer.mlp = Odd(layer.mlp)
    alike = off(net)
    before = registry.open_stack("hf-eager", net)(torch.arange(5, 15)[None], 1).tokens
    CHANGES[change](net.get_decoder().layers[first])
    assert before.shape == (1, 1) and alike < 1e-5
    assert off(net) < 1e-5


@pytest.mark.parametrize("pattern", [[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]])
def test_layers_without_a_rotation_are_not_rotated(pattern):
    assert off(build("smollm3", no_rope_layers=pattern)) < 1e-5


def test_layers_that_are_alike_share_one_function():
    """One compilation for all of them, and one for each kind where there are two."""
    for pattern, kinds in (([1, 1, 1, 1], 1), ([1, 1, 1, 0], 2)):
        layers = build("smollm3", no_rope_layers=pattern).get_decoder().layers
        assert len({fused._makeup(layer) for layer in layers}) == kinds


def test_an_object_of_a_net_that_is_gone_is_not_taken_for_another():
    """Python gives the id of what was let go to what comes next."""
    kept = fused._plain(torch.ones(1))
    assert all(fused._plain(torch.ones(1)) != kept for _ in range(20))
    assert fused._plain(float("nan")) == fused._plain(float("nan"))


def untouched(net):
    return [{n: v for n, v in vars(m).items() if n in ("forward", "config")} for m in net.modules()]


class Interrupt(BaseException):
    pass


FAILURES = {
    "a layer that cannot be copied": lambda patch: patch.setattr(fused, "_template", _fails(2)),
    "a compiler that fails": lambda patch: patch.setattr(torch, "compile", _fails(2)),
    "a step that fails": lambda patch: patch.setattr(fused, "_run", _fails(1)),
    "a key that cannot be made": lambda patch: patch.setattr(fused, "_makeup", _fails(3)),
    "a capture that fails": lambda patch: patch.setattr(graph, "record", _fails(1)),
    "an interrupt": lambda patch: patch.setattr(fused, "_template", _fails(2, Interrupt)),
}


def _fails(at, error=RuntimeError):
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) >= at:
            raise error("planted")
        return SimpleNamespace()

    return fail


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("own", [False, True])
def test_a_stack_that_cannot_be_made_leaves_the_net_as_it_was(monkeypatch, failure, own):
    """Also where a layer had a forward of its own."""
    net, ids = build("smollm3"), torch.arange(5, 15)[None]
    if own:
        layer = net.get_decoder().layers[1]
        layer.forward = partial(type(layer).forward, layer)
    before, tokens = untouched(net), registry.open_stack("hf-eager", net)(ids, 4).tokens
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_FUNCTIONS", {})
        FAILURES[failure](patch)
        around = fused.Layers(net, compiled="compiler" in failure)
        stack = graph.GraphStack(net, around=around)
        for _ in range(2):  # what failed is not ready the next time
            with pytest.raises((RuntimeError, Interrupt, TypeError)):
                stack(ids, 4)
    assert all(
        a.keys() == b.keys() and all(a[n] is b[n] for n in a)
        for a, b in zip(untouched(net), before, strict=True)
    )
    for name in ("hf-eager", "graph", "graph-compiled"):
        assert registry.open_stack(name, net)(ids, 4).tokens.tolist() == tokens.tolist()


def test_a_cache_with_fewer_places_than_layers_says_so_and_leaves_the_net():
    net = build(
        "gemma3n_text", vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        sliding_window=8, laurel_rank=4, num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    ids = torch.arange(5, 15)[None]
    with pytest.raises(ValueError, match="use the stack graph"):
        registry.open_stack("graph-compiled", net)(ids, 4)
    assert not any("forward" in vars(layer) for layer in net.get_decoder().layers)
    assert registry.open_stack("hf-eager", net)(ids, 4).tokens.shape == (1, 4)
