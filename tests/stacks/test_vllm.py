"""The engine's parent side against a process that behaves and one that misbehaves."""

from __future__ import annotations

import functools
import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib.files import ROOT
from lib.measure import vllm as rows
from lib.measure import vllm_gate, vllm_logits
from lib.models import draws
from lib.models import experts as models_experts
from lib.models.card import ModelError
from lib.models.draws import Draw, Law
from lib.models.load import card
from lib.models.origin import config_of, find
from lib.run import profiles
from lib.stacks import logits_check, vllm_checks, vllm_settings
from lib.stacks import vllm as vllm_stack
from lib.stacks.engine_process import EngineError, tail
from lib.stacks.vllm import VllmEngine
from lib.stacks.vllm_settings import Settings
from tests.fakes.device import FakeDevice

FAKE = ROOT / "tests" / "fakes" / "vllm.py"
IDS = [[10, 11, 12], [20, 21, 22]]


def start(tmp_path, how="behaves", start_limit_s=30, device=None, **settings):
    return VllmEngine(
        "tiny-qwen3",
        config_of(find("tiny-qwen3")),
        card("tiny-qwen3"),
        Settings(max_model_len=64, max_num_seqs=4, **settings),
        folder=tmp_path,
        python=sys.executable,
        command=[sys.executable, str(FAKE), how],
        start_limit_s=start_limit_s,
        device=device,
    )


@pytest.fixture
def engine(tmp_path):
    with start(tmp_path) as engine:
        yield engine


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int, within_s: float = 10.0) -> bool:
    end_s = time.monotonic() + within_s
    while any(alive(pid) for pid in pids) and time.monotonic() < end_s:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


def test_a_call_gives_the_tokens_and_what_the_scheduler_said(engine):
    out = engine(IDS, 3)
    assert out.tokens.tolist() == [[10, 11, 12], [20, 21, 22]]
    assert out.engine_s == pytest.approx(0.001) and out.scheduler["running"] == 2
    assert out.prepare_s == 0.0 and out.cache is None and out.decode_s is None
    assert engine(torch.tensor(IDS), 3).tokens.shape == (2, 3)


def test_tokens_are_told_one_by_one(engine):
    told = []
    out = engine(IDS, 4, on_token=lambda: told.append(1))
    assert len(told) == 4 and out.tokens.shape == (2, 4)


def test_prompts_are_sent_once(engine, monkeypatch):
    asked, ask = [], engine.process.ask
    monkeypatch.setattr(
        engine.process, "ask", lambda op, *a, **k: asked.append(op) or ask(op, *a, **k)
    )
    for _ in range(3):
        engine(IDS, 2)
    engine([[5, 6, 7]], 2)
    assert asked == ["prompts", "generate", "generate", "generate", "prompts", "generate"]


def test_old_prompts_make_room_and_are_sent_again(engine):
    many = [[[number, 1]] for number in range(vllm_stack.KEPT_PROMPTS + 3)]
    for _ in range(2):
        for ids in many:
            assert engine(ids, 2).tokens.tolist() == [[ids[0][0], ids[0][0] + 1]]
    assert len(engine._prompts) <= vllm_stack.KEPT_PROMPTS


def test_what_is_printed_is_no_answer(tmp_path):
    with start(tmp_path, "prints") as engine:
        assert engine(IDS, 2).tokens.shape == (2, 2)
    assert "not an answer" in (tmp_path / "vllm.log").read_text()


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("dies", r"ended during 'generate' \(exit code 7\)[\s\S]*CUDA error: out of memory"),
        ("short", r"3 new tokens in each of 2 sequences, got \[2, 2\]"),
        ("long", r"3 new tokens in each of 2 sequences, got \[4, 4\]"),
        ("ragged", r"3 new tokens in each of 2 sequences, got \[3, 2\]"),
        ("too-few", r"3 new tokens in each of 2 sequences, got \[3\]"),
        ("lacking", r"the engine's answer to 'generate' lacks scheduler"),
        ("half", r"ended during 'generate'|which is no JSON object"),
        ("babbles", r"b'INFO warming up', which is no JSON object"),
        ("wrong-op", r"answered .*'memory'.* when asked 'generate'"),
        ("queued", r"2 sequences were not held at once: 0 preempted, 3 steps .*25% full"),
        ("preempted", r"3 preempted"),
        ("prefix_hits", r"3 prompt tokens came from a prefix cache"),
    ],
)
def test_an_engine_that_misbehaves_is_a_clear_error(tmp_path, how, text):
    with start(tmp_path, how) as engine, pytest.raises(EngineError, match=text):
        engine(IDS, 3)


def test_the_end_of_an_engine_is_told_also_where_its_parameters_were_to_be_restored(tmp_path):
    cause = pytest.raises(EngineError, match="ended during 'generate'")
    with start(tmp_path, "dies") as engine, cause, engine.pinned({"bias": [0.0]}):
        engine(IDS, 3)


