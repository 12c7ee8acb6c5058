"""The loader that vLLM is given: what it yields, and how it is registered."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lib.models import draws
from lib.models.origin import config_of, find
from lib.stacks import vllm_weights


@pytest.fixture
def plan(tmp_path):
    """The plan of a tiny mixture, as a file, and the net that has the same weights."""
    net, laws = draws.build(config_of(find("tiny-gpt-oss")), "bfloat16", "cpu")
    draws.fill_net(net, laws, 5)
    path = tmp_path / "draws.json"
    path.write_text(draws.save(draws.plan_of(net, laws), 5))
    return path, net


def test_every_tensor_of_the_checkpoint_is_yielded_once(plan):
    path, net = plan
    found = list(vllm_weights.drawn(str(path)))
    wanted = dict(net.named_parameters())
    assert [name for name, _ in found] == list(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found)
    report = vllm_weights.REPORT
    assert report["tensors"] == len(wanted) and report["quantised"] == 0
    assert report["values"] == sum(p.numel() for p in wanted.values())
    assert report["generator"] == draws.GENERATOR and report["seed"] == 5


def test_the_published_form_stores_experts_in_two_tensors(plan):
    path, net = plan
    found = dict(vllm_weights.drawn(str(path), form="mxfp4"))
    layer = "model.layers.0.mlp.experts"
    assert f"{layer}.gate_up_proj" not in found
    assert found[f"{layer}.gate_up_proj_blocks"].shape == (8, 128, 2, 16)
    assert found[f"{layer}.down_proj_scales"].shape == (8, 64, 2)
    assert found[f"{layer}.down_proj_bias"].dtype == torch.bfloat16
    experts = net.model.layers[0].mlp.experts
    first = draws.from_mxfp4(
        found[f"{layer}.down_proj_blocks"][0], found[f"{layer}.down_proj_scales"][0]
    )
    draws.round_to_mxfp4(net)
    assert torch.equal(first.T, experts.down_proj[0])
    assert vllm_weights.REPORT["quantised"] == 4 * 8 * (64 * 128 + 64 * 64)


def test_experts_are_stored_without_a_whole_tensor_in_memory(plan, monkeypatch):
    """A large mixture's take gigabytes: drawn one by one they are the same to the bit."""
    path, net = plan
    drawn, tensor = [], draws.tensor
    beside = vllm_weights.sibling("draws")

    def watched(draw, *arguments):
        drawn.append((draw.name, tensor(draw, *arguments)))
        return drawn[-1][1]

    monkeypatch.setattr(beside, "tensor", watched)
    found = dict(vllm_weights.drawn(str(path), form="mxfp4"))
    assert max(len(t) for name, t in drawn if draws.is_mxfp4_name(name)) == 1
    for name, weight in net.named_parameters():
        if draws.is_mxfp4_name(name):
            for stored, whole in draws.in_mxfp4(name, weight):
                assert torch.equal(found[stored], whole)


def test_parts_of_several_gpus_are_the_whole(plan):
    """Each draws all and keeps its part, as the model's own loading cuts it: attention by heads, a
    mixture by its inner size, whose scales are those of the whole."""
    path, _ = plan
    whole = dict(vllm_weights.drawn(str(path), form="mxfp4"))
    layer, ranks = "model.layers.0", [dict(vllm_weights.drawn(str(path), "mxfp4")) for _ in "ab"]
    cuts = {
        f"{layer}.self_attn.q_proj.weight": 0,
        f"{layer}.self_attn.o_proj.weight": 1,
        f"{layer}.mlp.experts.gate_up_proj_blocks": 1,
        f"{layer}.mlp.experts.gate_up_proj_scales": 1,
        f"{layer}.mlp.experts.down_proj_blocks": 2,
        f"{layer}.mlp.experts.down_proj_scales": 2,
    }
    for name, axis in cuts.items():
        parts = [one[name].chunk(2, axis)[rank] for rank, one in enumerate(ranks)]
        assert parts[0].shape[axis] * 2 == whole[name].shape[axis]
        assert torch.equal(torch.cat(parts, axis), whole[name]), name


@pytest.fixture
def vllm(monkeypatch):
    """As much of vLLM as registering and loading touch."""
    loaders = {}

    class DefaultModelLoader:
        def load_weights(self, model, model_config):
            model.update(self.get_all_weights(model_config, model))

    def register_model_loader(name):
        return lambda loader: loaders.setdefault(name, loader)

    modules = {
        "vllm": {},
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cpu")},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {"register_model_loader": register_model_loader},
        "vllm.model_executor.model_loader.default_loader": {
            "DefaultModelLoader": DefaultModelLoader
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_weights, "end_with_parent", lambda: None)
    return loaders


def test_the_entry_point_registers_a_loader_that_draws(vllm, plan):
    path, net = plan
    vllm_weights.register()
    config = SimpleNamespace(model_loader_extra_config={"plan": str(path), "form": ""})
    loader, loaded = vllm["drawn"](config), {}
    loader.download_model(None)
    loader.load_weights(loaded, None)
    assert loaded.keys() == dict(net.named_parameters()).keys()
    assert vllm_weights.REPORT["seconds"] > 0


def test_a_process_of_vllm_ends_with_the_one_above_it():
    """The system kills it, so that it need not look."""
    if sys.platform != "linux":
        pytest.skip("only Linux ends a process with its parent")
    code = (
        "import ctypes; from lib.stacks.vllm_weights import end_with_parent; end_with_parent(); "
        "n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n)); print(n.value)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "9", run.stderr
