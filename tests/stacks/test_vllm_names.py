"""Every name of vLLM's that lib calls, overrides or reads, against those that its source has.

`tools/vllm_names.py` reads them from a version's source; only names and parameters are kept.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from lib.files import ROOT
from lib.measure import vllm as rows
from lib.measure.serving import kinds, target
from lib.stacks import vllm, vllm_engine, vllm_inspect, vllm_settings, vllm_weights
from lib.stacks.vllm_settings import Settings

NAMES = json.loads((ROOT / "tests" / "data" / "vllm-names.json").read_text(encoding="utf-8"))
FIELDS, METHODS = NAMES["fields"], NAMES["methods"]
EVERY = [
    {},
    {"form": "mxfp4"},
    {"form": "mxfp4", "more": rows.TRACED_WITH["mxfp4"], "enforce_eager": True},
    {"form": "fp8", "max_num_batched_tokens": 8192},
    {"devices": 2, "routed_experts": True},
    {"weights": "dummy", "graph_sizes": None},
    {"weights": "checkpoint", "checkpoint": "some/folder"},
]


def arguments(tmp_path, settings):
    return vllm_settings.arguments_of({}, [], Settings(64, 4, **settings), tmp_path)


@pytest.mark.parametrize("settings", EVERY)
def test_an_engine_is_given_what_it_takes(tmp_path, settings):
    given = arguments(tmp_path, settings)
    assert set(given) <= set(FIELDS["EngineArgs"])
    assert set(given.get("compilation_config", ())) <= set(FIELDS["CompilationConfig"])
    quantised = {given[name] for name in ("quantization",) if name in given}
    assert quantised <= set(NAMES["literals"]["QuantizationMethods"])
    assert given.get("moe_backend", "auto") in NAMES["literals"]["MoEBackend"]


@pytest.mark.parametrize("settings", EVERY)
def test_a_server_is_given_flags_that_it_takes(tmp_path, settings):
    """What an engine is given as flags, and what is its command's own."""
    given = arguments(tmp_path, settings)
    command = kinds.kind("vllm").command("python", "model", 8000)
    flags = [text for text in (*command, *target.flags(given)) if text.startswith("--")]
    taken = {*FIELDS["EngineArgs"], *FIELDS["FrontendArgs"], *FIELDS["BaseFrontendArgs"]}
    for flag in flags:
        name = flag.removeprefix("--").replace("-", "_")
        assert name in taken or name.removeprefix("no_") in taken, flag


def test_the_environment_sets_what_vllm_reads(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)
    ours = {n for n in vllm_settings.environment(tmp_path) if n.startswith("VLLM_")}
    assert ours and ours <= set(NAMES["environment"])


def test_what_the_worker_is_added_clashes_with_nothing_of_its_own():
    """vLLM refuses a name that its worker has; what we keep on it must not be one either."""
    ours = {name for name in vars(vllm_inspect.Inspect) if not name.startswith("__")}
    tree = ast.parse(inspect.getsource(vllm_inspect.Inspect))
    kept = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and getattr(node.value, "id", "") == "self"
    }
    assert kept and not (ours | kept) & set(NAMES["worker"])
    assert {"model_runner", "vllm_config", "rank"} <= set(NAMES["worker"])  # what we read of it


def test_both_runners_hold_what_the_worker_is_asked_for():
    for runner in NAMES["runners"]:
        assert {"get_model", "load_model"} <= set(runner)


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_loader_overrides_what_there_is(monkeypatch):
    """With the same parameters, since vLLM calls them by place and by name."""
    base = type("DefaultModelLoader", (), {})
    name = "vllm.model_executor.model_loader.default_loader"
    for part in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader", name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    sys.modules[name].DefaultModelLoader = base
    known = METHODS["BaseModelLoader"] | METHODS["DefaultModelLoader"]
    functions = {
        n: f for n, f in vars(vllm_weights.loader_class()).items() if inspect.isfunction(f)
    }
    assert {n: parameters(f) for n, f in functions.items()} == {n: known[n] for n in functions}
    assert "load_model" in METHODS["BaseModelLoader"]
    assert NAMES["plugins"] == vllm_weights.GROUP


def test_the_recorder_stands_where_vllms_loggers_would():
    for name in ("record", "log", "log_engine_initialized", "record_sleep_state"):
        assert name in METHODS["StatLoggerManager"] and hasattr(vllm_engine.Recorder, name)
    stats = SimpleNamespace(**dict.fromkeys(FIELDS["SchedulerStats"], 0))
    cache = SimpleNamespace(**dict.fromkeys(FIELDS["BaseCacheStats"], 0))
    stats.prefix_cache_stats = cache
    recorder = vllm_engine.Recorder(4)
    given = {"scheduler_stats": stats, "iteration_stats": None, "mm_cache_stats": None}
    assert set(given) <= set(METHODS["StatLoggerManager"]["record"])
    recorder.record(**given)
    assert recorder.values()["steps"] == 1


def test_settings_are_read_where_vllm_has_them():
    config = SimpleNamespace(use_v2_model_runner=False)
    for part in ("scheduler", "cache", "model", "compilation", "parallel", "load"):
        fields = FIELDS[f"{part.title()}Config"]
        setattr(config, f"{part}_config", SimpleNamespace(**dict.fromkeys(fields)))
    config.parallel_config.tensor_parallel_size = 2
    told = vllm_engine.settings(config)
    assert told["tensor_parallel"] == 2 and "symmetric_memory_all_reduce" in told
    assert {"enable_chunked_prefill", "async_scheduling"} <= set(FIELDS["SchedulerConfig"])


