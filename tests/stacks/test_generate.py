"""`generate()` as a stack: every call computes what the first call of a fresh net computes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.stacks import registry

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
