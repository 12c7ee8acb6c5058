"""`generate()` as a stack: every call computes what the first call of a fresh net computes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.stacks import registry
from lib.stacks.stack import StackError
from tools import sweep, tiny

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
ROTATIONS = {
    "one for all layers": ("llama", {"rope_parameters": DYNAMIC}),
    "one for each kind of layer": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN},
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def prompt(tokens):
    return torch.randint(3, 97, (1, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.fixture(params=ROTATIONS)
def net(request):
    """Scores of attention that are not nearly even, so that a rotation moves the logits."""
    model_type, fields = ROTATIONS[request.param]
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **SMALL, **fields)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return net.requires_grad_(False)


@pytest.mark.parametrize("tokens", [20, 28, 40])
def test_a_call_after_a_longer_one_computes_what_it_computed_before(net, tokens):
    """Prompts that end before 32 positions, cross them while decoding, and are longer."""
    stack, ids, continuation = registry.open_stack("hf-eager", net), prompt(tokens), prompt(8)
    first = stack.forced_logits(ids, continuation)
    generated = stack(ids, 8).tokens
    stack(prompt(60), 8)
    assert torch.equal(stack.forced_logits(ids, continuation), first)
    assert torch.equal(stack(ids, 8).tokens, generated)


def test_frequencies_follow_the_length(net):
    """Past the 32 positions a call computes other logits than those of the first frequencies."""
    ids, continuation = prompt(40), prompt(8)
    dynamic = registry.open_stack("hf-eager", net).forced_logits(ids, continuation)
    for module in net.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            module.original_max_seq_len = 1000
    fixed = registry.open_stack("hf-eager", net).forced_logits(ids, continuation)
    assert not torch.allclose(dynamic, fixed, atol=1e-3)


def test_a_cache_of_fixed_size_gives_the_same_logits_after_the_reference(net):
    ids, continuation = prompt(40), prompt(8)
    reference = registry.open_stack("hf-eager", net).forced_logits(ids, continuation)
    static = registry.open_stack("hf-static", net).forced_logits(ids, continuation)
    torch.testing.assert_close(static, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (tiny.fields("blt"), "run blt as configured (AttributeError: 'BltConfig' object has no"),
        (tiny.fields("gpt_oss") | {"num_key_value_heads": 8}, "run gpt_oss as configured (Runtime"),
    ],
)
@pytest.mark.parametrize("forced", [True, False])
def test_what_generate_cannot_run_is_said_in_one_line(fields, reason, forced):
    stack = registry.open_stack("hf-eager", sweep.net_of(fields))
    with pytest.raises(StackError) as error:
        stack.forced_logits(prompt(5) % 90, prompt(2)) if forced else stack(prompt(5) % 90, 2)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_stack_that_has_worked_is_not_to_blame(net, monkeypatch):
    stack = registry.open_stack("hf-eager", net)
    stack(prompt(5), 2)
    monkeypatch.setattr(net, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stack(prompt(5), 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, MemoryError])
def test_a_machine_without_room_is_no_fault_of_the_net(net, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(net, "generate", fail)
    with pytest.raises(error):
        registry.open_stack("hf-eager", net)(prompt(5), 2)
