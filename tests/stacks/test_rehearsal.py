"""Stacks and architectures: what runs computes what generate() computes, and what cannot run says
so beforehand and leaves the net as it was."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.stacks import fused, graph, registry, rehearsal
from lib.stacks.generate import compiled_graphs
from lib.stacks.stack import StackError
from tools import sweep, tiny

PROMPT = torch.randint(5, 90, (1, 9), generator=torch.Generator().manual_seed(3))
SMOLLM3 = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def net_of(model_type, **changes):
    return sweep.net_of(tiny.fields(model_type) | changes)


def patched(net):
    return [path for path, module in net.named_modules() if "forward" in vars(module)]


# What a stack is compared with


@pytest.mark.parametrize("model_type", ["mamba", "bamba", "rwkv", "recurrent_gemma", "llama"])
def test_the_reference_computes_what_generate_computes(model_type):
    net = net_of(model_type)
    right = sweep.generated(net, PROMPT, 6)
    expected = torch.stack(right.logits, 1)[:, 1:]
    found = registry.open_stack("hf-eager", net).forced_logits(PROMPT, right.sequences[:, 9:14])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_forced_continuation_need_not_be_the_greedy_one():
    """Each step's logits are those of a forward pass over all tokens before."""
    net = net_of("llama")
    tokens = torch.tensor([[7, 80, 11]])
    found = registry.open_stack("hf-eager", net).forced_logits(PROMPT, tokens)
    with torch.no_grad():
        whole = net(torch.cat([PROMPT, tokens], 1), use_cache=False).logits[:, 9:]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


# Layers of one type that are not alike


@pytest.mark.parametrize("rotated", [[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]])
def test_layers_that_differ_in_an_attribute_do_not_share_a_function(rotated):
    net = sweep.net_of({**SMOLLM3, "model_type": "smollm3", "no_rope_layers": rotated})
    stacks = [registry.open_stack(name, net) for name in ("hf-eager", "graph-compiled")]
    tokens = torch.randint(5, 90, (1, 5))
    expected, found = (stack.forced_logits(PROMPT, tokens) for stack in stacks)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    kinds = {fused._makeup(layer) for layer in net.get_decoder().layers}
    assert len(kinds) == len(set(rotated))


def test_layers_alike_share_one_function():
    net = net_of("llama")
    assert len({fused._makeup(layer) for layer in net.get_decoder().layers}) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
@pytest.mark.skipif(" " in torch.__file__, reason="torch hands g++ its folder unquoted")
def test_one_compilation_serves_layers_that_are_alike():
    """And no break in it: the layers' code is one graph."""
    net = net_of("llama")
    tokens = torch.randint(5, 90, (1, 3))
    expected = registry.open_stack("hf-eager", net).forced_logits(PROMPT, tokens)
    before = compiled_graphs()
    stack = graph.GraphStack(net, around=fused.Layers(net, compiled=True))
    found = stack.forced_logits(PROMPT, tokens)
    assert compiled_graphs() - before == 1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Layer(torch.nn.Module):
    """A layer with an attribute, a buffer, and an index that its code may ask for."""

    def __init__(self, number, *, index=0, buffer=1.0):
        super().__init__()
        self.number, self.layer_idx = number, index
        self.register_buffer("scale", torch.tensor([buffer]), persistent=False)

    def forward(self, hidden, past):
        return past.update(hidden, hidden, self.layer_idx)[0] * self.number * self.scale


class Numbered(Layer):
    def forward(self, hidden, past):
        return hidden / (self.layer_idx + 1)


def test_which_layer_it_is_counts_where_the_code_asks_for_it():
    assert fused._makeup(Layer(2, index=0)) == fused._makeup(Layer(2, index=1))
    assert fused._makeup(Layer(2)) != fused._makeup(Layer(3))
    assert fused._makeup(Numbered(2, index=0)) != fused._makeup(Numbered(2, index=1))


