"""What is loaded is what is named: checkpoints that lack something, hold something unknown, or
need scales, packages or code, all made here from a small net."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from lib.__main__ import main
from lib.hardware.device import open_device
from lib.measure import session
from lib.models import checkpoint_files, fetch, load, origin, quantised
from lib.models.card import ModelError
from lib.models.prompts import PromptError, exact_prompt
from lib.records import store
from lib.run import preflight
from tools import sweep, tiny

LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def llama(**changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(LLAMA | changes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def saved(tmp_path):
    """A function that saves a net, with its tensors and configuration changed."""

    def save(net=None, tensors=None, config=None, name="mine"):
        folder = tmp_path / name
        (net or llama()).save_pretrained(folder)
        if tensors is not None:
            held = load_file(folder / "model.safetensors")
            save_file(tensors(held), folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            fields = json.loads((folder / "config.json").read_text()) | config
            (folder / "config.json").write_text(json.dumps(fields))
        return folder

    return save


def loaded_from(folder, **options):
    usual = {"weights": "checkpoint", "dtype": "float32", "device": open_device("cpu")}
    return load.load(str(folder), **usual | options)


# Complete


def test_a_whole_checkpoint_loads(saved):
    assert torch.equal(loaded_from(saved()).net.state_dict()[UP], llama().state_dict()[UP])


def test_a_base_model_without_its_head_is_refused(saved):
    folder = saved(LlamaModel(llama().config))
    with pytest.raises(ModelError, match=r"mine is not .* lacks lm_head\.weight, which would"):
        loaded_from(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda held: {k: t for k, t in held.items() if k != UP}, f"it lacks {UP}"),
        (
            lambda held: held | {f"{UP}_scale": torch.ones(1)},
            f"it holds {UP}_scale, which this architecture does not have",
        ),
        (lambda held: held | {UP: torch.ones(8, 8)}, f"{UP} have other shapes"),
        (
            lambda held: held | {UP: torch.full_like(held[UP], torch.nan)},
            f"{UP} holds values that are not finite",
        ),
    ],
)
def test_missing_unexpected_mismatched_and_unreal_tensors_are_named(saved, change, reason):
    with pytest.raises(ModelError, match=reason.replace(".", r"\.")):
        loaded_from(saved(tensors=change))


# Filled with one value: made, and not trained


def filled(held, value, *parts):
    return {
        k: torch.full_like(t, value) if any(part in k for part in parts) else t
        for k, t in held.items()
    }


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize(
    ("model_type", "parts", "named"),
    [
        ("llama", ["embed_tokens"], "one value fills model.embed_tokens.weight; fetch"),
        ("llama", ["lm_head"], "one value fills lm_head.weight; fetch"),
        ("llama", [""], "one value fills 30 of 30 matrices, among them model.embed_tokens"),
        ("llama", ["layers"], "fills 28 of 30 matrices, among them model.layers.0.self_attn"),
        ("qwen3_moe", ["layers.1.mlp.gate."], "one value fills model.layers.1.mlp.gate.weight;"),
        ("gpt_oss", ["layers.1.mlp.router.w"], "fills model.layers.1.mlp.router.weight; fetch"),
    ],
)
def test_a_net_that_is_not_trained_is_refused(saved, model_type, parts, named, value):
    folder = saved(small(model_type), tensors=lambda held: filled(held, value, *parts))
    with pytest.raises(ModelError, match=f"mine is not trained: .*{re.escape(named)}"):
        loaded_from(folder)


def test_a_layer_that_adds_nothing_is_told_in_the_row_of_the_card(saved, tmp_path):
    """As block expansion leaves it: the last matrix of attention and of the feed-forward is 0."""
    parts = ("layers.1.self_attn.o_proj", "layers.1.mlp.down_proj")
    loaded = loaded_from(saved(tensors=lambda held: filled(held, 0.0, *parts)))
    _, card = session.begin_records(loaded, tmp_path / "records.jsonl")
    (warning,) = card.warnings
    assert warning["code"] == "constant-weights"
    assert all(f"model.{part}.weight" in warning["text"] for part in parts)
    assert store.load(tmp_path / "records.jsonl")[1].warnings == card.warnings


def test_norms_and_biases_of_one_value_are_usual(saved):
    assert loaded_from(saved()).warnings == ()


def test_random_weights_are_not_asked_whether_they_are_trained(saved):
    folder = saved(tensors=lambda held: filled(held, 0.0, ""))
    assert loaded_from(folder, weights="random").warnings == ()


def test_names_are_few_and_counted(saved):
    folder = saved(tensors=lambda held: {k: t for k, t in held.items() if "layers.1" not in k})
    with pytest.raises(ModelError, match=r"layers\.1\.\S+, \S+, \S+ and 6 more, which would be"):
        loaded_from(folder)


def test_an_encoder_is_refused(saved):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    folder = saved(BertModel(BertConfig(**small, num_attention_heads=4, vocab_size=40)))
    for weights in ("checkpoint", "random"):
        with pytest.raises(ModelError, match="is an encoder .is_decoder is false."):
            loaded_from(folder, weights=weights)
        arm = {"model": str(folder), "weights": weights, "dtype": "float32", "context": 8,
               "new_tokens": 1, "device": "cpu"}  # fmt: skip
        (problem,) = preflight.check([arm])
        assert "is an encoder" in problem


def test_a_file_that_is_cut_off_and_one_that_is_none(saved):
    path = saved() / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ModelError, match=f"it has {len(whole) - 10} of the {len(whole)} bytes"):
        loaded_from(path.parent)
    for broken in (whole[:5], b"<html>not found</html>" * 9):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match="is no safetensors file, or is cut off; fetch it"):
            loaded_from(path.parent)


def test_shards_that_are_missing_or_without_an_index(saved):
    folder = saved()
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(held.items())[n::2]) for n in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"mine holds {names[0]}, {names[1]} and no model.safe"):
        loaded_from(folder)
    where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / checkpoint_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert torch.equal(loaded_from(folder).net.state_dict()[UP], held[UP])
    (folder / names[1]).unlink()
    with pytest.raises(ModelError, match=f"mine lacks {names[1]} of 2 shards; fetch the whole"):
        loaded_from(folder)


def test_the_card_counts_the_net_that_was_loaded(saved):
    """The configuration says that head and table are one, and the file has a head of its own."""
    folder = saved(config={"tie_word_embeddings": True})
    loaded = loaded_from(folder)
    assert loaded.card.total_params == loaded.net.num_parameters() == llama().num_parameters()
    assert loaded.card.lookup_params == 40 * 32
    alike = saved(
        tensors=lambda held: held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()},
        config={"tie_word_embeddings": True},
        name="alike",
    )
    loaded = loaded_from(alike)
    assert loaded.card.total_params == loaded.net.num_parameters()


def small(model_type, **changes):
    """A tiny net of a type, with parameters that are not zero."""
    return sweep.net_of(tiny.fields(model_type) | changes)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", "mixtral", "deepseek_v3", "mamba"])
def test_whatever_is_missing_or_too_much_is_named(saved, model_type):
    """One tensor of each kind is left out; one is put beside."""
    folder = saved(small(model_type))
    path, device = folder / "model.safetensors", open_device("cpu")
    held = load_file(path)
    kinds = {"".join(c for c in name if not c.isdigit()): name for name in held}
    weights = [name for name in kinds.values() if name.endswith(".weight")]
    changed = [(n, {k: t for k, t in held.items() if k != n}) for n in kinds.values()]
    changed += [(n, held | {f"{n}_scale": torch.ones(3)}) for n in weights]
    for name, tensors in changed:
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"is not a checkpoint of this model: |\(conversion\)"):
            load._checkpoint_net(folder, "float32", device.torch_device, {})
            pytest.fail(name)


@pytest.mark.parametrize(
    ("model_type", "name", "constant"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("gpt2", "transformer.h.0.attn.bias", torch.ones(1, 1, 8, 8)),
        ("gpt2", "transformer.h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 8, 8).byte()),
        ("bert", "bert.embeddings.position_ids", torch.arange(128)[None]),
    ],
)
def test_constants_that_older_code_saved_are_no_weights(saved, model_type, name, constant):
    folder = saved(small(model_type), tensors=lambda held: held | {name: constant})
    assert loaded_from(folder).weights == "checkpoint"


def test_a_bias_of_that_name_is_a_weight(saved):
    name = "transformer.h.0.attn.bias"
    folder = saved(small("gpt2"), tensors=lambda held: held | {name: torch.ones(8).byte()[None]})
    with pytest.raises(ModelError, match="attn.bias in U8"):
        loaded_from(folder)


def test_constants_of_a_checkpoint_are_numbers_too(saved):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"  # not a parameter of the net
    folder = saved(
        small("deepseek_v3"), tensors=lambda held: held | {name: torch.full((4,), torch.nan)}
    )
    with pytest.raises(ModelError, match=f"{name} holds values that are not finite"):
        loaded_from(folder)


def test_files_that_are_not_loaded_do_not_count(saved):
    """As in repositories that hold the weights in another layout as well."""
    folder = saved()
    eight = {"w": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    save_file(eight, folder / "consolidated.safetensors")
    (folder / checkpoint_files.INDEX).write_text(json.dumps({"weight_map": {"w": "gone"}}))
    assert torch.equal(loaded_from(folder).net.state_dict()[UP], llama().state_dict()[UP])
    assert {t.name for t in checkpoint_files.tensors(folder)} == {*llama().state_dict()}


def test_bytes_are_those_of_the_loaded_net_where_some_parts_stay_in_float32(saved):
    loaded = loaded_from(saved(small("gpt_oss")), dtype="float16")
    held = [p.nbytes for p in loaded.net.parameters()]
    assert {p.dtype for p in loaded.net.parameters()} == {torch.float16, torch.float32}
    assert loaded.card.weight_bytes == sum(held) > 2 * loaded.card.total_params


# GGUF

GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path, net, *, without=(), parts=1, more=None):
    """A net of four heads of keys in the file format of llama.cpp, with a tokenizer of 40 words."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(40)
    writer.add_rope_dimension_count(8)
    if parts > 1:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", parts)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["w", "1", "2", "w1", "w2", *(f"x{n}" for n in range(35))])
    writer.add_token_types([1] * 40)
    writer.add_token_merges(["w 1", "w 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    held = {k: t.numpy() for k, t in net.state_dict().items()}
    named = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(2):
        named |= {f"model.layers.{layer}.{a}": f"blk.{layer}.{b}" for a, b in GGUF_NAMES.items()}
    for ours, theirs in named.items():
        if any(part in ours for part in without):
            continue
        tensor = held[f"{ours}.weight"]
        if "q_proj" in ours or "k_proj" in ours:  # llama.cpp keeps the halves of a head in turns
            tensor = tensor.reshape(4, 2, 4, -1).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{theirs}.weight", np.ascontiguousarray(tensor))
    for name in [more] if more else []:
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def net4(monkeypatch, tmp_path):
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path / "cache"))
    return llama(num_key_value_heads=4)


