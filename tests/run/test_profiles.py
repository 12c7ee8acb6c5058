"""Profiles and parameters: what is unknown, missing or of another type is named with its fix."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lib import files
from lib.files import ParamsError, read_yaml
from lib.models.entries import checked_models, models
from lib.records import kinds
from lib.run import plan, profiles
from lib.run.parameters import notebook_parameters

LATENCY = """
model = "tiny"  # name of the model
records_path: str = "records.jsonl"
weights = "random"
stack = "hf-eager"
contexts = [16, 32]
repeats = 3
pause_s = 0.5
note = None
options = {"a": 1}
"""
GOOD = {
    "defaults": {"weights": "random", "stack": "hf-eager", "repeats": 2},
    "notebooks": {
        "latency": {"contexts": [8], "pause_s": 0.1, "note": None, "options": {"a": 2}},
        "summary": None,
    },
    "models": ["tiny", {"name": "other", "notebooks": ["latency"], "repeats": 9}],
}


@pytest.fixture
def folder(tmp_path):
    """Folders params/ and notebooks/ with one profile, two notebooks and two known models."""
    (tmp_path / "params").mkdir()
    (tmp_path / "notebooks").mkdir()
    notebook(tmp_path, "latency", LATENCY)
    notebook(tmp_path, "summary", 'results_dir = "x"')
    entries = {"tiny": {"hub": None}, "other": {"hub": "org/Other-7B"}}
    (tmp_path / "params" / "models.yaml").write_text(yaml.safe_dump(entries))
    return tmp_path


def notebook(folder: Path, name: str, source: str, tags: tuple[str, ...] = ("parameters",)):
    cell = {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": source}
    path = folder / "notebooks" / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": [cell]}))
    return path


def load(folder: Path, data: dict | str = GOOD, name: str = "demo", **slices) -> profiles.Profile:
    text = data if isinstance(data, str) else yaml.safe_dump(data)
    (folder / "params" / "demo.yaml").write_text(text)
    return profiles.profile(
        name, slices, params_dir=folder / "params", notebooks_dir=folder / "notebooks"
    )


def changed(part: str, **values) -> dict:
    """GOOD with some values of one part changed."""
    data = json.loads(json.dumps(GOOD))
    target = data["notebooks"]["latency"] if part == "latency" else data[part]
    target.update(values)
    return data


def test_a_profile_gives_each_notebook_its_values(folder):
    profile = load(folder)
    tiny, other = profile.choices
    assert profile.parameters("latency", tiny) == {
        "weights": "random",
        "stack": "hf-eager",
        "contexts": [8],
        "repeats": 2,
        "pause_s": 0.1,
        "note": None,
        "options": {"a": 2},
    }
    assert profile.parameters("latency", other)["repeats"] == 9
    assert profile.parameters("summary") == {}
    assert list(other.notebooks) == ["latency"]


def test_a_model_may_differ_in_one_notebook_alone(folder):
    data = changed("latency", contexts=[8, 16])
    data["notebooks"]["memory"] = {"contexts": [8, 16]}
    notebook(folder, "memory", "contexts = [1]")

    def of_tiny(own):
        data["models"] = [{"name": "tiny", "notebooks": {"latency": None, "memory": own}}]
        profile = load(folder, data)
        (tiny,) = profile.choices
        return [profile.parameters(n, tiny)["contexts"] for n in ("latency", "memory")]

    assert of_tiny({"contexts": [8, 12]}) == [[8, 16], [8, 12]]
    assert of_tiny(None) == [[8, 16], [8, 16]]
    data["models"] = [{"name": "tiny", "notebooks": {"mixed": {"dtype": "bfloat16"}}}]
    data["notebooks"]["mixed"] = {"dtype": "float32"}
    notebook(folder, "mixed", 'dtype = "bfloat16"')
    sliced = load(folder, data, dtype="float16")
    assert sliced.parameters("mixed", sliced.choices[0])["dtype"] == "float16"  # DTYPE= wins
    for own, message in [
        ({"contxts": [8]}, "'memory' of model 'tiny': 'contxts'; did you mean 'contexts'"),
        (8, "section 'memory' of model 'tiny': 8 is no mapping"),
    ]:
        with pytest.raises(ParamsError, match=message):
            of_tiny(own)


def test_a_model_may_be_listed_again_with_another_stack(folder):
    again = {"name": "tiny", "stack": "graph", "notebooks": {"latency": {"repeats": 5}}}
    data = {**GOOD, "models": ["tiny", again]}
    profile = load(folder, data)
    assert [c.stack for c in profile.choices] == ["hf-eager", "graph"]
    assert {c.model for c in profile.choices} == {"tiny"}
    assert [profile.parameters("latency", c)["repeats"] for c in profile.choices] == [2, 5]
    assert profile.parameters("latency", profile.choices[1])["stack"] == "graph"
    # STACK= asks for all of the model on a stack, with the values that are listed for that stack.
    profile = load(folder, data, stack="graph hf-static", notebooks="latency")
    repeats = [(c.stack, profile.parameters("latency", c)["repeats"]) for c in profile.choices]
    assert repeats == [("graph", 5), ("hf-static", 2)]
    assert profile.parameters("latency", profile.choices[0])["stack"] == "graph"
    # NOTEBOOKS= may ask the model for what it does not list, but not its further entries.
    notebook(folder, "memory", "repeats = 1")
    data["notebooks"] = {**GOOD["notebooks"], "memory": None}
    assert [c.stack for c in load(folder, data, notebooks="memory").choices] == ["hf-eager"]
    assert len(load(folder, data, notebooks="latency").choices) == 2
    with pytest.raises(
        ParamsError,
        match="lists model 'tiny' twice with weights 'random' and stack 'hf-eager': join",
    ):
        load(folder, {**GOOD, "models": ["tiny", {"name": "tiny", "repeats": 1}]})


def test_slices_choose_and_multiply(folder):
    profile = load(folder, models="other, tiny", weights="random checkpoint", notebooks="latency")
    pairs = [(choice.model, choice.weights) for choice in profile.choices]
    assert pairs == [
        ("other", "random"),
        ("other", "checkpoint"),
        ("tiny", "random"),
        ("tiny", "checkpoint"),
    ]
    assert profile.parameters("latency", profile.choices[1])["weights"] == "checkpoint"
    assert list(profile.notebooks) == ["latency"]


def test_any_model_may_be_measured(folder):
    (folder / "my-model").mkdir()
    names = ["new/Model-1.5", str(folder / "my-model"), "org/Other-7B"]
    profile = load(folder, models=names)
    # A hub id that an entry has is that entry, so that its results are found under one name.
    assert [c.model for c in profile.choices] == [*names[:2], "other"]
    (folder / "x.gguf").touch()
    assert load(folder, models=str(folder / "x.gguf")).choices[0].weights == "gguf"


SERVED = 'model = "x"\nweights = "random"\nserver = ""\nrecords_path = "x"'


def test_a_server_that_runs_is_measured_by_one_notebook_alone(folder):
    """What it serves need not be known here, and its weights are not."""
    notebook(folder, "serving", SERVED)
    data = {**GOOD, "notebooks": {**GOOD["notebooks"], "serving": {"server": ""}}}
    url = "http://127.0.0.1:8000"
    profile = load(folder, data, server=url, models="/a/folder")
    (choice,) = profile.choices
    assert list(profile.notebooks) == ["serving"] and choice.model == "/a/folder"
    assert profile.parameters("serving", choice) == {"weights": "unknown", "server": url}
    for slices, message in [
        ({"models": "m", "notebooks": "latency"}, "NOTEBOOKS=serving alone, not by latency"),
        ({"models": ""}, "needs the name of the model that is served: MODELS="),
    ]:
        with pytest.raises(ParamsError, match=message):
            load(folder, data, server=url, **slices)
    with pytest.raises(ParamsError, match="has no section 'serving', which SERVER= needs"):
        load(folder, server=url, models="m")


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_a_server_may_hold_weights_in_what_no_net_of_ours_does(folder, form):
    """Whatever form the profile gives the model; other notebooks refuse it, and a dtype is one."""
    notebook(folder, "serving", SERVED + '\ndtype = "x"\nform = ""')
    data = {**GOOD, "notebooks": {**GOOD["notebooks"], "serving": {"server": "", "form": ""}}}
    data["defaults"] = {**GOOD["defaults"], "dtype": "bfloat16"}
    data["models"] = [{"name": "tiny", "notebooks": {"serving": {"form": "mxfp4"}}}]
    slices = {"notebooks": "serving", "models": "tiny"}
    profile = load(folder, data, **slices, dtype=form)
    values = profile.parameters("serving", profile.choices[0])
    assert (values["form"], values["dtype"]) == (form, "bfloat16")
    (task,) = plan.plan(profile, folder)
    assert plan.command(task, "demo")["DTYPE"] == form  # so that it can be run again
    profile = load(folder, data, **slices, dtype="float16")
    values = profile.parameters("serving", profile.choices[0])
    assert (values["form"], values["dtype"]) == ("mxfp4", "float16")
    with pytest.raises(ParamsError, match=f"unknown dtype '{form}'"):
        load(folder, data, notebooks="serving latency", models="tiny", dtype=form)


def test_what_runs_on_request_is_not_run_because_a_model_lists_nothing(folder):
    notebook(folder, "serving", SERVED)
    data = {**GOOD, "notebooks": {**GOOD["notebooks"], "serving": {"server": ""}}}
    assert "serving" not in load(folder, data).choices[0].notebooks
    (asked,) = load(folder, data, notebooks="serving", models="tiny").choices
    (task,) = plan.plan(load(folder, data, notebooks="serving", models="tiny"), folder)
    assert list(asked.notebooks) == ["serving"]
    # Whatever stack is asked for, this notebook measures a server.
    assert task.folder == folder / "tiny" / "random-server" / "serving" and task.stack == "server"
    both = load(folder, data, notebooks="serving", models="tiny", stack="graph hf-static")
    assert len(both.choices) == 2 and len(plan.plan(both, folder)) == 1


def test_a_folder_is_measured_with_its_weights_where_it_has_any(folder):
    own = folder / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    assert load(folder, models=str(own)).choices[0].weights == "random"
    (own / "model.safetensors").touch()
    assert load(folder, models=str(own)).choices[0].weights == "checkpoint"
    assert load(folder, models=str(own), weights="random").choices[0].weights == "random"


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"name": "dem"}, "unknown profile 'dem'; did you mean 'demo'"),
        ({"name": "models"}, "unknown profile 'models'"),
        ({"name": "gpus"}, "unknown profile 'gpus'"),
        ({"models": "TINNY"}, "unknown model 'TINNY'; did you mean 'tiny'.*organisation/name"),
        ({"notebooks": "latencies"}, "unknown notebook 'latencies'; did you mean 'latency'"),
        ({"weights": "checkpoints"}, "unknown weights 'checkpoints'.*WEIGHTS=<name>"),
        ({"stack": "eager"}, "unknown stack 'eager'; did you mean 'hf-eager'.*STACK=<name>"),
        ({"dtype": "fp16"}, "unknown dtype 'fp16'"),
        ({"dtype": "float16,float32"}, "DTYPE takes one value"),
    ],
)
def test_a_wrong_slice_is_named_with_its_fix(folder, slices, message):
    with pytest.raises(ParamsError, match=message):
        load(folder, **slices)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**GOOD, "model": []}, "unknown key of profile 'demo': 'model'; did you mean 'models'"),
        ({"defaults": {}, "models": []}, "profile 'demo' lacks notebooks"),
        ({**GOOD, "defaults": 3}, "profile 'demo', defaults is 3, needs a mapping or null"),
        ({**GOOD, "models": [3]}, r"models, 0 is 3, needs text \(in quotes\) or a mapping"),
        ({**GOOD, "models": [{"repeats": 2}]}, "model None in profile 'demo' lacks name"),
        (
            {**GOOD, "models": [{"name": "tiny", "notebooks": "latency"}]},
            "model 'tiny' in profile 'demo', notebooks is 'latency', needs a list or a mapping or",
        ),
        ({**GOOD, "models": []}, "add MODELS=<hub id.*entries: other, tiny"),
        ({**GOOD, "models": ["huge"]}, "unknown model 'huge'"),
        ({**GOOD, "models": [{"name": "tiny", "dtpe": 1}]}, "unknown key of model 'tiny'"),
        ({**GOOD, "notebooks": {"energi": {}}}, "unknown notebook in profile 'demo': 'energi'"),
        (changed("latency", repeat=3), "section 'latency': 'repeat'; did you mean 'repeats'"),
        (changed("defaults", sede=1), "unknown parameter in profile 'demo', defaults: 'sede'"),
        (changed("latency", model="tiny"), "the runner fills model; remove it"),
        (changed("latency", stack="hf-eager"), "stack belongs into the defaults"),
        (changed("latency", repeats="3"), "repeats is '3' .str., needs int.*without quotes"),
        (changed("latency", repeats=3.0), "repeats is 3.0 .float., needs int"),
        (changed("latency", repeats=True), "repeats is True .bool., needs int"),
        (changed("latency", repeats=None), "repeats is None"),
        (changed("latency", contexts=[8, "9"]), r"contexts\[1\] is '9' .str., needs int"),
        (changed("latency", contexts=8), "contexts is 8 .int., needs list"),
        (changed("latency", options={"a": "x"}), "options.a is 'x'"),
        (changed("defaults", weights="real"), "unknown weights 'real'"),
    ],
)
def test_a_wrong_profile_is_named_with_its_fix(folder, data, message):
    with pytest.raises(ParamsError, match=message):
        load(folder, data)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hubb": None}, "unknown key of models.yaml, new: 'hubb'; did you mean 'hub'"),
        ({"kind_of_model": "sparse"}, "new, kind_of_model is 'sparse', needs 'moe' or 'dense'"),
        ({"hub": 3}, r"new, hub is 3, needs text \(in quotes\) or null"),
        ({"tiny": "true"}, "new, tiny is 'true', needs true or false"),
        ({"wheel": {"file": "x.gguf"}}, "models.yaml, new, wheel lacks project, version, sha256"),
        (None, "models.yaml, new is None, needs a mapping"),
    ],
)
def test_a_wrong_entry_is_named_with_its_fix(folder, entry, message):
    (folder / "params" / "models.yaml").write_text(yaml.safe_dump({"new": entry}))
    with pytest.raises(ParamsError, match=message):
        load(folder)


def test_the_entries_are_what_the_schema_says():
    assert checked_models().keys() == models().keys() > {"tiny-gpt-oss"}


def test_only_notebooks_of_a_model_need_one(folder):
    notebook(folder, "machine", "seed = 0")
    data = {**GOOD, "models": [], "notebooks": {**GOOD["notebooks"], "machine": {"seed": 1}}}
    profile = load(folder, data, notebooks="machine, summary")
    assert (profile.choices, profile.parameters("machine")) == ((), {"seed": 1})
    with pytest.raises(ParamsError, match="add MODELS="):
        load(folder, data, notebooks="machine, latency")


def test_a_missing_value_is_an_error(folder):
    data = changed("latency")
    del data["notebooks"]["latency"]["pause_s"]
    with pytest.raises(ParamsError, match="notebook 'latency': no value for pause_s; add it"):
        load(folder, data)


def test_an_integer_may_stand_for_a_float(folder):
    profile = load(folder, changed("latency", pause_s=1))
    value = profile.parameters("latency", profile.choices[0])["pause_s"]
    assert (value, type(value)) == (1.0, float)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("1e-3", "as text.*1.0e-3"),
        ("1.0e3", "as text"),
        ("1234e56", "quotes"),
        ("no", "true or false"),
        ("On", "true or false"),
        ("007", "octal"),
        ("1_000", "underscores"),
        ("12:30", "base 60"),
        ("2026-01-02", "date"),
        (".nan", "no parameters"),
    ],
)
def test_what_yaml_would_misread_is_refused(tmp_path, text, advice):
    path = tmp_path / "x.yaml"
    path.write_text(f"a:\n  - {text}\n")
    with pytest.raises(ParamsError, match=f"x.yaml, line 2: {text} is ambiguous.*{advice}"):
        read_yaml(path)
    path.write_text(f'a: "{text}"\n')
    assert read_yaml(path) == {"a": text}


def test_yaml_that_is_plain_is_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1.0e-3\nb: [1, 2.5, true, null, hf-eager]\n")
    assert read_yaml(path) == {"a": 1e-3, "b": [1, 2.5, True, None, "hf-eager"]}
    path.write_text("a: 1\na: 2\n")
    with pytest.raises(ParamsError, match="line 1: the key a appears twice"):
        read_yaml(path)
    path.write_text("a: [1\n")
    with pytest.raises(ParamsError, match="no valid YAML"):
        read_yaml(path)


def test_the_parameters_cell_holds_literals_only(folder):
    path = notebook(folder, "x", 'a = -1\nb: list = ["x"]\n')
    assert notebook_parameters(path) == {"a": -1, "b": ["x"]}
    for source in ("a = len([])", "a, b = 1, 2", "import os", "a: int"):
        notebook(folder, "x", source)
        with pytest.raises(ParamsError, match="may only assign literals"):
            notebook_parameters(path)
    notebook(folder, "x", "a = 1", tags=())
    with pytest.raises(ParamsError, match="0 cells are tagged"):
        notebook_parameters(path)
    with pytest.raises(ParamsError, match="no notebook"):
        notebook_parameters(folder / "none.ipynb")


def test_relative_paths_count_from_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert files.resolve("outputs/demo") == files.ROOT / "outputs" / "demo"
    assert files.resolve(tmp_path) == tmp_path


def test_the_stacks_and_weights_are_those_that_the_library_has():
    """Read from the source: importing them would load torch."""
    models = (files.ROOT / "lib" / "models" / "load.py").read_text()
    assert f"WEIGHTS = {json.dumps(kinds.WEIGHTS)}".replace("[", "(").replace("]", ")") in models


BATCH = """
model = "tiny"
weights = "random"
dtype = "bfloat16"
stacks_to_compare = ["hf-eager"]
trace_stacks = ["hf-eager"]
"""
ENGINE = {
    "defaults": {"weights": "random", "stack": "hf-eager", "dtype": "bfloat16"},
    "notebooks": {
        "latency": {"contexts": [8], "pause_s": 0.1, "note": None, "options": {}, "repeats": 2},
        "batch": {"stacks_to_compare": ["hf-eager", "graph"], "trace_stacks": ["graph"]},
        "memory": {"repeats": 1},
    },
    "models": ["tiny"],
}


@pytest.fixture
def with_batch(folder):
    notebook(folder, "batch", BATCH)
    notebook(folder, "memory", "repeats = 1")
    return folder


def test_an_engine_runs_the_notebooks_that_can_measure_it(with_batch):
    (choice,) = load(with_batch, ENGINE, stack="vllm", dtype="mxfp4").choices
    assert choice.stack == "vllm" and set(choice.notebooks) == {"latency", "batch"}
    profile = load(with_batch, ENGINE, stack="vllm", dtype="mxfp4")
    values = profile.parameters("batch", choice)
    assert values["stacks_to_compare"] == values["trace_stacks"] == ["vllm"]
    assert values["dtype"] == "mxfp4"


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"stack": "vllm", "notebooks": "memory"}, "'memory' does not measure the stack 'vllm'"),
        ({"stack": "vllm", "dtype": "float32"}, "unknown dtype 'float32'"),
        ({"stack": "graph", "dtype": "mxfp4"}, "unknown dtype 'mxfp4'"),
        ({"stack": "vllm,graph", "dtype": "fp8"}, "unknown dtype 'fp8'"),
        ({"stack": "sglang"}, "unknown stack 'sglang'"),
    ],
)
def test_what_an_engine_cannot_run_is_refused_before_any_work(with_batch, slices, message):
    with pytest.raises(ParamsError, match=message):
        load(with_batch, ENGINE, **slices)


SHARDED = ENGINE | {
    "defaults": ENGINE["defaults"] | {"stack": "vllm"},
    "notebooks": ENGINE["notebooks"] | {"batch": {"stacks_to_compare": [], "trace_stacks": []}},
    "models": [{"name": "tiny", "devices": [1, 2]}],
}


def test_a_model_may_be_sharded_over_numbers_of_gpus(with_batch):
    notebook(with_batch, "latency", LATENCY + "\ndevices = 1")
    profile = load(with_batch, SHARDED)
    assert [choice.devices for choice in profile.choices] == [1, 2]
    jobs = plan.plan(profile, with_batch / "out")
    assert [job.name for job in jobs if job.notebook == "latency"] == [
        "tiny/random-vllm/latency", "tiny/random-vllm-2gpus/latency"
    ]  # fmt: skip
    assert [job.devices for job in jobs if job.notebook == "latency"] == [1, 2]
    assert plan.command(jobs[-1], "demo")["DEVICES"] == str(jobs[-1].devices)
    (choice,) = load(with_batch, SHARDED, devices="2").choices
    assert choice.devices == 2
    assert profile.parameters("batch", choice)["trace_stacks"] == []  # as the profile says


def test_one_gpu_is_what_a_job_was_before(with_batch):
    """A finished job is not measured again because it can now say `devices`."""
    notebook(with_batch, "latency", LATENCY + "\ndevices = 1")
    jobs = plan.plan(load(with_batch, SHARDED), with_batch / "out")
    one, two = (job for job in jobs if job.notebook == "latency")
    before = replace(one, parameters={k: v for k, v in one.parameters.items() if k != "devices"})
    shas = [plan.job_sha(job, "GPU", Path("none")) for job in (before, one, two)]
    assert shas[0] == shas[1] != shas[2]


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (
            {"devices": "2", "stack": "graph"},
            "'graph' computes on one GPU, not on devices: 2;",
        ),
        ({"devices": "2", "stack": "hf-eager"}, "STACK=vllm shards a model, or use DEVICES=1"),
        ({"devices": "0"}, "devices: 0 is no whole number of GPUs"),
        ({"devices": "-1"}, "devices: '-1' is no whole number of GPUs"),
        ({"devices": "two"}, "devices: 'two' is no whole number of GPUs"),
        ({"devices": "1.5"}, "devices: '1.5' is no whole number of GPUs"),
    ],
)
def test_devices_that_a_stack_cannot_use_are_refused_before_any_work(with_batch, slices, message):
    notebook(with_batch, "latency", LATENCY + "\ndevices = 1")
    with pytest.raises(ParamsError, match=message):
        load(with_batch, SHARDED, **slices)


@pytest.mark.parametrize("devices", [0, "2", 2.0, True, None, [1, 0], []])
def test_devices_of_a_profile_are_whole_numbers(with_batch, devices):
    notebook(with_batch, "latency", LATENCY + "\ndevices = 1")
    with pytest.raises(ParamsError, match="devices"):
        load(with_batch, SHARDED | {"models": [{"name": "tiny", "devices": devices}]})


def test_a_slice_is_split_but_not_inside_a_path_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my model", "a,b", "plain", "my"):
        (tmp_path / name).mkdir()
    assert files.split("Qwen3-32B, Yi-34B  tiny-yi") == ("Qwen3-32B", "Yi-34B", "tiny-yi")
    assert files.split("my model") == ("my model",)
    assert files.split(f"{tmp_path}/my model,tiny-yi") == (f"{tmp_path}/my model", "tiny-yi")
    assert files.split("tiny-yi my model plain") == ("tiny-yi", "my model", "plain")
    assert files.split("a,b") == ("a,b",) and files.split("a,c") == ("a", "c")
    assert files.split(["my model", "x y"]) == ("my model", "x", "y")
    assert files.split("x" * 5000) == ("x" * 5000,) and files.split(" ") == ()


@pytest.mark.parametrize(
    ("key", "arms", "says"),
    [
        ("decodings", ["greedy", "min-q 0.1"], "decodings: unknown .*'min-q' may be 'min-p'"),
        ("dtypes", ["bfloat16", "bf16"], "dtypes: 'bf16'.*'bfloat16'"),
        ("stacks", ["grahp"], "stacks: 'grahp'; did you mean 'graph'"),
        ("experts", ["grouped"], "experts: 'grouped'.*'grouped_mm'"),
    ],
)
def test_an_arm_that_nothing_could_run_is_refused_before_the_run(tmp_path, key, arms, says):
    """Those of a profile's own section, and of one model in its list."""
    data = files.read_yaml(files.ROOT / "params" / "demo.yaml")
    (tmp_path / "models.yaml").write_text((files.ROOT / "params" / "models.yaml").read_text())
    own = {"name": "tiny-qwen3", "notebooks": {"ablations": {key: arms}}}
    for mine in ({"ablations": data["notebooks"]["ablations"] | {key: arms}}, {"models": [own]}):
        changed = (
            data | {"notebooks": data["notebooks"] | mine} if "ablations" in mine else data | mine
        )
        (tmp_path / "mine.yaml").write_text(json.dumps(data | changed))
        with pytest.raises(ParamsError, match=says):
            profiles.profile("mine", {"notebooks": "ablations"}, params_dir=tmp_path)


def test_an_arm_is_one_line_of_a_profile(tmp_path):
    data = files.read_yaml(files.ROOT / "params" / "demo.yaml")
    data["notebooks"]["ablations"]["decodings"].append(
        "temperature 0.7 min-p 0.1 repetition-penalty 1.2"
    )
    (tmp_path / "models.yaml").write_text((files.ROOT / "params" / "models.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(json.dumps(data))
    profile = profiles.profile("mine", {"models": "tiny-qwen3"}, params_dir=tmp_path)
    assert len(profile.parameters("ablations", profile.choices[0])["decodings"]) == 4
