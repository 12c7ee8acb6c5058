"""What a net keeps of a step and what it reads, seen on shapes alone: sizes that a reader can add
up, and real caches of small nets."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lib.__main__ import main
from lib.analysis import fit
from lib.models import count, decode_step, dry_run, load
from lib.models.card import Block, ModelCard, ModelError, prefill_flop
from tools import sweep, tiny

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention"] * 2
GEMMA4 = {
    **SMALL, "model_type": "gemma4_text", "hidden_size_per_layer_input": 8, "sliding_window": 8,
    "vocab_size_per_layer_input": 96, "layer_types": KINDS,
}  # fmt: skip
MAMBA = {
    "model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8,
    "vocab_size": 96,
}  # fmt: skip
QWEN3_NEXT = {
    **SMALL, "model_type": "qwen3_next", "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
    "decoder_sparse_step": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "image_size": 32,
          "num_attention_heads": 4, "patch_size": 8}  # fmt: skip


def net_of(fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def card_of(fields):
    return load.card(fields, "float32")


# Shapes alone


def test_a_dry_run_computes_nothing_and_finds_the_shapes_of_a_real_one():
    fields = {**SMALL, "model_type": "llama"}
    with dry_run.building():
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    seen = dry_run.run(net, tokens=5, batch=3)
    assert all(p.is_meta for p in net.parameters())
    shapes = [kept.shape for kept in seen.after_step]
    assert (
        shapes == [(3, 2, 6, 8)] * 8
    )  # keys and values of 2 heads of 8, in 4 layers, 5 + 1 tokens
    assert [kept.shape for kept in seen.after_prompt] == [(3, 2, 5, 8)] * 8


def test_whole_numbers_are_real_and_a_choice_by_floating_point_is_stood_in_for():
    with dry_run.Shapes():
        scores = torch.empty(2, 3, 2**17, device="meta")
        values, index = scores.topk(4, dim=-1)
        ids = torch.arange(6, device="meta")
        assert bool((ids == 5).any()) and int(index.max()) == 3
        assert index[0, 0].tolist() == [0, 1, 2, 3] and values.is_meta
        assert not bool(torch.isnan(scores).any())


def test_what_a_step_reads_and_what_it_looks_rows_up_in():
    with dry_run.building():
        net = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**SMALL, model_type="llama", tie_word_embeddings=False)
        )
    seen = decode_step.layout(net)
    assert seen.looked_up == {"model.embed_tokens.weight"}
    assert seen.read == dict(net.named_parameters()).keys() - seen.looked_up


def test_counting_draws_no_random_number():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    count._SEEN.clear()
    load.card(tiny.fields("reformer"), "float32")  # it hashes by random rotations
    assert torch.equal(torch.rand(3), expected)


def test_a_vocabulary_of_few_words_is_enough():
    card = card_of({**SMALL, "model_type": "llama", "vocab_size": 3})
    assert card.kv_layers == ((32, None),) * 4


def test_a_row_beyond_a_table_is_seen():
    with dry_run.building():
        net = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=9
            )
        )
    assert dry_run.reaches(net, 9) and not dry_run.reaches(net, 10)


# Sizes by hand


def test_states_do_not_grow():
    """64 channels with 4 inputs of the convolution and 8 states each, in 3 layers of float32."""
    card = card_of(MAMBA)
    assert (card.kv_layers, card.state_bytes) == ((), 3 * 64 * (4 + 8) * 4)
    assert card.kv_bytes(1, 2) == card.kv_bytes(10**6, 2) == 2 * card.state_bytes
    assert card.kv_bytes(0) == 0 and card.token_bytes == 0
    assert card.decode_bytes(10**6, 2) - card.decode_bytes(1, 1) == card.state_bytes
    assert card.active_params == card.total_params  # the table is the output matrix as well


def test_a_hybrid_by_hand():
    """Two layers with keys and values of 2 heads of 8; two with states of 4 heads of 8 x 8 and a
    convolution over 2 x 16 + 32 channels and 4 inputs."""
    card = card_of(QWEN3_NEXT)
    assert card.kv_layers == ((32, None),) * 2 and card.kv_element_bytes == 4
    assert card.state_bytes == 2 * (4 * 8 * 8 + (2 * 16 + 32) * 4) * 4
    assert card.kv_bytes(10, 3) == 3 * (10 * 2 * 32 * 4 + card.state_bytes)


def test_states_stay_in_float32_where_weights_are_rounded():
    half = load.card(MAMBA, "bfloat16")
    assert half.state_bytes == 3 * 64 * (4 * 2 + 8 * 4)  # inputs of the convolution are rounded


def test_layers_that_differ_in_the_width_of_a_head():
    """Gemma 4: heads of 8 in windows, of 512 in full layers (its own default)."""
    card = card_of(GEMMA4)
    assert card.kv_layers == ((2 * 2 * 8, 8), (2 * 2 * 512, None)) * 2
    assert card.total_params == sum(p.numel() for p in net_of(GEMMA4).parameters())
    assert card.head_dim is None and card.kv_heads == 2
    whole = card_of({"model_type": "gemma4", "text_config": GEMMA4})
    assert whole.kv_layers == card.kv_layers and whole.active_params == card.active_params
    for tokens in (3, 8, 9, 33):
        held = sweep.cached_bytes(net_of(GEMMA4), 1, tokens)
        assert held == card.kv_bytes(tokens) == 4 * (4096 * tokens + 64 * min(tokens, 7))


def test_tokens_that_are_kept_as_one():
    """Of 10 tokens with blocks of 4: two entries, two tokens left over, the last block's own."""
    block = Block(4, full_bytes=10, left_bytes=3, once_bytes=100)
    assert [block.bytes_after(n) for n in (0, 3, 4, 10)] == [0, 9, 110, 126]
    fields = tiny.fields("deepseek_v4")
    card = card_of(fields)
    assert [block.tokens for block in card.kv_blocks] == [4, 8] and card.block_tokens == 8
    for tokens in (3, 4, 7, 8, 21):
        assert card.kv_bytes(tokens) == sweep.cached_bytes(net_of(fields), 1, tokens)
    back = ModelCard.from_dict(card.as_dict())
    assert back == card