def test_an_engine_that_hangs_is_given_up_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_stack, "CALL_LIMIT_S", 0.3)
    engine = start(tmp_path, "hangs")
    pid = engine.process.popen.pid
    with pytest.raises(EngineError, match="no answer to 'generate' within 0.3 s"):
        engine(IDS, 3)
    assert gone(pid)
    with pytest.raises(EngineError, match="was ended before 'generate': start another"):
        engine(IDS, 3)


@pytest.mark.parametrize(
    ("how", "settings", "text"),
    [
        ("dies-at-start", {}, r"ended during 'start' \(killed by SIGKILL\)"),
        ("unlike", {}, "answer to 'start' lacks worker"),
        ("refuses", {}, "refused 'start': RuntimeError: no kernel image"),
        ("no-plugin", {}, "did not draw its weights by name: .*VLLM_PLUGINS"),
        ("caches", {}, "caches prefixes"),
        ("behaves", {"form": "fp8"}, "asked in fp8, but the engine holds them in bfloat16"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_never_starts(tmp_path, how, settings, text):
    with pytest.raises(EngineError, match=text):
        start(tmp_path, how, **settings)


def test_an_engine_that_hangs_at_its_start_is_given_up_and_ended(tmp_path):
    with pytest.raises(EngineError, match="no answer to 'start' within 0.5 s"):
        start(tmp_path, "hangs-at-start", start_limit_s=0.5)
    log = (tmp_path / "vllm.log").read_text().splitlines()
    assert gone(*(int(line.split()[1]) for line in log if line.startswith("child")))


def test_nothing_is_left_behind(tmp_path):
    """Neither a child in the group nor one that left it."""
    engine = start(tmp_path, "children")
    log = (tmp_path / "vllm.log").read_text().splitlines()
    children = [int(line.split()[1]) for line in log if line.startswith("child")]
    assert len(children) == 2 and all(map(alive, children))
    engine.close()
    assert gone(*children, engine.process.popen.pid)
    engine.close()  # again does no harm


def test_everything_ends_with_a_parent_that_is_killed(tmp_path):
    """In the middle of a call, so that the engine does not see its input end."""
    code = f"""if True:
        import sys, threading, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tests.stacks.test_vllm import start
        engine = start(Path({str(tmp_path)!r}), "children")
        threading.Thread(target=engine, args=([[1, 2]], 2), daemon=True).start()
        while len(engine._prompts) == 0:
            time.sleep(0.01)
        time.sleep(0.2)
        print(engine.process.popen.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    guard = int(parent.stdout.readline())
    log = (tmp_path / "vllm.log").read_text().splitlines()
    children = [int(line.split()[1]) for line in log if line.startswith("child")]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert gone(*children, guard)


def test_an_engine_that_is_let_go_ends(tmp_path):
    engine = start(tmp_path)
    pid = engine.process.popen.pid
    assert alive(pid)
    del engine
    assert gone(pid)


def test_the_environment_has_our_folder_and_no_telemetry(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "for/this/interpreter")
    monkeypatch.setenv("VLLM_PYTHONPATH", os.pathsep.join(["unpacked", "/also"]))
    folder = vllm_settings.lay_out(tmp_path)
    env = vllm_settings.environment(folder)
    # The engine works in that folder, and what it starts finds the packages all the same.
    packages = [str(tmp_path), str(Path("unpacked").absolute()), "/also"]
    assert env["PYTHONPATH"] == os.pathsep.join(packages)
    assert env["VLLM_NO_USAGE_STATS"] == env["DO_NOT_TRACK"] == env["HF_HUB_OFFLINE"] == "1"
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("vllm_engine.py", "vllm_inspect.py", "vllm_weights.py", "draws.py"),
        *("METADATA", "entry_points.txt"),
    }


def test_gpus_add_up_without_multicast_unless_it_is_asked_for(tmp_path, monkeypatch):
    """What a host sets against it reaches the engine too."""
    monkeypatch.delenv("VLLM_ALLREDUCE_USE_SYMM_MEM", raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    env = vllm_settings.environment(tmp_path)
    assert env["VLLM_ALLREDUCE_USE_SYMM_MEM"] == env["NCCL_NVLS_ENABLE"] == "0"
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "1")
    assert vllm_settings.environment(tmp_path)["VLLM_ALLREDUCE_USE_SYMM_MEM"] == "1"


def test_the_processes_of_an_engine_find_each_other_without_a_network(tmp_path, monkeypatch):
    for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    env = vllm_settings.environment(tmp_path)
    assert (env["VLLM_HOST_IP"], env["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert vllm_settings.environment(tmp_path)["GLOO_SOCKET_IFNAME"] == "eth0"


def test_two_engines_of_one_kind_are_told_the_same_model(tmp_path):
    """vLLM finds what it compiled by a key that holds the model's path, which is of no folder that
    differs; a checkpoint is told in full, since the engine works elsewhere."""
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        settings = Settings(max_model_len=64, max_num_seqs=4)
        model = vllm_settings.arguments_of({}, [], settings, folder)["model"]
        assert vllm_stack.model_path(model, folder) == "model-bfloat16"
    assert vllm_stack.model_path("some/checkpoint", folder) == str(
        Path("some/checkpoint").absolute()
    )


def test_the_engine_works_in_its_own_folder(tmp_path):
    """Where the model is stated to it, by its name alone."""
    place = vllm_settings.lay_out(tmp_path)
    (place / "sitecustomize.py").write_text(
        "import os; os.fork = lambda: print(os.getcwd()) or exit()"
    )
    run = subprocess.run(
        [sys.executable, str(place / "vllm_engine.py"), "1", "2"],
        env=vllm_settings.environment(place), cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.strip() == str(place.resolve()), run.stderr


def test_an_entry_point_in_that_folder_is_seen_by_an_interpreter(tmp_path):
    """As vLLM looks for plugins; no package is installed."""
    env = vllm_settings.environment(vllm_settings.lay_out(tmp_path))
    code = (
        "from importlib.metadata import entry_points; "
        "[e] = entry_points(group='vllm.general_plugins', name='drawn_weights'); "
        "print(e.load().__module__)"
    )
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == "vllm_weights", run.stderr


def test_the_interpreter_is_named_or_built(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    with pytest.raises(EngineError, match="make vllm.*VLLM_PYTHON=path"):
        vllm_settings.interpreter(tmp_path)
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert vllm_settings.interpreter(tmp_path) == str(python)
    monkeypatch.setenv("VLLM_PYTHON", "elsewhere/python")
    assert vllm_settings.interpreter(tmp_path) == "elsewhere/python"


def test_the_model_is_stated_to_vllm_without_a_checkpoint(tmp_path):
    config = config_of(find("tiny-gpt-oss"))
    settings = Settings(max_model_len=64, max_num_seqs=4, form="mxfp4", seed=3)
    data = vllm_settings.config_of(config, "GptOssForCausalLM", settings)
    plan = [Draw("model.norm.weight", (64,), "bfloat16", Law("constant", 1.0))]
    arguments = vllm_settings.arguments_of(data, plan, settings, tmp_path)
    written = json.loads((Path(arguments["model"]) / "config.json").read_text())
    assert written["architectures"] == ["GptOssForCausalLM"] and written["num_local_experts"] == 8
    assert written["quantization_config"]["quant_method"] == "mxfp4"
    assert arguments["load_format"] == "drawn" and arguments["enable_prefix_caching"] is False
    extra = arguments["model_loader_extra_config"]
    assert extra["form"] == "mxfp4" and json.loads(Path(extra["plan"]).read_text())["seed"] == 3
    assert arguments["compilation_config"]["cudagraph_capture_sizes"][-1] == 64


def test_fp8_and_dummy_and_vllms_own_choices(tmp_path):
    def made(**settings):
        settings = Settings(max_model_len=64, max_num_seqs=4, **settings)
        return vllm_settings.arguments_of({}, [], settings, tmp_path)

    assert made(form="fp8")["quantization"] == "fp8" and "quantization" not in made()
    dummy = made(weights="dummy", enforce_eager=True)
    assert dummy["load_format"] == "dummy" and "model_loader_extra_config" not in dummy
    assert "compilation_config" not in dummy and "max_num_batched_tokens" not in dummy
    assert made(max_num_batched_tokens=8192)["max_num_batched_tokens"] == 8192
    assert made(more={"kv_cache_dtype": "fp8"})["kv_cache_dtype"] == "fp8"
    real = made(weights="checkpoint", checkpoint="some/folder")
    assert real["model"] == "some/folder" and real["load_format"] == "safetensors"
    for wrong in ({"form": "int3"}, {"weights": "trained"}):
        with pytest.raises(EngineError, match="unknown"):
            made(**wrong)
    with pytest.raises(EngineError, match="need its folder"):
        made(weights="checkpoint")


EXPERTS = [
    Draw("model.layers.0.mlp.experts.down_proj", (4, 10, 100), "bfloat16", Law("normal", 0, 1)),
    Draw("model.embed_tokens.weight", (100, 10), "bfloat16", Law("normal", 0, 1)),
]
DENSE = [
    Draw("model.layers.0.mlp.down_proj.weight", (40, 100), "bfloat16", Law("normal", 0, 1)),
    Draw("lm_head.weight", (100, 10), "bfloat16", Law("normal", 0, 1)),
]


@pytest.mark.parametrize(
    ("experts", "method", "form"),
    [
        ({"bfloat16": 8000}, "UnquantizedFusedMoEMethod TRITON", "bfloat16"),
        ({"bfloat16": 8000}, "Mxfp4MoEMethod", "bfloat16"),  # named so, and holding 16 bits
        ({"uint8": 2125, "bfloat16": 100}, "Mxfp4MoEMethod MARLIN", "mxfp4"),
        ({"float32": 20}, "Mxfp4MoEMethod", "an unknown form (0.0 bits a value found)"),
        ({"float8_e4m3fn": 4000, "float32": 16}, "Fp8MoEMethod", "fp8"),
    ],
)
def test_a_form_is_what_memory_holds(experts, method, form):
    """4,000 values: 8,000 bytes are 16 bits each, 2,225 are 4.45, 4,016 are 8.03."""
    worker = {
        "experts": {method: 24},
        "linear": {"UnquantizedLinearMethod": 96},
        "parameter_bytes": {"experts": experts, "embeddings": {"bfloat16": 2000}},
    }
    assert vllm_checks.form_in_use(worker, EXPERTS) == form


def test_tables_of_positions_are_no_form_of_weights():
    """As of a small model that may be asked at 131,072 positions."""
    parts = {"rest": {"bfloat16": 900}, "experts": {"bfloat16": 8000}, "tables": {"float32": 10**8}}
    methods = {"UnquantizedFusedMoEMethod CPU": 4}
    worker = {"experts": methods, "linear": {}, "parameter_bytes": parts}
    assert vllm_checks.form_in_use(worker, EXPERTS) == "bfloat16"


def test_the_form_of_a_dense_model_is_that_of_its_linear_layers():
    worker = {
        "experts": {},
        "linear": {"Fp8PerTensorOnlineLinearMethod": 4, "UnquantizedEmbeddingMethod": 2},
        "parameter_bytes": {"rest": {"float8_e4m3fn": 4000}, "embeddings": {"bfloat16": 2000}},
    }
    assert vllm_checks.form_in_use(worker, DENSE) == "fp8"


def test_a_row_says_what_changes_speed(engine):
    row = rows.measured(engine, IDS, new_tokens=3, repeats=2, env_id="e")
    assert row.error is None and row.kind == "latency" and row.env_id == "e"
    assert row.key["stack"] == "vllm" and row.key["dtype"] == "bfloat16"
    assert (row.key["batch"], row.key["context"], row.key["new_tokens"]) == (2, 3, 3)
    assert row.key["attention"] == "FAKE_ATTN" and row.key["weights"] == "random"
    assert len(row.samples["e2e_s"]) == len(row.samples["warmup_s"]) == 2
    assert row.samples["engine_s"] == pytest.approx([0.001, 0.001])
    assert row.values["engine_vllm"] == "0.0.1" and row.values["engine_max_num_seqs"] == 4
    assert row.values["engine_cudagraph_sizes"] == [1, 2, 4]
    assert row.values["cache_used_bytes"] == 250  # a quarter of 1,000
    assert row.values["prefix_hits"] == 0 and row.values["draws_generator"] == "splitmix64-q16"
    first = rows.measured(engine, IDS, new_tokens=1, repeats=2, env_id="e")
    assert "ttft_s" in first.samples and "e2e_s" not in first.samples


def test_timed_calls_are_made_again_after_one_that_compiled(tmp_path):
    """Two calls warm the shape up, two are timed, and the third timed one, the fifth of all,
    compiles: all five were warm-up, and two more, so that three clean ones are timed."""
    with start(tmp_path, "compiles-late") as engine:
        row = rows.measured(engine, IDS, new_tokens=3, repeats=3, env_id="e")
    assert row.error is None and len(row.samples["e2e_s"]) == len(row.samples["engine_s"]) == 3
    assert len(row.samples["warmup_s"]) == 7 and row.values["prepare_s"] == pytest.approx(0.001)


def test_a_shape_that_compiles_in_every_call_fails_the_row(tmp_path):
    with start(tmp_path, "compiles") as engine:
        row = rows.measured(engine, IDS, new_tokens=3, repeats=2, env_id="e")
    assert row.samples == {} and "still compiles after 24 calls of this shape" in row.error


@pytest.mark.parametrize("cold", [0, 1, 2, 3])
def test_a_window_is_measured_again_until_nothing_is_compiled_in_it(cold):
    windows, asked = [], iter([False, *[True] * cold, *[False] * 4])
    model = SimpleNamespace(something_compiled=asked.__next__)
    if cold < 3:
        assert rows.while_warm(model, lambda: windows.append(1) or "joules") == "joules"
        assert len(windows) == cold + 1
    else:
        with pytest.raises(EngineError, match="inside a window, 3 times in a row"):
            rows.while_warm(model, lambda: windows.append(1))
    assert rows.while_warm(object(), lambda: 5) == 5  # what is no engine compiles nothing


def test_a_shape_is_warmed_up_until_two_calls_compile_nothing(tmp_path):
    """The first and the third call compile, so that the fifth is the last to warm up."""
    with start(tmp_path, "compiles-at-first") as engine:
        row = rows.measured(engine, IDS, new_tokens=3, repeats=2, env_id="e")
        assert len(row.samples["warmup_s"]) == 5 and len(row.samples["e2e_s"]) == 2
        assert row.values["prepare_s"] == pytest.approx(0.002)
    with start(tmp_path, "compiles") as engine:
        for _ in range(3):
            engine(IDS, 3)
        row = rows.measured(engine, IDS, new_tokens=3, repeats=2, env_id="e", most_warmup_calls=4)
    assert "still compiles after 4 calls" in row.error


def test_a_queued_sequence_fails_the_row(tmp_path):
    with start(tmp_path, "queued") as engine:
        row = rows.measured(engine, IDS, new_tokens=3, repeats=2, env_id="e")
    assert row.samples == {} and row.error.startswith("EngineError: 2 sequences were not held")


def test_the_start_is_told_by_its_parts_and_memory_in_columns(engine):
    engine(IDS, 2)
    before = engine.start_row("e")
    assert before.values["import_s"] == 2.0 and before.values["engine_start_s"] == 7.0
    assert before.values["load_s"] == 1.5 and before.values["drawn_s"] == 0.5
    assert before.values["weights_bytes"] == 192 and before.values["cache_reserved_bytes"] == 1000
    assert set(before.missing) == {
        *("used_bytes", "cache_used_bytes"), *("compile_s", "capture_s", "init_s"),
    }  # fmt: skip
    rows.measured(engine, IDS, new_tokens=3, repeats=1, env_id="e")
    assert engine.start_row("e").values["cache_used_bytes"] == 250


class TwoBoards(FakeDevice):
    """Boards that have 10 and 20 bytes in use before the start, 110 and 220 after it; on the first
    one somebody else's process runs, and after the start two more."""

    def __init__(self) -> None:
        super().__init__()
        used, listed = ([10, 110], [20, 220]), ([1, 3], [0, 1])
        self.boards = [
            SimpleNamespace(gpu_used_bytes=iter(b).__next__, process_count=iter(p).__next__)
            for b, p in zip(used, listed, strict=True)
        ]


def test_a_sharded_engine_tells_of_each_board_and_their_sum(tmp_path):
    device = TwoBoards()
    with start(tmp_path, device=device, devices=2) as engine:
        row = engine.start_row("e")
        timed = rows.measured(engine, IDS, new_tokens=3, repeats=2, env_id="e")
    assert device.own_processes == [2, 1]
    assert row.values["used_bytes"] == 300 and row.values["board_used_bytes"] == [100, 200]
    assert row.values["weights_bytes"] == 192 and row.values["board_weights_bytes"] == [96, 96]
    assert row.values["board_cache_reserved_bytes"] == [500, 500]
    assert row.key["devices"] == timed.key["devices"] == 2 and timed.error is None


def test_an_engine_on_one_gpu_names_no_boards(engine):
    row = engine.start_row("e")
    assert row.key["devices"] is None and not any(n.startswith("board_") for n in row.values)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("one-gpu", "asked for devices: 2 and runs on 1"),
        ("other-draws", "drew different weights .weights-0, weights-1"),
    ],
)
def test_an_engine_that_does_not_shard_one_model_is_refused(tmp_path, how, text):
    with pytest.raises(EngineError, match=text):
        start(tmp_path, how, devices=2)


def test_gpus_are_asked_for_where_there_are_several(tmp_path):
    def arguments(devices):
        settings = Settings(max_model_len=64, max_num_seqs=4, devices=devices)
        return vllm_settings.arguments_of({}, [], settings, tmp_path)

    assert arguments(2)["tensor_parallel_size"] == 2
    assert "tensor_parallel_size" not in arguments(1)  # as it was, so that it is the same engine


@pytest.mark.parametrize("devices", [3, 5])
def test_heads_that_cannot_be_shared_evenly_are_refused(devices):
    vllm_settings.require_runs(find("tiny-qwen3"), "random", "bfloat16", 2)
    with pytest.raises(ModelError, match=f"8 attention heads .* devices: {devices};.*divides 8"):
        vllm_settings.require_runs(find("tiny-qwen3"), "random", "bfloat16", devices)


OF_80_GB = 85.03e9  # bytes that CUDA tells of an H100, of which vLLM takes a share
BESIDE = 2.3e9  # what it held beside weights and cache in every start that was measured on one


def held_card(name, form):
    return vllm_settings.held_card(find(name), form)


@pytest.mark.parametrize("name", ["vllm", "two-gpus"])
def test_every_engine_of_a_profile_has_room_for_its_calls(name):
    """On one H100 of 80 GB, or its shares on two."""
    profile, card_of = profiles.profile(name), functools.cache(held_card)
    for choice in profile.choices:
        for notebook in choice.notebooks:
            values = profile.parameters(notebook, choice)
            card = card_of(choice.model, values["dtype"])
            lengths = values["new_tokens"]
            contexts = [values["context"]] if notebook == "batch" else values["contexts"]
            tokens = max(contexts) + max(lengths if isinstance(lengths, list) else [lengths])
            batch = max(values.get("batch_sizes", [1]))
            room = choice.devices * (Settings(1, 1).gpu_memory_utilization * OF_80_GB - BESIDE)
            needed = card.weight_bytes + card.kv_bytes(tokens, batch)
            assert needed < room, (choice.model, notebook, needed / 1e9, room / 1e9)


H100 = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_total_bytes": 85 * 10**9}


@pytest.mark.parametrize(
    ("name", "weights", "gb", "count", "layers", "text"),
    [
        # 36 layers of 6.4 GB and 2.3 GB of embeddings and output matrix
        ("gpt-oss-120b", "random", 85, 1, 8, ""),
        ("gpt-oss-120b", "random", 85, 2, 8, ""),
        ("gpt-oss-120b", "random", 40, 2, 4, ""),  # 27.9 of 32 GB
        ("gpt-oss-120b", "random", 17, 1, 0, "takes 234 GB in bfloat16, and one NVIDIA .* has 17"),
        ("gpt-oss-120b", "checkpoint", 85, 1, 0, "takes 234 GB in bfloat16"),
        ("Qwen3-32B", "random", 85, 2, 0, ""),
    ],
)
def test_of_a_net_that_no_gpu_holds_the_first_layers_are_compared(
    name, weights, gb, count, layers, text
):
    one = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_total_bytes": gb * 10**9}
    env = one
    if count > 1:
        env = {"gpu": "2 x", "gpu_total_bytes": count * gb * 10**9, "devices": count}
        env["boards"] = [one] * count
    held, why = vllm_logits.layers_that_fit(find(name), weights, env)
    assert held == layers and bool(why) == bool(text) and re.search(text, why)


def test_what_is_not_compared_has_a_gate_that_says_so(engine, monkeypatch):
    monkeypatch.setattr(vllm_gate, "computed", lambda *a: pytest.fail("our net was computed"))
    engine.unchecked = "its logits are not checked: too large"
    (gate,) = vllm_logits.gates(engine, "e")
    batches = [{"ids": IDS, "sampled": {"tokens": [[1], [2]]}}]
    (of_batch,) = vllm_logits.batch_gates(engine, batches, "e")
    assert gate.error == of_batch.error == engine.unchecked and not gate.samples
    assert (of_batch.key["batch"], of_batch.key["context"]) == (2, 3)


RECORDED = (121943, 58445, 91410, 129349, 162728, 101262, 48600, 121560)
EXCHANGE = ROOT / "tests" / "data" / "vllm-exchange.jsonl.gz"


def test_what_a_real_engine_answered_is_read_as_it_was_meant(tmp_path):
    """vLLM 0.25.1 with gpt-oss-20b on an H100: its start, a prefill that was compared with our net,
    one token and 64 tokens at 2,048. The requests are what they were, prompts included."""
    engine = VllmEngine(
        "gpt-oss-20b",
        config_of(find("gpt-oss-20b")),
        card("gpt-oss-20b"),
        Settings(2304, 64, max_num_batched_tokens=8192, gpu_memory_utilization=0.94),
        folder=tmp_path,
        python=sys.executable,
        command=[sys.executable, str(FAKE), str(EXCHANGE)],
        start_limit_s=30,
    )
    with engine:
        assert engine.form == "bfloat16"
        assert engine.key()["attention"] == "FLASH_ATTN"
        assert engine.key()["experts"] == "UnquantizedFusedMoEMethod TritonExperts TRITON"
        worker = engine.started["worker"]
        assert worker["loaded"]["values"] == sum(math.prod(d.shape) for d in engine.plan)
        assert worker["loaded"]["digest"] == draws.digest(engine.plan, 0)
        short = engine.prompt(128, seed=0)
        found = engine.logprobs(short, [list(RECORDED)])
        assert len(found) == 8 and all(-20 < value < -5 for value in found)
        ids = engine.prompt(2048, seed=0)
        first = rows.measured(engine, ids, new_tokens=1, repeats=6, env_id="e")
        # The first call compiled a kernel, so that a third one warmed up.
        assert len(first.samples["warmup_s"]) == 3 and first.values["prepare_s"] > 0.01
        assert all(0.040 < seconds < 0.050 for seconds in first.samples["engine_s"])
        assert "cache_used_bytes" in first.missing
        whole = rows.measured(engine, ids, new_tokens=64, repeats=7, env_id="e")
        assert whole.error is None and len(whole.samples["engine_s"]) == 7
        assert whole.values["steps"] == 64 and whole.values["prefix_queries"] == 0
        assert 5e7 < whole.values["cache_used_bytes"] < 6e7


def test_an_exchange_is_recorded_as_it_can_be_played_again(tmp_path, monkeypatch):
    """What the fake answers is recorded; played again, it is answered the same."""
    monkeypatch.setenv("VLLM_RECORD", str(tmp_path / "exchange.jsonl"))
    with start(tmp_path) as engine:
        tokens = engine(IDS, 3).tokens.tolist()
    monkeypatch.delenv("VLLM_RECORD")
    lines = (tmp_path / "exchange.jsonl").read_bytes()
    (tmp_path / "exchange.jsonl.gz").write_bytes(gzip.compress(lines))
    with start(tmp_path, str(tmp_path / "exchange.jsonl.gz")) as engine:
        assert engine(IDS, 3).tokens.tolist() == tokens
        with pytest.raises(EngineError, match="refused 'generate'"):
            engine(IDS, 3)  # no more was recorded


def test_engines_that_differ_in_speed_have_other_names(tmp_path):
    with start(tmp_path / "a") as first, start(tmp_path / "b") as second:
        assert first.engine_id == second.engine_id
        second.started["settings"]["max_num_batched_tokens"] = 2048
        assert first.engine_id != second.engine_id


def test_seconds_are_read_from_the_log(tmp_path):
    log = tmp_path / "vllm.log"
    log.write_text(
        "INFO [gpu_model_runner.py] Model loading took 39.0 GiB memory and 6.250000 seconds\n"
        "INFO [monitor.py] torch.compile took 21.50 s in total\n"
        "INFO [gpu_model_runner.py] Graph capturing finished in 4 secs, took 0.30 GiB\n"
        "INFO [core.py] init engine (profile, create kv cache, warmup model) took 40.25 s "
        "(compilation: 21.50 s)\n"
    )
    found = vllm_stack.logged(log)
    seconds = {"load_s": 6.25, "compile_s": 21.5, "capture_s": 4.0, "init_s": 40.25}
    assert found == seconds | {"model_bytes": 39 * 2**30}
    assert set(vllm_stack.logged(tmp_path / "none").values()) == {None}


def test_the_end_of_a_log_leads_with_the_cause(tmp_path):
    log = tmp_path / "vllm.log"
    log.write_text("\n".join(["ValueError: no room for 3 blocks", *["noise"] * 40]))
    assert tail(log).splitlines()[:2] == ["ValueError: no room for 3 blocks", "noise"]
    log.write_text("")
    assert tail(log) == "(empty)"


def test_distinct_experts_of_a_step_are_counted_over_the_batch():
    """Two sequences, a prompt of one token, two steps, two layers, two experts a token."""
    first = [[[9, 8], [9, 8]], [[0, 1], [2, 3]], [[0, 1], [0, 1]]]
    second = [[[7, 6], [7, 6]], [[1, 2], [2, 3]], [[2, 3], [4, 5]]]
    assert rows.distinct_experts([first, second], context=1) == [2.5, 4.0]
    with pytest.raises(EngineError, match="does not capture"):
        rows.distinct_experts([[[[0, 0]], [[0, 0]]]], context=1)


def logits(*rows):
    return torch.tensor([rows])


EXPECTED = logits([1.0, 2.0, 2.0], [2.0, 1.0, 2.0])  # of norm 3
AGAIN = logits([1.0, 2.0, 2.015], [2.0, 1.015, 2.0])  # half a percent off


def seen(found, how=""):
    return vllm_logits.look(found, EXPECTED, AGAIN, dtype="bfloat16", layers=4, how=how)


def test_the_gate_passes_rounding_and_tells_both_looks():
    near, free = (seen(logits([1.0, 2.0, 2 + x], [2.0, 1 + x, 2.0])) for x in (0.03, 0.06))
    row = vllm_logits.gate_row(
        {"stack": "vllm"}, [near], free=free, pinned_experts=4, values={"a": 1}, env_id="e"
    )
    assert row.kind == "gate" and row.key == {"stack": "vllm", "new_tokens": 2}
    assert row.values["mean_error"] == pytest.approx(0.01, rel=1e-3)
    assert row.values["floor_error"] == pytest.approx(0.005, rel=1e-3)
    assert row.values["allowed_error"] == 2**-8 * 8 and row.values["same_choice"] == 0.5
    assert row.values["free_mean_error"] == pytest.approx(0.02, rel=1e-3)
    assert row.values["pinned_experts"] == 4 and row.values["a"] == 1
    assert row.samples["free_error"] == pytest.approx([0.02, 0.02], rel=1e-3)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_gate_stops_other_work_in_any_look(wrong):
    near = seen(logits([1.0, 2.0, 2.03], [2.0, 1.03, 2.0]))
    looks, free = [near, near], near
    if wrong == 2:
        free = seen(-EXPECTED, logits_check.FREELY)
    else:
        looks[wrong] = seen(logits([2.0, 2.0, 1.0], [1.0, 2.0, 2.0]))
    allowed = "3.12%" if wrong < 2 else "70.71%"
    with pytest.raises(logits_check.GateError, match=f"where rounding explains {allowed}"):
        vllm_logits.gate_row({}, looks, free=free, pinned_experts=4, values={}, env_id="e")
    with pytest.raises(logits_check.GateError, match="nan%"):
        vllm_logits.gate_row({}, [seen(EXPECTED * float("nan"))], values={}, env_id="e")


def test_what_rounding_turns_in_routers_that_choose_freely_stops_nothing():
    """A floor of half a percent, and logits 38 % off: one choice that turned."""
    near, turned = seen(EXPECTED), seen(logits([1.0, 2.0, 3.14], [2.0, 2.14, 2.0]), ", freely")
    assert turned.mean == pytest.approx(0.38, rel=1e-2) and turned.floor < 0.01
    row = vllm_logits.gate_row({}, [near], free=turned, pinned_experts=4, values={}, env_id="e")
    assert row.values["free_mean_error"] == turned.mean


def test_the_row_of_several_rounds_tells_the_one_that_is_furthest_off():
    near, further = (seen(logits([1.0, 2.0, 2 + x], [2.0, 1 + x, 2.0])) for x in (0.03, 0.06))
    row = vllm_logits.gate_row({}, [near, further, near], pinned_experts=4, values={}, env_id="e")
    assert row.values["mean_error"] == pytest.approx(0.02, rel=1e-3)
    assert row.values["pinned_rounds"] == 3 and len(row.samples["relative_error"]) == 6


def test_every_expert_has_its_turn_under_pins():
    net, laws = draws.build(config_of(find("tiny-gpt-oss")), "float32", "cpu")
    draws.fill_net(net, laws, 0)
    rounds = [vllm_gate.barred(net, 2, seed=0, turn=n) for n in range(vllm_gate.rounds(net, 2))]
    name = "model.layers.1.mlp.router.bias"
    left = [n for one in rounds for n, v in enumerate(one[name]) if v != models_experts.BARRED]
    assert sorted(left) == list(range(8))


@pytest.mark.parametrize(
    ("name", "form"),
    [("tiny-gpt-oss", "bfloat16"), ("tiny-gpt-oss", "mxfp4"), ("tiny-qwen3", "fp8")],
)
def test_rounds_are_made_without_our_net(name, form, monkeypatch):
    """The same as those of the net with its weights, which is not made for them."""
    known = {"name": name, "weights": "random", "form": form, "seed": 3}
    whole = vllm_gate.answer_to(known, [], "cpu")
    monkeypatch.setattr(vllm_gate, "net_of", None)
    monkeypatch.setattr(vllm_gate.subprocess, "run", None)
    assert whole["barred"] and vllm_gate.computed(known, [], "cuda") == whole


def test_routers_are_barred_as_the_net_itself_is_pinned():
    net, laws = draws.build(config_of(find("tiny-gpt-oss")), "float32", "cpu")
    draws.fill_net(net, laws, 0)
    before = [bias.clone() for bias in models_experts.biases(net)]
    found = vllm_gate.barred(net, 2, seed=0)
    assert list(found) == [f"model.layers.{n}.mlp.router.bias" for n in range(4)]
    assert all(sum(value == models_experts.BARRED for value in row) == 6 for row in found.values())
    for bias, kept, row in zip(models_experts.biases(net), before, found.values(), strict=True):
        assert torch.equal(bias, kept)  # put back
        assert [v for v in row if v != models_experts.BARRED] == [
            v for v, w in zip(bias.tolist(), row, strict=True) if w != models_experts.BARRED
        ]


def test_a_batch_is_judged_by_some_ids():
    """The engine's log-probabilities are 0.1 off at one of two ids, our logits spread by 1."""
    ours = torch.tensor([[[0.0, 1.0, 2.0]]])
    exact = torch.log_softmax(ours, -1)[0, 0]
    sampled = {"ids": [0, 2], "logprobs": [[[exact[0].item() + 0.1, exact[2].item()]]]}
    errors = vllm_gate.sampled_errors(sampled, ours)
    assert errors.shape == (1, 1) and errors.item() == pytest.approx(0.1 / 2**0.5, rel=1e-4)


def test_settings_from_a_profile():
    made = vllm_settings.settings_of({"max_model_len": 64, "max_num_seqs": 4})
    assert made == Settings(64, 4)
    with pytest.raises(EngineError, match="unknown settings of vLLM \\['batch'\\]"):
        vllm_settings.settings_of({"max_model_len": 64, "max_num_seqs": 4, "batch": 1})
