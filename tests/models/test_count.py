"""The card against the library, one tiny model of each kind: what a real forward pass leaves in
the cache, to the byte, and which parameters one token uses."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from lib.measure.memory import bytes_alive
from lib.models import load

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROUTED = {
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
WINDOW = {"sliding_window": 16}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Elements that a token adds to one layer: keys and values of 2 heads of 8, or 16 + 8 latents.
HEADS, LATENTS = 2 * 2 * 8, 16 + 8
# model type -> what differs from SMALL, elements of a token in a layer, layers that slide
KINDS = {
    "llama": ({}, HEADS, 0),
    "qwen3": ({}, HEADS, 0),
    "phi3": ({}, HEADS, 0),  # one matrix makes queries, keys and values
    "stablelm": ({}, HEADS, 0),
    "mistral": (WINDOW, HEADS, 4),
    "starcoder2": (WINDOW, HEADS, 4),
    "gemma2": (WINDOW, HEADS, 2),  # every second layer
    "gemma3_text": (WINDOW, HEADS, 4),  # every sixth is full: none of four
    "cohere2": (WINDOW, HEADS, 3),  # every fourth is full
    "gpt_oss": (WINDOW | FOUR, HEADS, 2),
    "mixtral": (FOUR, HEADS, 0),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, HEADS, 0),
    "qwen2_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16}, HEADS, 0),
    "glm4_moe": (ROUTED | {"n_group": 1}, HEADS, 0),
    "deepseek_v2": (ROUTED | LATENT | {"n_group": 1}, LATENTS, 0),
    "deepseek_v3": (ROUTED | LATENT | {"n_group": 2}, LATENTS, 0),
}  # fmt: skip
CAPACITY, WIDTH = 40, 16


def config_of(kind):
    return AutoConfig.for_model(kind, **(SMALL | KINDS[kind][0]))


@pytest.fixture(params=KINDS)
def net(request):
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config_of(request.param), dtype=torch.bfloat16).eval()
    net.kind = request.param
    return net


def filled(net, cache, tokens):
    """The cache after a prompt and one more token, `tokens` in all."""
    ids = torch.randint(3, 60, (1, tokens - 1))
    with torch.no_grad():
        net(ids, past_key_values=cache, use_cache=True)
        net(ids[:, :1], past_key_values=cache, use_cache=True)
    return cache


def test_the_cache_holds_what_the_card_computes_to_the_byte(net):
    """Below the window and beyond it; a dynamic sliding layer holds one token less than it."""
    _, elements, sliding = KINDS[net.kind]
    card = load.card(net.config)
    for tokens in (8, 30):
        cache = filled(net, DynamicCache(config=net.config), tokens)
        layers = (4 - sliding) * tokens + sliding * min(tokens, WIDTH - 1)
        assert bytes_alive.cache_bytes(cache) == 2 * elements * layers
        assert bytes_alive.card_bytes(card, cache, tokens) == bytes_alive.cache_bytes(cache)


def test_a_static_cache_holds_its_capacity_from_the_first_token(net):
    _, elements, sliding = KINDS[net.kind]
    card = load.card(net.config)
    cache = filled(net, StaticCache(config=net.config, max_cache_len=CAPACITY), 8)
    layers = (4 - sliding) * CAPACITY + sliding * WIDTH
    assert bytes_alive.is_static(cache)
    assert bytes_alive.cache_bytes(cache) == 2 * elements * layers
    assert card.kv_bytes(CAPACITY, cache="static") == bytes_alive.cache_bytes(cache)
    assert bytes_alive.card_bytes(card, cache, 8) == bytes_alive.cache_bytes(cache)


def test_active_parameters_counted_by_name(net):
    """Everything but the table of the input, unless it is the output too, and half the experts."""
    tied = net.get_output_embeddings().weight is net.get_input_embeddings().weight
    active = total = 0
    for name, parameter in net.named_parameters():
        total += parameter.numel()
        if "embed_tokens" in name and not tied:
            continue
        share = 2 if ".experts." in name else 1
        active += parameter.numel() // share
    card = load.card(net.config)
    assert (card.total_params, card.active_params) == (total, active)
    assert bytes_alive.weight_bytes(net) == card.weight_bytes == 2 * total
    assert bool(card.experts) == (active < total - (0 if tied else 64 * 32))
