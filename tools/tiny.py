"""Tiny configurations of every causal model type of the installed transformers.

Each field that is a size becomes small, by its name; what a type needs beyond that stands in
`NEEDS`. A net of such a configuration has some ten thousand parameters and runs on a CPU in
milliseconds.
"""

from __future__ import annotations

from typing import Any

SIZES = {
    1: "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts "
    "type_vocab_size moe_num_shared_experts num_dense_layers index_local_blocks "
    "num_nextn_predict_layers num_mem_blocks num_kv_shared_layers",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk "
    "moe_top_k moe_k top_k mamba_n_groups mamba_ngroups n_groups num_query_groups",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth "
    "num_decoder_layers num_encoder_layers num_attention_heads n_head n_heads num_heads "
    "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads "
    "num_encoder_attention_heads attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts zero_expert_num n_mamba_heads "
    "linear_num_key_heads linear_num_value_heads mamba_n_heads mamba_num_heads "
    "linear_num_heads laurel_rank index_topk index_topk_blocks d_rel",
    8: "head_dim kv_channels d_kv d_head dim_head attention_head_dim attention_head_size "
    "v_head_dim qk_rope_head_dim qk_nope_head_dim index_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim mamba_d_state state_size ssm_state_size "
    "mamba_d_head mamba_headdim mamba_head_dim mamba_dt_rank time_step_rank sliding_window "
    "attention_window_size chunk_size mamba_chunk_size hidden_size_per_layer_input rotary_dim "
    "swa_head_dim global_head_dim local_attention sliding_window_size window_size "
    "compressor_dim",
    # Of few heads none may care for a token, and then which tokens are chosen is left to chance.
    64: "index_n_heads",
    16: "moe_intermediate_size shared_expert_intermediate_size kv_lora_rank q_lora_rank "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size mamba_d_ssm lora_rank "
    "o_lora_rank adapter_rank gated_norm_rank",
    32: "hidden_size d_model n_embd dim embed_dim embedding_size input_embedding_size "
    "output_embedding_size emb_dim embedding_dim lru_width attention_hidden_size "
    "hidden_size_global out_hidden_size output_dim backbone_hidden_size router_hidden_size "
    "word_embed_proj_dim projector_input_dim projector_output_dim vision_output_dim",
    48: "intermediate_size d_ff ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size d_inner "
    "dim_ff dff n_inner intermediate_size_mlp shared_intermediate_size feed_forward_size "
    "dense_intermediate_size mlp_dim",
    96: "vocab_size vocab_size_per_layer_input decoder_vocab_size codebook_size audio_vocab_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
    "context_length model_max_length max_source_positions max_seq_length",
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
EXPERTS = 4  # of which a token uses two

_TWO_KINDS = ["sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "hybrid"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = _ROPE | {"mrope_section": [2, 2, 4]}
_LATENT = {
    "num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "head_dim": 8,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 128,
}  # fmt: skip
_GEMMA4 = {
    "layer_types": _TWO_KINDS, "head_dim": 8, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96, "sliding_window": 8, "global_head_dim": 16,
}  # fmt: skip
_ASSISTANT = {"backbone_hidden_size": 32, "num_centroids": 8, "centroid_intermediate_top_k": 2}
_SHARED = _TEXT | {"layer_types": _TWO_KINDS, "sliding_window": 8, "num_kv_shared_layers": 4}
_QWEN4 = {
    "layer_types": ["linear_attention", "qwen_sparse_attention"] * 2, "indexer_n_heads": 64,
    "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
    "ple_layer_ids": [1], "ple_embed_dim": 32, "heads_per_ngram": 4, "ngram_vocab_size_base": 100,
    "split_ngram_parts": 4, "hc_lowrank": 8, "eos_token_id": 2,
}  # fmt: skip
_QWEN4_TEXT = _TEXT | _QWEN4 | {
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": EXPERTS,
    "num_experts_per_tok": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 4, "linear_num_value_heads": 4,
}  # fmt: skip
_DECODER = {"is_decoder": True}
# What a type needs beyond small sizes; None: cannot be built small, for the reason beside it.
NEEDS: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1, 3]},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": _DECODER | {"attention_type": "original_full"},
    "camembert": _DECODER,
    "cohere_compass_text": {
        "layer_types": _TWO_KINDS, "head_dim": 16,
        "rope_parameters": {"sliding_attention": _MROPE, "full_attention": _MROPE},
    },
    "data2vec-text": _DECODER,
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": EXPERTS, "moe_top_k": 2,
                       "hidden_size": 32},
    },
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                              "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4,
                                       "heavily_compressed_attention": 8}},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2,
              "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "electra": _DECODER,
    "ernie": _DECODER,
    "falcon_h1": {"mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_ssm": 16},
    "gemma3": {"text_config": _TEXT | {"layer_types": _TWO_KINDS, "sliding_window": 8}},
    "gemma3_text": {"layer_types": _TWO_KINDS},
    "gemma3n_text": {"layer_types": _TWO_KINDS, "num_kv_shared_layers": 2,
                     "activation_sparsity_pattern": [0.0] * 4},
    "gemma4": {"text_config": _TEXT | _GEMMA4},
    "gemma4_assistant": _ASSISTANT | {
        "text_config": _SHARED | {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                  "vocab_size_per_layer_input": 0}},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _TEXT | {"layer_types": _TWO_KINDS, "sliding_window": 8}},
    "gemma4_unified_assistant": _ASSISTANT | {
        "text_config": _SHARED | {"model_type": "gemma4_unified_text"}},
    "gemma4_unified_text": _GEMMA4,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "shared_intermediate_size": 16,
                         "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": EXPERTS, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1},
    "kimi_linear": {"num_hidden_layers": 4, "num_key_value_heads": 4, "layer_types": _LINEAR,
                    "mlp_layer_types": ["dense"] + ["sparse"] * 3},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": _LATENT | {"num_layers": 2, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "megatron-bert": _DECODER,
    "minicpm3": _LATENT,
    "ministral": {"head_dim": 8, "layer_types": _TWO_KINDS},
    "musicgen": {
        "text_encoder": {"model_type": "t5", "vocab_size": 96, "d_model": 32, "num_layers": 2,
                         "num_heads": 4, "d_kv": 8, "d_ff": 48},
        "audio_encoder": {"model_type": "encodec"}, "decoder": {"model_type": "musicgen_decoder"},
    },
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
                   "num_hidden_layers": 4, "mamba_num_heads": 8},
    "olmo_hybrid": {"layer_types": _LINEAR},
    "phi4_multimodal": {"vision_config": {"crop_size": 32, "patch_size": 8}},
    "qwen3_5": {"text_config": {"layer_types": _LINEAR}},
    "qwen3_5_moe": {"text_config": {"layer_types": _LINEAR}},
    "qwen3_5_moe_text": {"layer_types": _LINEAR},
    "qwen3_5_text": {"layer_types": _LINEAR},
    "qwen3_next": {"layer_types": _LINEAR},
    "qwen4_exp": {"text_config": _QWEN4_TEXT},
    "qwen4_exp_text": _QWEN4,
    "reformer": _DECODER | {
        "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "num_buckets": 4,
        "attn_layers": ["local", "lsh", "local", "lsh"], "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "hash_seed": 0,
    },
    "rembert": _DECODER,
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": _DECODER | {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": 16,
                            "shape_embed_dim": 8, "shape_vocab_size": 16},
    "roformer": _DECODER,
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xlstm": {"embedding_dim": 128, "hidden_size": 128, "num_heads": 4, "num_blocks": 2},
    "xmod": _DECODER | {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {"layers_block_type": _HYBRID, "attention_hidden_size": 64, "attention_head_dim": 16,
              "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": _HYBRID, "attention_hidden_size": 64, "attention_head_dim": 16,
               "mamba_headdim": 16, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def types() -> list[str]:
    """Every model type that the installed transformers can make a causal language model of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def fields(model_type: str) -> dict[str, Any]:
    """A tiny configuration as a dict; raises what the library raises."""
    from transformers import AutoConfig

    try:
        default = AutoConfig.for_model(model_type).to_dict()
    except Exception:  # it has no default; what it needs stands above
        default = {}
    made = _small(default)
    for name, value in NEEDS.get(model_type, {}).items():
        inner = made.get(name)
        both = isinstance(inner, dict) and isinstance(value, dict)
        made[name] = inner | value if both else value
    return made | {"model_type": model_type}


def _small(default: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, dict) and name.endswith("_config"):
            kind = {"model_type": value["model_type"]} if value.get("model_type") else {}
            made[name] = _small(value) | kind
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            made[name] = SMALL[name]
        elif name in TOKENS and value is not None:
            made[name] = TOKENS[name]
    return made