def test_buffers_are_each_layers_own():
    """They go along with the weights, not with the code that layers share."""
    held = SimpleNamespace(keys=torch.zeros(1, 1, 4, 2), values=torch.zeros(1, 1, 4, 2), slot=None)
    first, second = Layer(1, buffer=2.0), Layer(1, buffer=5.0)
    seen = []

    def call(weights, *given):
        seen.append(weights["scale"].item())

    for layer in (first, second):
        held.is_sliding = True
        fused._forward(call, layer, held, torch.zeros(1, 1, 2), graph.Cache(layers=[]))
    assert seen == [2.0, 5.0]


# What a stack cannot run


@pytest.mark.parametrize(
    ("stack", "model_type", "reason"),
    [
        (
            "graph",
            "bloom",
            "does not take what this stack hands to it .at `batch_size, seq_length =",
        ),
        (
            "graph",
            "xglm",
            "looks at a value that is on the GPU .at `if max_pos > self.weights.size",
        ),
        ("graph", "mamba", "a cache of LinearAttentionLayer cannot be captured"),
        ("graph", "openai-gpt", "does not keep keys and values in every layer of the cache"),
        ("graph", "dbrx", "experts 'loop' look on the host which experts were chosen"),
        (
            "graph-compiled",
            "gemma2",
            "attention with capped logits is not fused here; use ",
        ),
        ("graph-compiled", "gemma3n_text", "4 layers keep keys and values in 2 places"),
        (
            "hf-static",
            "rwkv",
            "keeps a cache of its own, and the library has no static form of it; use hf-eager",
        ),
        (
            "hf-static",
            "openai-gpt",
            "takes no cache: every step reads the whole sequence; use hf-eager",
        ),
        ("hf-static", "deepseek_v4", "KeyError, 'heavily_compressed_attention'"),
    ],
)
def test_what_cannot_run_says_why_and_changes_nothing(stack, model_type, reason):
    net = net_of(model_type)
    before = registry.open_stack("hf-eager", net)(PROMPT, 4).tokens
    opened = registry.open_stack(stack, net)
    for attempt in (
        lambda: opened(PROMPT, 4),
        lambda: opened.forced_logits(PROMPT, PROMPT[:, :2]),
        lambda: registry.require_runs(stack, net),
    ):
        with pytest.raises(
            StackError, match=f"stack '{stack}' cannot run {net.config.model_type}: .*{reason}"
        ):
            attempt()
    assert patched(net) == []
    assert torch.equal(registry.open_stack("hf-eager", net)(PROMPT, 4).tokens, before)


def test_no_weight_is_used_to_find_out(monkeypatch):
    """The net itself does not run: a twin of it does, once."""
    net, ran = net_of("xglm"), []
    forward = type(net).forward

    def watched(self, *args, **kwargs):
        ran.append(next(self.parameters()).is_meta)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(net), "forward", watched)
    for _ in range(2):
        with pytest.raises(StackError, match="looks at a value that is on the GPU"):
            registry.open_stack("graph", net)(PROMPT, 3)
    assert ran == [True, True]  # a prompt and a step


def test_a_failure_while_layers_are_exchanged_leaves_none_of_them(monkeypatch):
    """The third of four layers cannot be prepared."""
    net = net_of("llama")
    layers, made = fused.Layers(net, compiled=False), []

    def function(self, layer, held):
        made.append(layer)
        if len(made) == 3:
            raise KeyError("a compiler that gave up")
        return lambda *_: None

    monkeypatch.setattr(fused.Layers, "_function", function)
    cache = SimpleNamespace(layers=[SimpleNamespace(is_sliding=False)] * 4)
    with pytest.raises(KeyError), layers(net, cache):
        pass
    assert len(made) == 3 and patched(net) == []


def test_an_operation_without_shapes_is_no_reason():
    def rehearse(twin):
        raise RuntimeError("Could not run 'aten::x' with arguments from the 'Meta' backend.")

    rehearsal.require("graph", net_of("llama"), rehearse)


# What runs although it is called otherwise