def test_what_never_changes_with_the_number_of_heads_in_a_config():
    """Falcon states 4 heads of keys and caches one."""
    fields = {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 96}  # fmt: skip
    card = card_of(fields)
    assert card.kv_heads == 1 and card.kv_layers == ((2 * 8, None),) * 2


# Parameters that decoding never reads


def test_a_vision_tower_is_held_and_not_read():
    text = {**SMALL, "model_type": "gemma3_text", "sliding_window": 8}
    alone = card_of(text)
    both = card_of({"model_type": "gemma3", "text_config": text, "vision_config": VISION})
    assert both.unread_params == both.total_params - alone.total_params > 0
    assert both.active_params == alone.active_params == both.params_used(0)
    assert both.decode_bytes(50) == alone.decode_bytes(50)
    assert both.weight_bytes - alone.weight_bytes == both.unread_bytes == 4 * both.unread_params


def test_an_attention_to_an_encoder_that_is_not_there():
    fields = {"model_type": "bart", "d_model": 32, "decoder_layers": 2, "encoder_layers": 2,
              "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 48,
              "encoder_ffn_dim": 48, "vocab_size": 96, "max_position_embeddings": 64}  # fmt: skip
    card = card_of(fields)
    attention = 4 * (32 * 32 + 32) + 2 * 32  # four matrices with biases, and a norm
    assert card.unread_params == 2 * attention
    assert card.active_params == card.total_params - card.unread_params - card.lookup_params


def test_a_quantised_form_of_what_is_not_read_is_not_read_either():
    text = {**SMALL, "model_type": "gemma3_text", "sliding_window": 8}
    both = load.card({"model_type": "gemma3", "text_config": text, "vision_config": VISION})
    alone = load.card(text)
    eight = fit.held_as(both, fit.FORMS["8-bit"]), fit.held_as(alone, fit.FORMS["8-bit"])
    assert eight[0].decode_bytes(50) == eight[1].decode_bytes(50) < both.decode_bytes(50)


# Experts


def test_experts_are_counted_by_their_module():
    """DBRX holds the rows of 4 experts in one matrix of 4 x 48 rows."""
    card = card_of(tiny.fields("dbrx"))
    assert (card.experts, card.experts_per_token) == (4, 2)
    assert card.routed_params == 2 * 4 * 3 * 48 * 32  # layers, experts, matrices
    assert card.active_params == card.total_params - card.lookup_params - card.routed_params // 2
    assert card.expert_matrix_params == card.routed_params