def test_a_whole_gguf_loads_and_says_its_form(net4, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", net4)
    loaded = loaded_from(path, weights="gguf")
    assert torch.equal(loaded.net.state_dict()[UP], net4.state_dict()[UP])
    assert loaded.source["stored_form"] == "gguf F32, expanded when loaded"


def test_one_part_of_a_split_gguf_is_refused_every_time(net4, tmp_path):
    path = write_gguf(tmp_path / "x-1.gguf", net4, without=["layers.1"], parts=2)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"x-1\.gguf is part 1 of 2, .* merge them into one"):
            loaded_from(path, weights="gguf")
    with pytest.raises(ModelError, match="is part 1 of 2"):
        load.card(str(path))
    assert not (tmp_path / "cache").exists()


def test_a_gguf_without_some_tensors_is_refused(net4, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", net4, without=["layers.1.mlp.up_proj"])
    with pytest.raises(ModelError, match=rf"x\.gguf is not .* lacks {UP}, which would be drawn"):
        loaded_from(path, weights="gguf")
    assert not any((tmp_path / "cache").glob("x-*"))


def test_a_gguf_whose_shapes_are_not_what_it_says_is_refused_by_its_name(net4, tmp_path):
    """As where the library reads a field of an architecture under another name."""
    wider = llama(num_key_value_heads=4, intermediate_size=64)
    with pytest.raises(ModelError, match=r"x\.gguf is not .*mlp\.\w+\.weight.* have other shapes"):
        loaded_from(write_gguf(tmp_path / "x.gguf", wider), weights="gguf")
    assert not list((tmp_path / "cache").glob("x-*"))


def test_what_an_older_version_converted_is_not_taken(net4, tmp_path):
    """It kept files that lack tensors, with others drawn in their place."""
    path = write_gguf(tmp_path / "x.gguf", net4, without=["layers.1.mlp.up_proj"])
    llama(num_key_value_heads=4).save_pretrained(fetch.cache_dir() / f"x-{fetch.sha256(path)[:12]}")
    with pytest.raises(ModelError, match=f"lacks {UP}"):
        loaded_from(path, weights="gguf")


@pytest.mark.parametrize("more", ["blk.0.attn_q.bias", "blk.7.ffn_norm.weight", "mystery.weight"])
def test_a_gguf_with_tensors_that_are_left_aside_is_refused(net4, tmp_path, more):
    path = write_gguf(tmp_path / "x.gguf", net4, more=more)
    with pytest.raises(ModelError, match=f"it holds {more}, which this architecture does not have"):
        loaded_from(path, weights="gguf")


def test_frequencies_of_rotations_in_a_gguf_are_constants(net4, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", net4, more="rope_freqs.weight")
    assert torch.equal(
        loaded_from(path, weights="gguf").net.state_dict()[UP], net4.state_dict()[UP]
    )


def test_the_table_of_a_gguf_counts_once_where_it_is_the_head_too(net4, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", net4, without=["lm_head"])
    loaded = loaded_from(path, weights="gguf")
    assert loaded.net.get_output_embeddings().weight is loaded.net.get_input_embeddings().weight


def test_a_gguf_that_is_cut_off_is_refused(net4, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", net4)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"x\.gguf is no whole GGUF file .* fetch it again"):
        loaded_from(path, weights="gguf")


# Quantised


def as_float8(held, *, scales=True, suffix="weight_scale_inv"):
    """Matrices in eight bits, with a scale for each block of 128 x 128 (here: one) beside them."""
    made = {}
    for name, tensor in held.items():
        if tensor.ndim == 2 and "layers" in name:
            scale = tensor.abs().max() / 448
            made[name] = (tensor / scale).to(torch.float8_e4m3fn)
            if scales:
                made[name.replace("weight", suffix)] = scale.reshape(1, 1)
        else:
            made[name] = tensor
    return made


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_eight_bits_are_expanded_with_their_scales(saved):
    loaded = loaded_from(saved(tensors=as_float8, config={"quantization_config": FP8}))
    ratio = loaded.net.state_dict()[UP].norm() / llama().state_dict()[UP].norm()
    assert ratio.item() == pytest.approx(1, abs=0.01)
    assert loaded.source["stored_form"] == "fp8"
    assert loaded.source["held_form"] == "expanded when loaded"
    assert loaded.card.weight_bytes == 4 * loaded.card.total_params and loaded.dtype == "float32"


@pytest.mark.parametrize(
    ("asked", "scales", "reason"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, True, "by quant_method 'modelopt', wh"),
        ({"quant_algo": "FP8"}, True, "by quant_method 'not named', which the installed"),
        (None, False, r"up_proj.* in F8_E4M3, and its config\.json names no quantization_config"),
        (FP8, False, "in eight bits of floating point, and no scale beside them"),
    ],
)
def test_numbers_that_would_be_read_without_a_scale_are_refused(saved, asked, scales, reason):
    config = {"quantization_config": asked} if asked else None
    folder = saved(tensors=lambda held: as_float8(held, scales=scales), config=config)
    with pytest.raises(ModelError, match=reason):
        loaded_from(folder)


@pytest.mark.parametrize(
    ("dtype", "part"),
    [
        *((dtype, UP) for dtype in ("int8", "uint8", "int32", "int64")),
        *((dtype, part) for dtype in ("float8_e4m3fn", "float8_e5m2") for part in (UP, NORM)),
    ],
)
def test_whole_numbers_and_eight_bits_are_no_weights_by_themselves(saved, dtype, part):
    number = getattr(torch, dtype)
    folder = saved(tensors=lambda held: held | {part: (held[part] * 100).to(number)})
    with pytest.raises(ModelError, match=f"mine holds {part} in .*names no quantization_config"):
        loaded_from(folder)


def test_a_table_of_whole_numbers_is_no_weight(saved):
    """DeepSeek V4 keeps a table of experts by token."""
    net = small("deepseek_v4")
    assert loaded_from(saved(net)).net.num_parameters() == net.num_parameters()


def test_blocks_of_four_bits_without_their_scales_are_named(saved):
    net = small("gpt_oss")
    shape = (4, 32, 1, 16)  # experts, rows, blocks of 32 numbers, bytes

    def blocks(held):
        return {
            **{k: t for k, t in held.items() if not k.endswith(("up_proj", "down_proj"))},
            **{
                f"{k}_blocks": torch.zeros(shape, dtype=torch.uint8)
                for k in held
                if k.endswith(("up_proj", "down_proj"))
            },
        }

    folder = saved(net, tensors=blocks, config={"quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(ModelError, match=r"mine cannot be loaded: .*experts\.(down|gate_up)_proj"):
        loaded_from(folder, dtype="bfloat16")


@pytest.mark.parametrize("suffix", ["input_scale", "k_scale", "activation_scale_inv"])
def test_a_scale_of_activations_is_none_of_weights(saved, suffix):
    folder = saved(
        tensors=lambda held: as_float8(held, suffix=suffix), config={"quantization_config": FP8}
    )
    with pytest.raises(ModelError, match=r"layers.0\..* in eight bits of .* no scale beside them"):
        loaded_from(folder)


def test_scales_belong_to_one_matrix_each():
    names = {"a.gate_up_proj", "a.gate_up_proj_scale_inv", "a.down_proj", "b.weight", "b.scale"}
    scaled = [n for n in sorted(names) if checkpoint_files._scales(n, names)]
    assert scaled == ["a.gate_up_proj", "b.scale", "b.weight"]


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scales"])
def test_a_scale_under_a_name_that_is_not_applied_is_too_much(saved, suffix):
    folder = saved(
        tensors=lambda held: as_float8(held, suffix=suffix), config={"quantization_config": FP8}
    )
    with pytest.raises(ModelError, match=f"{suffix}|no scale beside"):
        loaded_from(folder)


@pytest.mark.parametrize(
    ("asked", "packages"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_missing_packages_are_all_named_before_any_work(saved, monkeypatch, asked, packages):
    monkeypatch.setattr(quantised, "_installed", lambda module, pip: False)
    folder = saved(config={"quantization_config": asked})
    with pytest.raises(ModelError, match=f"needs .*: pip install {packages} into this"):
        loaded_from(folder)
    arm = {"model": str(folder), "weights": "checkpoint", "dtype": "float32", "context": 8,
           "new_tokens": 1, "device": "cpu"}  # fmt: skip
    (problem,) = preflight.check([arm])
    assert f"pip install {packages}" in problem
    assert preflight.check([arm | {"weights": "random"}]) == []


def test_a_quantisation_inside_a_part_of_the_configuration_is_found():
    """As compressed-tensors writes it for a model with a vision tower."""
    config = AutoConfig.for_model("gemma3")
    assert quantised.asked_for(config) is None
    config.text_config.quantization_config = {"quant_method": "modelopt"}
    assert quantised.method_of(quantised.asked_for(config)) == "modelopt"
    assert quantised.asked_for(origin.plain(config)) is None


def test_a_method_that_needs_a_gpu_says_so():
    with pytest.raises(ModelError, match="x is quantised by vptq, which computes on a GPU only"):
        quantised.require_device("x", {"quant_method": "vptq"}, "cpu")
    quantised.require_device("x", {"quant_method": "vptq"}, "cuda")
    quantised.require_device("x", None, "cpu")


class Packed(torch.nn.Module):
    """A linear layer of 4 x 6 as a package would hold it: half a byte a weight, a scale a row."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 3, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(4, dtype=torch.float16))
        self.bias = torch.nn.Parameter(torch.zeros(4))


def test_bytes_of_what_is_held_quantised_are_those_that_are_stored():
    net = torch.nn.Module()
    net.table, net.packed = torch.nn.Embedding(5, 6), Packed()
    names = ["table.weight", "packed.weight", "packed.bias"]
    assert quantised.stored_bytes(net, names) == {
        "table.weight": 5 * 6 * 4,
        "packed.weight": 4 * 3 + 4 * 2,
        "packed.bias": 4 * 4,
    }
    assert [quantised.is_quantised(m) for m in (net, net.table, net.packed)] == [False, False, True]


def test_the_row_names_what_computes(monkeypatch):
    net = torch.nn.Sequential(Packed(), Packed(), torch.nn.Linear(2, 2))
    monkeypatch.setattr(quantised.metadata, "version", lambda name: "1.2")
    assert quantised.values({"quant_method": "bitsandbytes"}, net) == {
        "stored_form": "bitsandbytes",
        "held_form": "as stored",
        "matrix_kernels": "Packed (2)",
        "matrix_packages": "bitsandbytes 1.2",
    }
    assert quantised.values(None, net) == {}


# Code that lies beside the weights

CODE = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\nclass X: pass\n"


@pytest.fixture
def no_questions(monkeypatch):
    def asked(*_):
        pytest.fail("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=asked, read=asked))


def test_code_of_a_folder_is_not_run_and_nothing_is_asked(tmp_path, no_questions, capsys):
    (tmp_path / "configuration_x.py").write_text(CODE)
    fields = {"model_type": "nextgen9", "auto_map": {"AutoConfig": "configuration_x.X"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for ask in (lambda: load.card(str(tmp_path)), lambda: loaded_from(tmp_path, weights="random")):
        with pytest.raises(ModelError, match="needs code of its own .auto_map .* never executed"):
            ask()
    assert main(["fit", "--model", str(tmp_path), "--gpu-gb", "8"]) == 2
    assert "never executed here" in capsys.readouterr().err
    assert not (tmp_path / "RAN").exists()


def test_a_type_that_the_library_knows_runs_its_own_code(saved, no_questions):
    folder = saved(config={"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
    (folder / "modeling_x.py").write_text(CODE)
    assert loaded_from(folder).card.model_type == "llama" and not (folder / "RAN").exists()


def test_code_of_a_tokenizer_is_not_run(saved, no_questions):
    folder = saved()
    (folder / "tok.py").write_text(CODE)
    fields = {"auto_map": {"AutoTokenizer": ["tok.X", None]}, "tokenizer_class": "X"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="the tokenizer of mine cannot be read: .* drawn ids"):
        loaded_from(folder)
    assert not (folder / "RAN").exists()


@pytest.mark.parametrize("kernel", ["someone/kernel", "flash_attention_2"])
def test_kernels_of_a_hub_are_not_fetched(saved, monkeypatch, kernel):
    monkeypatch.setattr(origin, "find_spec", lambda name: None)
    folder = saved(config={"attn_implementation": kernel})
    with pytest.raises(ModelError, match=f"asks for '{kernel}', which is code of a hub"):
        loaded_from(folder)


def test_the_library_is_told_to_fetch_no_kernels(monkeypatch):
    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "_kernels_enabled", True)
    load.card({**LLAMA, "model_type": "llama"})
    assert hub_kernels._kernels_enabled is False


# Ids


def test_ids_beyond_the_embedding_are_refused_with_their_tokens(saved):
    words = {f"w{n}": n for n in range(40)} | {"again": 40, "the": 41}
    raw = Tokenizer(tokenizer_models.WordLevel(words, unk_token="w0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0")
    fast.chat_template = "{{ messages[0]['content'] }} the"
    loaded = loaded_from(saved())
    loaded.tokenizer = fast
    raw.pre_tokenizer = None
    with pytest.raises(PromptError, match=r"embedding of 40 rows does not hold: .*4[01] \('"):
        exact_prompt(fast_prompt(loaded), 3)


def fast_prompt(model):
    """The model, whose tokenizer splits at white space."""
    from tokenizers import pre_tokenizers

    model.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model


# One line, exit 2


@pytest.mark.parametrize("model_type", ["gemma3n", "ministral", "dots1", "musicgen"])
def test_whatever_a_configuration_makes_the_library_raise_ends_in_one_line(
    tmp_path, capsys, model_type
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert main(["fit", "--model", str(tmp_path), "--gpu-gb", "24"]) == 2
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith("error: ") and said.out == ""


@pytest.mark.parametrize("error", [AttributeError("x"), KeyError("y"), RecursionError("z")])
def test_any_error_of_an_architecture_is_a_reason(monkeypatch, error):
    def build(*args, **options):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", build)
    with pytest.raises(ModelError, match=f"'llama' cannot be built .*{type(error).__name__}"):
        load.card({**LLAMA, "model_type": "llama"})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .* is 1000000000, and at most 1,000 is"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings in the configuration of"),
        ({"vocab_size": -(10**15)}, "vocab_size in the configuration of mine is -10000"),
        ({"text_config": {"n_layer": 1001}}, "n_layer in the configuration of mine is 1001,"),
    ],
)
@pytest.mark.parametrize("weights", ["random", "checkpoint"])
def test_numbers_that_no_model_has_are_refused_before_anything_is_built(
    saved, fields, reason, weights
):
    with pytest.raises(ModelError, match=reason):
        loaded_from(saved(config=fields), weights=weights)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": 7}', "{}"])
def test_a_configuration_that_is_none_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="the configuration of .* cannot be read: |model type '7'"):
        load.card(str(tmp_path))