@pytest.mark.parametrize(
    "model_type",
    [
        "gpt2",  # layers under another name, a cache under another name
        "gpt_neox",  # a cache under another name
        "falcon",  # arguments that are needed and None
        "opt",  # positions from the length of the cache
        "doge",  # a mask by keyword
        "deepseek_v3",  # values narrower than keys
        "roberta",  # positions that generate() gives
        "phi4_multimodal",  # a longer list of layers elsewhere
    ],
)
def test_unusual_layers_run_and_compute_the_same(model_type):
    fields = tiny.fields(model_type)
    for stack in ("graph", "graph-compiled"):
        assert sweep.stack_verdict(stack, fields) == ("exact", "")


def test_values_may_be_narrower_than_keys():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, width, generator=generator)
        for heads, length, width in ((4, 1, 6), (2, 5, 6), (2, 5, 3))
    )
    mask = torch.zeros(1, 1, 1, 5)
    found, _ = fused.attend(torch.nn.Module(), query, key, value, attention_mask=mask)
    assert found.shape == (1, 1, 4, 3)
    by_hand = torch.softmax(query[0, 3, 0] @ key[0, 1].T / 6**0.5, -1) @ value[0, 1]
    torch.testing.assert_close(found[0, 0, 3], by_hand)


def test_a_twin_is_a_net_of_shapes():
    net = net_of("mixtral")
    twin = rehearsal.twin(net)
    assert all(p.is_meta for p in twin.parameters())
    assert [p.shape for p in twin.parameters()] == [p.shape for p in net.parameters()]
    text = twin.config.get_text_config(decoder=True)
    assert text._attn_implementation == net.config._attn_implementation


def test_a_net_made_anew_is_asked_anew():
    """What is known of a net ends with it."""
    config = AutoConfig.for_model(**tiny.fields("llama"))
    asked = []
    for _ in range(2):
        net = AutoModelForCausalLM.from_config(config)
        rehearsal.require("graph", net, asked.append)
        rehearsal.require("graph", net, asked.append)
    assert len(asked) == 2


# Numbers that a recorded step would repeat


@pytest.mark.parametrize("stack", ["graph", "graph-compiled"])
def test_a_place_taken_from_the_length_of_the_keys_is_refused(stack):
    """GPT-Neo cuts the window of its local layers out of a table, from the last key backwards."""
    net = net_of("gpt_neo")
    with pytest.raises(StackError, match=f"{stack}' cannot run gpt_neo: its step takes a place fr"):
        registry.open_stack(stack, net)(PROMPT, 3)
    assert not patched(net)


@pytest.mark.parametrize(
    ("work", "differs"),
    [
        (lambda x: x[:, : x.shape[1]], False),
        (lambda x: x[:, -x.shape[1] :], False),
        (lambda x: x[:, 2:].new_zeros(x.shape), False),
        (lambda x: torch.arange(x.shape[1]), False),
        (lambda x: x * 0.125, False),
        (lambda x: x[:, x.shape[1] - 1 :], True),
        (lambda x: x[:, -1:], True),
        (lambda x: x[:, -1], True),
        (lambda x: x[:, x.shape[1] // 2], True),
        (lambda x: torch.arange(x.shape[1] - 1, x.shape[1]), True),
        (lambda x: x * math.log(x.shape[1]), True),
    ],
)
def test_numbers_that_follow_the_length_are_seen(work, differs):
    seen = []
    for length in (64, 128):
        with rehearsal.Numbers() as numbers:
            work(torch.ones(1, length, device="meta"))
        seen.append(numbers.seen)
    assert (seen[0] != seen[1]) is differs


@pytest.mark.parametrize("window", [5, 100, 500])
def test_windows_of_any_length_are_rehearsed(window):
    """Shorter than the buffers of the rehearsal, between them, and longer."""
    net = net_of("gpt_oss", sliding_window=window)
    assert registry.open_stack("graph", net)(PROMPT, 3).tokens.shape == (1, 3)


@pytest.mark.parametrize("model_type", ["megatron-bert", "doge", "moshi", "rembert", "roformer"])
def test_where_the_library_promises_no_cache_of_fixed_size_it_is_not_used(model_type):
    with pytest.raises(StackError, match="does not offer its compilation for it"):
        registry.open_stack("hf-static", net_of(model_type))(PROMPT, 3)
