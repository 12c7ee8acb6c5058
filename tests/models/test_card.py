"""The model card: counts against hand arithmetic, and cache sizes against the library's caches."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Qwen2MoeConfig,
    StaticCache,
)

from lib import files
from lib.hardware.device import open_device
from lib.models import count, entries, load
from lib.models.card import ModelCard, ModelError, require_context

TINY = ("tiny-gpt-oss", "tiny-qwen3", "tiny-yi")
REAL = {  # billions of parameters: total, active
    "gpt-oss-20b": (20.915, 3.61),
    "gpt-oss-120b": (116.829, 5.13),
    "Qwen3-32B": (32.762, 31.98),
    "Yi-34B": (34.389, 33.93),
}
LLAMA = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK = DeepseekV3Config(
    hidden_size=32,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
    vocab_size=64,
)


def net_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tensors_of(cache):
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("name", REAL)
def test_counts_of_the_real_models(name):
    total, active = REAL[name]
    card = load.card(name)
    assert round(card.total_params / 1e9, 3) == total
    assert round(card.active_params / 1e9, 2) == active
    assert card.weight_bytes == 2 * card.total_params


def test_gpt_oss_20b_as_all_experts_are_read():
    card = load.card("gpt-oss-20b")
    assert round((card.total_params - card.lookup_params) / 1e9, 2) == 20.34


def test_context_limits_of_the_real_models():
    limits = {name: load.card(name).context_limit for name in REAL}
    assert limits == {
        "gpt-oss-20b": 131072,
        "gpt-oss-120b": 131072,
        "Qwen3-32B": 40960,
        "Yi-34B": 4096,
    }


def test_every_entry_says_truly_whether_it_is_dense():
    for name, entry in entries.models().items():
        kind = "moe" if load.card(name).experts else "dense"
        assert entry["kind_of_model"] == kind, name


def test_llama_by_hand():
    card = load.card(LLAMA, dtype="float32")
    attention = 8 * 8 + 2 * (8 * 4) + 8 * 8  # q, k and v with half the heads, o
    layer = attention + 3 * 8 * 16 + 2 * 8  # gate, up, down; two norms
    assert card.total_params == 2 * 10 * 8 + 2 * layer + 8
    assert card.lookup_params == 10 * 8
    assert card.active_params == card.total_params - 10 * 8
    assert card.weight_bytes == 4 * card.total_params
    # Keys and values, 2 layers, 2 heads of 2 elements, 4 bytes.
    assert card.kv_bytes(3, batch=5) == 5 * 3 * 2 * (2 * 2 * 2) * 4
    assert card.decode_bytes(3) == 4 * card.active_params + card.kv_bytes(3)


def test_a_table_tied_to_the_output_is_active():
    tied = load.card(LLAMA | {"tie_word_embeddings": True})
    loose = load.card(LLAMA)
    assert tied.lookup_params == 0
    assert tied.active_params == tied.total_params == loose.total_params - 10 * 8


def test_routed_experts_by_hand():
    card = load.card("tiny-gpt-oss")
    one = 64 * 128 + 128 + 64 * 64 + 64  # gate and up with bias, down with bias
    assert card.routed_params == 4 * 8 * one  # 4 layers of 8 experts
    unused = 4 * (8 - 2) * one
    assert card.active_params == card.total_params - 2048 * 64 - unused


def test_shared_experts_are_always_read():
    config = Qwen2MoeConfig(
        hidden_size=8,
        intermediate_size=16,
        moe_intermediate_size=4,
        num_hidden_layers=1,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=10,
    )
    card = load.card(config)
    assert card.routed_params == 4 * 3 * 8 * 4
    assert card.active_params == card.total_params - 10 * 8 - 3 * (3 * 8 * 4)


def test_weights_that_quantisers_take_by_hand():
    dense = load.card(LLAMA)
    attention = 8 * 8 + 2 * (8 * 4) + 8 * 8
    assert dense.matrix_params == 2 * (attention + 3 * 8 * 16)  # no norm, table or output matrix
    assert dense.expert_matrix_params == 0
    tied = load.card(LLAMA | {"tie_word_embeddings": True})
    assert tied.matrix_params == dense.matrix_params

    card = load.card("tiny-gpt-oss")  # biases everywhere, and a router
    assert card.expert_matrix_params == 4 * 8 * (64 * 128 + 64 * 64)
    attention = 64 * 128 + 2 * (64 * 32) + 128 * 64
    assert card.matrix_params == card.expert_matrix_params + 4 * attention


def test_a_router_that_is_a_linear_layer_is_not_quantised():
    net = torch.nn.Module()
    net.gate = torch.nn.Linear(6, 4, bias=False)  # a row for each of 4 experts
    net.shared = torch.nn.Linear(6, 5)
    net.experts = torch.nn.ModuleList(torch.nn.Linear(6, 7) for _ in range(4))
    net.get_output_embeddings = lambda: None
    routed = {n: p for n, p in net.named_parameters() if n.startswith("experts.")}
    assert count._matrices(net, {}, routed, 4) == (6 * 5 + 4 * 6 * 7, 4 * 6 * 7)


def test_expected_distinct_experts():
    card = load.card("tiny-gpt-oss")  # 2 of 8
    assert card.experts_touched(1) == 2
    assert card.experts_touched(2) == 8 * (1 - 0.75**2)
    assert card.experts_touched(1000) == pytest.approx(8)
    assert load.card("tiny-yi").experts_touched(4) == 0
    # One token of each of two sequences: the shared weights are read once.
    always = 2 * (card.total_params - card.lookup_params - card.routed_params)
    assert card.decode_bytes(10, batch=2) == (
        always + round(2 * card.routed_params * (1 - 0.75**2)) + card.kv_bytes(10, batch=2)
    )


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tokens", [1, 30, 31, 32, 33, 100])
def test_kv_bytes_equal_the_dynamic_cache(name, tokens):
    model = load.load(name, device=open_device("cpu"))
    cache = DynamicCache(config=model.net.config)
    ids = torch.full((2, tokens), 5)
    with torch.no_grad():
        model.net(ids, past_key_values=cache)
    held = sum(t.nbytes for t in tensors_of(cache))
    assert held == model.card.kv_bytes(tokens, batch=2)
    with torch.no_grad():
        model.net(ids[:, :1], past_key_values=cache)
    assert sum(t.nbytes for t in tensors_of(cache)) == model.card.kv_bytes(tokens + 1, batch=2)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("capacity", [16, 32, 100])
def test_kv_bytes_equal_the_static_cache(name, capacity):
    model = load.load(name, device=open_device("cpu"))
    cache = StaticCache(config=model.net.config, max_cache_len=capacity)
    with torch.no_grad():
        model.net(torch.full((2, 8), 5), past_key_values=cache)
    held = sum(t.nbytes for t in tensors_of(cache))
    assert held == model.card.kv_bytes(capacity, batch=2, cache="static")


def test_memory_behind_a_sliding_layer_is_larger_than_its_tensor():
    """What kv_bytes says about views: the whole prompt, then the full window."""
    model = load.load("tiny-gpt-oss", device=open_device("cpu"))
    cache = DynamicCache(config=model.net.config)
    per_token = 2 * 16 * 2  # heads, elements, bytes
    with torch.no_grad():
        model.net(torch.full((1, 100), 5), past_key_values=cache)
        keys = cache.layers[0].keys
        assert (keys.nbytes, keys.untyped_storage().nbytes()) == (31 * per_token, 100 * per_token)
        model.net(torch.full((1, 1), 5), past_key_values=cache)
        keys = cache.layers[0].keys
        assert (keys.nbytes, keys.untyped_storage().nbytes()) == (31 * per_token, 32 * per_token)


def test_latent_attention_equals_the_cache():
    net = net_of(DEEPSEEK)
    cache = DynamicCache(config=net.config)
    with torch.no_grad():
        net(torch.full((2, 7), 5), past_key_values=cache)
    card = load.card(DEEPSEEK, dtype="float32")
    assert sum(t.nbytes for t in tensors_of(cache)) == card.kv_bytes(7, batch=2)
    assert card.kv_bytes(7, batch=2) == 2 * 7 * 3 * (16 + 8) * 4  # 3 layers of latents
    # The first layer is dense; the routed experts of the others are found beside the shared one.
    assert card.routed_params == 2 * 8 * 3 * 32 * 16


REFORMER = {
    "model_type": "reformer", "is_decoder": True, "hidden_size": 32, "num_attention_heads": 4,
    "attention_head_size": 8, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16],
    "max_position_embeddings": 128, "vocab_size": 96, "feed_forward_size": 48, "num_buckets": 4,
    "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
}  # fmt: skip
OLD_GPT = {"model_type": "openai-gpt", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16}


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (OLD_GPT, "it keeps nothing: every step reads the whole sequence once more"),
        (REFORMER, "buckets_cache.* does not belong to one sequence each"),
        ({"model_type": "bert", "num_hidden_layers": 1}, "it is an encoder .is_decoder is false."),
    ],
)
def test_an_unknown_cache_is_named_and_the_rest_works(config, part):
    card = load.card(config, "float32")
    net = net_of(AutoConfig.for_model(**config))
    assert card.total_params == sum(p.numel() for p in net.parameters())
    assert "unknown" in card._repr_markdown_()
    assert card.as_dict()["kv_layers"] is None
    with pytest.raises(ModelError, match=f"(?s)cache is unknown.*{part}"):
        card.kv_bytes(1)


def test_a_model_without_causal_language_head_is_refused():
    with pytest.raises(ModelError, match="'vit' is not a causal language model.*use a decoder"):
        load.card({"model_type": "vit"})


def test_card_is_json_and_comes_back():
    card = load.card("tiny-gpt-oss")
    data = json.loads(json.dumps(card.as_dict(), allow_nan=False))
    assert data["kv_bytes_per_token"] == 4 * 2 * 2 * 16 * 2
    back = ModelCard.from_dict(data | {"model_source": "ignored"})
    assert back == card
    assert back.kv_bytes(1000) == card.kv_bytes(1000)


def test_card_as_markdown():
    text = load.card("gpt-oss-20b")._repr_markdown_()
    for part in ("20.915 B", "3.61 B (17.3%)", "41.83 GB", "4 of 32", "131,072", "128 tokens"):
        assert part in text


def test_reading_a_card_needs_no_torch():
    code = "import lib.models.card, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=files.ROOT)


def test_counting_leaves_the_config_alone():
    config = AutoConfig.for_model(**LLAMA)
    before = config.to_dict()
    load.card(config, dtype="float16")
    assert config.to_dict() == before


def test_errors_name_value_and_remedy():
    card = load.card("tiny-yi")
    require_context(card, 4000, 96)
    with pytest.raises(ModelError, match=r"4001 \+ 96 .* 4096 .* at most 4000"):
        require_context(card, 4001, 96)
    with pytest.raises(ModelError, match="context 0 .* use a context of 1"):
        require_context(card, 0, 1)
    with pytest.raises(ModelError, match="unknown cache 'paged'; use"):
        card.kv_bytes(1, cache="paged")
    with pytest.raises(ModelError, match="tokens=-1.*use tokens >= 0"):
        card.kv_bytes(-1)
    with pytest.raises(ModelError, match="unknown dtype 'int3'; use one of bfloat16"):
        load.card("tiny-yi", dtype="int3")