class Sampling(SimpleNamespace):
    """SamplingParams: takes the fields that there are."""

    def __init__(self, **fields):
        assert set(fields) <= set(FIELDS["SamplingParams"]), fields
        super().__init__(**fields)


class Core:
    """A scheduler that is held and let go by calls that there are; a pause ends in a reply only
    where the engine does nothing."""

    def __init__(self):
        self.calls = []

    def call_utility(self, method, *given):
        assert METHODS["SyncMPClient"]["call_utility"] == ["method"]  # and *args
        assert len(given) <= len(METHODS["EngineCore"][method])
        self.calls.append(method)


class LLMEngine:
    """Ends each request with one token, and takes the parameters that there are."""

    def __init__(self):
        self.waiting = []
        self.engine_core = Core()

    def add_request(self, *given):
        names = METHODS["LLMEngine"]["add_request"]
        assert names[: len(given)] == ["request_id", "prompt", "params"]
        self.waiting.append(given)
        self.engine_core.calls.append(given[1]["prompt_token_ids"])

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        name, prompt, params = self.waiting.pop(0)
        ids = getattr(params, "logprob_token_ids", None) or []
        seen = {n: SimpleNamespace(logprob=-1.0) for n in (*ids, *prompt["prompt_token_ids"])}
        one = SimpleNamespace(token_ids=[7], logprobs=[seen], routed_experts=None)
        known = [None, *[seen] * (len(prompt["prompt_token_ids"]) - 1)]
        return [
            SimpleNamespace(request_id=name, finished=True, outputs=[one], prompt_logprobs=known)
        ]


@pytest.fixture
def engine(monkeypatch):
    assert {"add_request", "step", "has_unfinished_requests"} <= set(METHODS["LLMEngine"])
    package, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    package.SamplingParams = Sampling
    kinds_of_output = {"DELTA": 1, "FINAL_ONLY": 2}
    assert set(kinds_of_output) <= set(FIELDS["RequestOutputKind"])
    sampling.RequestOutputKind = SimpleNamespace(**kinds_of_output)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    one = vllm_engine.Engine()
    one.engine, one.recorder = LLMEngine(), vllm_engine.Recorder(4)
    one.prompts(0, [[1, 2, 3], [4, 5, 6]], answer=None)
    return one


def test_requests_are_made_as_vllm_takes_them(engine):
    assert engine.generate(0, 1)["tokens"] == [[7], [7]]
    told = []
    assert engine.generate(0, 1, stream=True, answer=told.append)["tokens"] == [[7], [7]]
    assert told == [{"token": 1}]
    assert engine.logprobs(0, [9], answer=None) == {"logprobs": [-1.0]}
    sampled = engine.sampled(0, 1, [0, 5], answer=None)
    assert sampled == {"tokens": [[7], [7]], "logprobs": [[[-1.0, -1.0]]] * 2}
    assert NAMES["most_logprob_ids"] >= vllm.SAMPLED_IDS


def test_a_batch_begins_when_all_of_it_is_there(engine):
    """Held before the first sequence is added, let go after the last, also where one is refused."""
    engine.generate(0, 1)
    assert engine.engine.engine_core.calls == [
        "pause_scheduler", [1, 2, 3], [4, 5, 6], "resume_scheduler"
    ]  # fmt: skip
    engine.prompts(1, [[1, 2, 3]], answer=None)
    engine.engine.engine_core.calls.clear()
    engine.generate(1, 1)
    assert engine.engine.engine_core.calls == [[1, 2, 3]]  # one alone waits for nobody

    engine.engine.add_request = lambda *given: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.generate(0, 1)
    assert engine.engine.engine_core.calls[-1] == "resume_scheduler"


def test_workers_are_called_as_vllm_calls_them(engine, monkeypatch):
    asked = []
    assert METHODS["LLMEngine"]["collective_rpc"][:1] == ["method"]
    assert "args" in METHODS["LLMEngine"]["collective_rpc"]
    engine.engine.collective_rpc = lambda method, args: asked.append((method, args)) or [{}, {}]
    engine.overwrite({"a": [1.0]}, answer=None)
    assert asked == [("overwrite", ({"a": [1.0]},))]
    methods = set(re.findall(r'_(?:rpc|each)\(\s*"(\w+)"', inspect.getsource(vllm_engine)))
    assert methods and all(hasattr(vllm_inspect.Inspect, name) for name in methods)


def test_counters_of_compilation_are_those_that_vllm_counts():
    source = inspect.getsource(vllm_inspect.Inspect.compiled)
    named = set(re.findall(r'"(num_\w+)"', source))
    assert named and named <= set(FIELDS["CompilationCounter"])
    assert "_handle_jit_event" in NAMES["jit_monitor"]


SAID = [text for text in NAMES["said"] if not text.startswith(("Reloading", "Initial"))]


@pytest.mark.parametrize("text", SAID)
def test_the_log_is_read_as_vllm_writes_it(tmp_path, text):
    """Every message about the start, with 3.5 where a number stands."""
    log = tmp_path / "vllm.log"
    log.write_text("INFO 11-28 [core.py:1] " + re.sub(r"%(?:\.\d+f|s)", "3.5", text) + "\n")
    assert 3.5 in vllm.logged(log).values() or 3.5 * 2**30 in vllm.logged(log).values()