def test_choices_that_compute_nothing():
    """LongCat: two of eight choices a token, of which four are experts: one on average. Room for
    the other four lies in one of the two tensors and is never read."""
    card = card_of(tiny.fields("longcat_flash"))
    assert (card.experts, card.empty_experts, card.experts_per_token) == (4, 4, 2)
    assert card.experts_touched(1) == 1.0
    assert card.routed_params == 2 * 4 * 3 * 16 * 32 and card.unread_params == 2 * 4 * 2 * 16 * 32
    always = card.total_params - card.lookup_params - card.routed_params - card.unread_params
    assert card.active_params == always + card.routed_params // 4


# Limits


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                           "original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 512),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 256),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 256),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}, 128),
        ({}, 128),
    ],
)  # fmt: skip
def test_stretched_positions_reach_as_far_as_they_are_stretched(fields, limit):
    assert card_of({**SMALL, "model_type": "qwen3", **fields}).context_limit == limit


def test_a_stretch_of_some_layers_only_leaves_the_stated_limit():
    """As Gemma 3 states it: 128 positions are what its stretched full layers reach already."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    both = {"sliding_attention": rope, "full_attention": {**rope, "rope_type": "linear",
                                                          "factor": 8.0}}  # fmt: skip
    fields = {**SMALL, "model_type": "gemma3_text", "rope_parameters": both, "sliding_window": 8}
    assert card_of(fields).context_limit == 128


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48,
          "vocab_size": 96}, None),
        ({"model_type": "whisper", "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4,
          "decoder_ffn_dim": 48, "vocab_size": 96, "pad_token_id": 0}, 448),
        ({"model_type": "mpt", "d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 96,
          "max_seq_len": 77}, 77),
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
         None),
        # Positions begin behind the padding index, 1: rows 2 to 63.
        ({"model_type": "roberta", "is_decoder": True, "hidden_size": 32, "vocab_size": 96,
          "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
          "max_position_embeddings": 64, "pad_token_id": 1}, 62),
    ],
)  # fmt: skip
def test_limits_under_other_names(fields, limit):
    assert card_of(fields).context_limit == limit


# What stays unknown


@pytest.mark.parametrize(
    "fields", [{"model_type": "ministral"}, {"model_type": "hunyuan_v1_dense"}]
)
def test_what_the_library_cannot_build_is_refused_in_one_line(fields):
    with pytest.raises(ModelError, match="cannot be built from this configuration: TypeError: uns"):
        load.card(fields)


def test_a_package_that_an_architecture_needs_is_named(monkeypatch):
    def build(*args, **options):
        raise ImportError("\nXModel requires the xyz library but it was not found. pip install xyz")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", build)
    with pytest.raises(ModelError, match="'llama' needs xyz, .*: pip install xyz into"):
        load.card({**SMALL, "model_type": "llama"})


def test_a_step_that_cannot_be_run_leaves_the_rest_of_the_card():
    """A part of Gemma 4 that drafts tokens: it runs on another model's states only."""
    card = card_of(tiny.fields("gemma4_assistant"))
    assert card.total_params == sum(
        p.numel() for p in net_of(tiny.fields("gemma4_assistant")).parameters()
    )
    with pytest.raises(ModelError, match="no step of it runs .ValueError: inputs_embeds"):
        card.kv_bytes(1)


def test_an_encoder_is_not_loaded():
    fields = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96,
              "num_attention_heads": 4, "intermediate_size": 48}  # fmt: skip
    with pytest.raises(ModelError, match="is an encoder .* use a model that is made to continue"):
        count.require_decoder(load.card(fields))
    count.require_decoder(load.card({**fields, "is_decoder": True}))


# Does it fit


def test_fit_of_states_by_hand():
    card = card_of(MAMBA)
    reserve = fit.CUDA_CONTEXT_BYTES + card.margin_bytes
    room = card.weight_bytes + reserve + 10 * card.state_bytes + 5
    row = fit.plan(card, gpu_bytes=room, contexts=(100,), bytes_per_s=1e9)
    assert row["users_100"] == 10 and row["token_bytes"] == 0
    assert (row["largest_context"], row["limited_by"]) == (None, "nothing")
    assert row["decode_tok_per_s_100"] == 1e9 / (card.weight_bytes + card.state_bytes)
    full = fit.plan(card, gpu_bytes=room - 10 * card.state_bytes, contexts=(100,))
    assert full["users_100"] == 0 and full["largest_context"] == 0


