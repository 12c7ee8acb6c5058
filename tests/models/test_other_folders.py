"""Folders and files that people give for a model and that are none, or are one in another form:
each is refused with what to give instead, or read as it is meant."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lib.models import checkpoint_files, gguf_fields, load, origin
from lib.models.card import ModelError
from tests.models import test_checkpoints as checkpoints
from tests.models.test_checkpoints import LLAMA, NORM, UP, loaded_from, net4, saved, write_gguf

__all__ = ["net4", "saved"]  # fixtures


def without_weights(folder):
    (folder / "model.safetensors").unlink()
    return folder


def as_adapter(folder, fields='{"base_model_name_or_path": "owner/base"}'):
    (folder / "adapter_config.json").write_text(fields)
    save_file({"lora_A.weight": torch.ones(4, 32)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("weights", ["checkpoint", "random"])
@pytest.mark.parametrize(
    ("fields", "base"), [('{"base_model_name_or_path": "owner/base"}', "owner/base"),
                         ("[", "another model"), ("{}", "another model")]
)  # fmt: skip
def test_an_adapter_is_no_model(tmp_path, fields, base, weights):
    reason = f"no config.json; it is an adapter of {base}: merge it into that model"
    with pytest.raises(ModelError, match=reason):
        loaded_from(as_adapter(tmp_path, fields), weights=weights)


def test_an_adapter_beside_a_model_would_be_left_aside(saved):
    folder = as_adapter(saved())
    reason = "an adapter .adapter_config.json. of owner/base, which would be left aside: merge"
    for _ in range(2):
        with pytest.raises(ModelError, match=reason):
            loaded_from(folder)
        if (folder / "model.safetensors").exists():
            without_weights(folder)
    assert loaded_from(folder, weights="random").card.total_params > 0


@pytest.mark.parametrize("config", [True, False])
def test_a_folder_around_a_gguf_file_names_the_file(saved, config):
    folder = without_weights(saved())
    (folder / "x.gguf").touch()
    if not config:
        (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no .*; give its GGUF file by name .*mine/x\.gguf"):
        loaded_from(folder)


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "model.onnx"])
def test_other_formats_are_no_checkpoint(saved, name):
    (without_weights(folder := saved()) / name).touch()
    with pytest.raises(ModelError, match="no .safetensors file; give a complete checkpoint"):
        loaded_from(folder)


def test_a_link_that_leads_nowhere_is_named(saved):
    """As in the cache of a hub whose blobs were removed."""
    folder = without_weights(saved())
    (folder / "model.safetensors").symlink_to(folder / "gone")
    with pytest.raises(ModelError, match=r"model\.safetensors is a folder, or a link that leads"):
        loaded_from(folder)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "{"])
def test_an_index_that_is_none(saved, index):
    (without_weights(folder := saved()) / checkpoint_files.INDEX).write_text(index)
    save_file({"a": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"index\.json (cannot be read|names no).*fetch it again"):
        loaded_from(folder)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(UP, torch.complex64), (NORM, torch.int8), (NORM, torch.int32), (NORM, torch.bool)],
)
def test_other_numbers_are_no_weights(saved, name, dtype):
    folder = saved(tensors=lambda held: held | {name: held[name].to(dtype)})
    with pytest.raises(ModelError, match=f"mine holds {name} in .*names no quantization_config"):
        loaded_from(folder)


def test_a_checkpoint_of_a_hub_is_called_by_its_repository(saved, tmp_path):
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    saved(tensors=lambda held: {k: t for k, t in held.items() if k != UP}).rename(snapshot)
    with pytest.raises(ModelError, match="^owner/name is not a checkpoint of this model: it lacks"):
        load._checkpoint_net(snapshot, "float32", "cpu", {})
    (snapshot / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer of owner/name cannot be read.*drawn ids"):
        load.tokenizer_of(snapshot)


def behind_the_last(held, *, joined):
    """One more layer, which joins an embedding and a hidden state, or is like the others."""
    more = {k.replace(".3.", ".4."): t.clone() for k, t in held.items() if ".layers.3." in k}
    return held | more | ({"model.layers.4.eh_proj.weight": torch.ones(32, 64)} if joined else {})


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "glm4_moe_lite"])
def test_layers_that_draft_tokens_are_not_read(saved, model_type):
    net = checkpoints.small(model_type)
    loaded = loaded_from(saved(net, tensors=lambda held: behind_the_last(held, joined=True)))
    assert loaded.card.total_params == net.num_parameters()
    folder = saved(net, tensors=lambda held: behind_the_last(held, joined=False), name="longer")
    with pytest.raises(ModelError, match=r"it holds model\.layers\.4\.\S+, .*does not have"):
        loaded_from(folder)


@pytest.mark.parametrize("form", [{}, {"bits": 4}])
def test_a_quantisation_without_a_name_is_refused(saved, form):
    folder = saved(config={"quantization_config": form})
    with pytest.raises(ModelError, match="quant_method 'not named', which the installed"):
        loaded_from(folder)


@pytest.mark.parametrize("method", ["fp8", "mxfp8", "mxfp4"])
def test_a_form_that_the_files_do_not_have_is_not_said(saved, method):
    loaded = loaded_from(saved(config={"quantization_config": {"quant_method": method}}))
    assert "stored_form" not in loaded.source
    assert torch.equal(loaded.net.state_dict()[UP], checkpoints.llama().state_dict()[UP])


@pytest.mark.parametrize("fields", [{"model_type": "nextgen9"}, {"model_type": "x.y"}])
def test_a_type_that_the_library_does_not_know(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | fields))
    reason = f"is of model type '{fields['model_type']}', which the .*; update transformers, or use"
    with pytest.raises(ModelError, match=reason):
        load.card(str(tmp_path))
    with pytest.raises(ModelError, match=reason):
        origin.made_of(fields)


@pytest.mark.parametrize("weights", ["checkpoint", "random"])
@pytest.mark.parametrize("name", ["return_dict", "output_hidden_states", "output_attentions"])
def test_a_step_returns_what_decoding_needs_whatever_was_saved(saved, name, weights):
    folder = saved(config={name: name != "return_dict"})
    loaded = loaded_from(folder, weights=weights)
    out = loaded.net(torch.tensor([[3, 4, 5]]))
    assert {*out} == {"logits", "past_key_values"}
    assert loaded.card.kv_layers is not None


# Tokenizers


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(saved, kind):
    folder = saved()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(ModelError, match=r"no vocabulary.*or remove them \(tokenizer_config\.json"):
        loaded_from(folder)


def test_a_vocabulary_in_files_of_its_own_is_read(saved):
    folder = saved(checkpoints.small("gpt2"))
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    assert loaded_from(folder).tokenizer("abab")["input_ids"] == [2, 2]


def test_code_of_a_tokenizer_is_refused_in_our_words(saved):
    folder = saved()
    fields = {"auto_map": {"AutoTokenizer": ["tok.X", None]}, "tokenizer_class": "X"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "tok.py").write_text(checkpoints.CODE)
    with pytest.raises(ModelError, match="needs code of its own .auto_map.*never executed here"):
        loaded_from(folder)


# GGUF


def test_a_type_that_gguf_does_not_know_is_no_broken_file(net4, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", net4)
    content = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    place = content.find(name) + len(name) + 4 + 2 * 8  # after the axes and their lengths
    content[place : place + 4] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ModelError, match="of a type that the installed gguf does not know.*update"):
        loaded_from(path, weights="gguf")


def test_the_ending_of_a_gguf_file_may_be_in_capitals(net4, tmp_path):
    path = write_gguf(tmp_path / "x.GGUF", net4)
    assert loaded_from(path, weights="gguf").weights == "gguf"


def rotations(path, net, *, factors=None, kind=None, monkeypatch):
    """A GGUF file whose rotary positions are stretched."""
    gguf = pytest.importorskip("gguf")
    write = gguf.GGUFWriter.write_header_to_file

    def more(self):
        if kind:
            self.add_rope_scaling_type(gguf.RopeScalingType(kind))
            self.add_rope_scaling_factor(4.0)
        if factors is not None:
            self.add_rope_freq_base(5e5)
            self.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
        write(self)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", more)
    return write_gguf(path, net)


def test_rotations_of_llama_3_are_stretched_as_the_file_says(net4, tmp_path, monkeypatch):
    stretch = gguf_fields._LLAMA3 | {"factor": 8.0, "rope_theta": 5e5}
    config = AutoConfig.for_model("llama", **LLAMA, rope_parameters=stretch)
    own = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 5e5 ** -(torch.arange(0, 8, 2) / 8)
    factors = (plain / own).numpy()
    assert factors.round(1).tolist() == pytest.approx([1.0, 1.0, 2.7, 8.0])
    path = rotations(tmp_path / "x.gguf", net4, factors=factors, monkeypatch=monkeypatch)
    loaded = loaded_from(path, weights="gguf")
    assert torch.allclose(loaded.net.model.rotary_emb.inv_freq, own)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"kind": "yarn"}, "yarn"), ({"kind": "longrope"}, "longrope"),
     ({"factors": [1, 2, 3, 4]}, "by a tensor"), ({"factors": [3, 3]}, "by a tensor")],
)  # fmt: skip
def test_other_stretched_rotations_are_refused(net4, tmp_path, monkeypatch, changes, reason):
    path = rotations(tmp_path / "x.gguf", net4, **changes, monkeypatch=monkeypatch)
    with pytest.raises(ModelError, match=f"x.gguf stretches its rotary positions .{reason}.*give"):
        loaded_from(path, weights="gguf")


def test_rotations_stretched_by_a_number_are_read(net4, tmp_path, monkeypatch):
    path = rotations(tmp_path / "x.gguf", net4, kind="linear", monkeypatch=monkeypatch)
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    loaded = loaded_from(path, weights="gguf")
    assert torch.allclose(loaded.net.model.rotary_emb.inv_freq, plain / 4)


def test_a_number_stretches_the_layers_without_a_window_only(net4, tmp_path, monkeypatch):
    """As Gemma 3 does."""
    config = AutoConfig.for_model("gemma3_text")
    before = dict(config.rope_parameters["sliding_attention"])
    path = rotations(tmp_path / "x.gguf", net4, kind="linear", monkeypatch=monkeypatch)
    gguf_fields.set_fields(path, config)
    full = config.rope_parameters["full_attention"]
    assert (full["rope_type"], full["factor"]) == ("linear", 4.0)
    assert config.rope_parameters["sliding_attention"] == before


def test_rotations_that_are_not_stretched_are_left(net4, tmp_path, monkeypatch):
    path = rotations(tmp_path / "x.gguf", net4, kind="none", factors=[1] * 4,
                     monkeypatch=monkeypatch)  # fmt: skip
    assert loaded_from(path, weights="gguf").net.config.rope_parameters["rope_type"] == "default"


def fields_of(path, net, monkeypatch, **numbers):
    """A GGUF file that says more of its architecture."""
    gguf = pytest.importorskip("gguf")
    write = gguf.GGUFWriter.write_header_to_file

    def more(self):
        for name, number in numbers.items():
            getattr(self, f"add_{name}")(number)
        write(self)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", more)
    return write_gguf(path, net)


@pytest.mark.parametrize("model_type", ["starcoder2", "mistral", "phi3", "gemma2"])
def test_windows_of_a_gguf_are_kept(net4, tmp_path, monkeypatch, model_type):
    """The file is of 64 positions; where its window is as long, it is none."""
    config = AutoConfig.for_model(model_type)
    before = config.sliding_window
    gguf_fields.set_fields(write_gguf(tmp_path / "none.gguf", net4), config)
    assert config.sliding_window == before
    path = fields_of(tmp_path / "x.gguf", net4, monkeypatch, sliding_window=16)
    gguf_fields.set_fields(path, config)
    assert config.sliding_window == 16


def test_a_window_where_no_layer_has_one_is_refused(net4, tmp_path, monkeypatch):
    path = fields_of(tmp_path / "x.gguf", net4, monkeypatch, sliding_window=16)
    with pytest.raises(ModelError, match="x.gguf says .* last 16 tokens, .* for llama; give the"):
        loaded_from(path, weights="gguf")
    with pytest.raises(ModelError, match="aside for qwen2"):  # none of its layers slides
        gguf_fields.set_fields(path, AutoConfig.for_model("qwen2"))


def test_a_window_as_long_as_the_context_is_none(net4, tmp_path, monkeypatch):
    path = fields_of(tmp_path / "x.gguf", net4, monkeypatch, sliding_window=64)
    assert loaded_from(path, weights="gguf").card.window is None


@pytest.mark.parametrize("model_type", ["starcoder2", "stablelm", "llama"])
def test_the_base_of_rotations_is_that_of_the_file(net4, tmp_path, monkeypatch, model_type):
    config = AutoConfig.for_model(model_type)
    path = fields_of(tmp_path / "x.gguf", net4, monkeypatch, rope_freq_base=777.0)
    gguf_fields.set_fields(path, config)
    assert config.rope_parameters["rope_theta"] == 777.0