def test_a_table_of_a_hybrid_names_its_state(tmp_path, capsys):
    AutoConfig.for_model(**QWEN3_NEXT).save_pretrained(tmp_path)
    assert main(["fit", "--model", str(tmp_path), "--gpu-gb", "8", "--dtype", "bfloat16"]) == 0
    assert "state of a sequence (MB)" in capsys.readouterr().out


def test_the_largest_context_counts_a_block_before_it_is_full():
    card = card_of(tiny.fields("deepseek_v4"))
    for tokens in (15, 16, 100):
        room = max(card.kv_bytes(n, cache="static") for n in range(tokens + 1))
        assert fit.largest_context(card, room) <= tokens + 8
        assert card.kv_bytes(fit.largest_context(card, room), cache="static") <= room


def test_a_real_call_of_generate_keeps_what_the_card_says():
    """Prompt of 9, 5 new tokens: 13 are cached, since the last is never read."""
    net, card = net_of(QWEN3_NEXT), card_of(QWEN3_NEXT)
    net.generation_config = GenerationConfig()
    out = net.generate(
        torch.randint(5, 90, (2, 9)), max_new_tokens=5, pad_token_id=0, return_dict_in_generate=True
    )
    held = sum(t.nbytes for t in sweep.tensors(out.past_key_values, set()))
    assert held == card.kv_bytes(13, 2)


# Attention's arithmetic


class Widths(torch.overrides.TorchFunctionMode):
    """Heads x (width of keys + of values), added up over what attends in a real pass."""

    total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            self.total += query.shape[1] * (query.shape[3] + value.shape[3])
        return func(*args, **(kwargs or {}))


WIDE = {"v_head_dim": 16, "num_key_value_heads": 4, "first_k_dense_replace": 4, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8}  # fmt: skip
ATTENDS = {
    "heads of one size": {**SMALL, "model_type": "llama"},
    "values of another width": {**SMALL, "model_type": "deepseek_v3", **WIDE},
    "two layers without keys of their own": GEMMA4 | {"num_kv_shared_layers": 2},
    "heads that differ by layer": GEMMA4 | {"num_kv_shared_layers": 0, "global_head_dim": 16},
    "positions beside keys": tiny.fields("qwen4_exp_text"),
    "hybrid": QWEN3_NEXT,
    "no attention": MAMBA,
    "no attention, by another name": tiny.fields("mamba2"),
}


@pytest.mark.parametrize("case", ATTENDS)
def test_the_arithmetic_of_a_prefill_counts_every_layer_that_attends(case):
    net, card = net_of(ATTENDS[case]), card_of(ATTENDS[case])
    with torch.no_grad(), Widths() as widths:
        net(torch.full((1, 7), 5), use_cache=True)
    output = card.vocab_size * card.hidden_size
    attention = prefill_flop(card, 1) - 2 * card.active_params if widths.total else 0
    assert attention == 2 * widths.total  # one token sees itself
    if widths.total:  # each of 7 sees itself and those before it: 28 pairs, within every window
        expected = 2 * (7 * card.active_params - 6 * output + 28 * widths.total)
        assert prefill_flop(card, 7) == expected


def test_what_a_card_says_of_attention_is_kept_in_a_record():
    card = card_of(GEMMA4 | {"num_kv_shared_layers": 2})
    assert ModelCard.from_dict(json.loads(json.dumps(card.as_dict()))) == card
    assert card.attention_layers == ((64, 8), (4096, None)) * 2  # 4 x (8 + 8), 4 x (512 + 512)


@pytest.mark.parametrize("number", [0, -1])
def test_a_net_without_layers_is_refused(number):
    with pytest.raises(ModelError, match=f"no layers \\(num_hidden_layers is {number}\\)"):
        card_of({**SMALL, "model_type": "llama", "num_hidden_layers": number})


def test_more_experts_for_a_token_than_there_are_is_told_with_both_numbers():
    fields = QWEN3_NEXT | {"num_experts_per_tok": 8}
    with pytest.raises(
        ModelError, match="has 4 experts, and its config says num_experts_per_tok 8"
    ):
        card_of(fields)
