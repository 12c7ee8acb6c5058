"""The notebooks as sections of a paper: how they are written, and that every one of them runs.

All are executed once by the runner, on a miniature model with contexts of 16 and 32 tokens.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil

import nbformat
import pytest
from bs4 import BeautifulSoup

from lib import analysis, files
from lib.hardware.host import cpu_name
from lib.records import jobs, record, store
from lib.report import document
from lib.run import job as run_job
from lib.run import kernel, loop, profiles, scrub
from lib.run import plan as lib_manifest
from lib.run.parameters import notebook_parameters

ROOT = files.ROOT
SOURCES = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
STUDY = {"latency", "memory", "energy", "ablations", "ape", "summary"}
MODEL = "tiny-gpt-oss"
LINES = 12
FORBIDDEN = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.While, ast.Try)
PLACEHOLDER = "No description has been provided for this image"


def read(path):
    return nbformat.read(path, as_version=4)


def tagged(nb, tag):
    return [cell for cell in nb.cells if tag in cell.metadata.get("tags", [])]


def code(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


@pytest.fixture(params=SOURCES)
def source(request):
    return read(SOURCES[request.param])


# --- how they are written


def test_the_notebooks_are_the_ones_of_the_design():
    assert SOURCES.keys() >= STUDY


@pytest.mark.parametrize("path", SOURCES.values(), ids=SOURCES.keys())
def test_it_is_a_valid_notebook_without_results(path):
    """From the file's own JSON: nbformat would mend some of this."""
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert len({cell["id"] for cell in nb["cells"]}) == len(nb["cells"])
    nbformat.validate(nb)  # gives cells of one id new ones
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    assert nb["metadata"].keys() == {"kernelspec", "language_info"}
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    assert all(cell["metadata"].keys() <= {"tags"} for cell in nb["cells"])
    cells = [cell for cell in nb["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_it_has_the_sections_of_a_paper(source):
    title, imports = source.cells[:2]
    assert title.source.startswith("# ") and "\n\n**Question.** " in title.source
    assert "?" in title.source
    nodes = ast.parse(imports.source).body
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)
    headings = [cell.source.split("\n")[0] for cell in source.cells if cell.source[:3] == "## "]
    assert headings[0] == "## Parameters" and headings[-2:] == ["## Limits", "## What this shows"]
    assert {"## Method", "## Sanity"} < {*headings}
    assert all(cell.source.strip() for cell in source.cells)
    first, second = source.cells[-2:]
    assert (first.cell_type, second.metadata.tags) == ("markdown", ["conclusion"])
    for cell, after in zip(source.cells, source.cells[1:], strict=False):
        assert "markdown" in (cell.cell_type, after.cell_type) or len(after.source) < 120


def test_one_cell_of_literals_one_of_assertions_one_conclusion(source):
    (parameters,), (sanity,), (conclusion,) = (
        tagged(source, tag) for tag in ("parameters", "sanity", "conclusion")
    )
    for node in ast.parse(parameters.source).body:
        assert isinstance(node, ast.Assign) and len(node.targets) == 1
        ast.literal_eval(node.value)  # raises unless it is a literal
    asserts = [n for n in ast.parse(sanity.source).body if isinstance(n, ast.Assert)]
    assert asserts
    assert re.fullmatch(r"Markdown\(\w+(\.\w+)+\(\w+.*\)\)", conclusion.source)


def test_a_code_cell_holds_one_short_idea(source):
    for cell in code(source):
        nodes = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not nodes & {*FORBIDDEN}, cell.source
        short = len(cell.source.splitlines()) <= LINES
        assert short or "parameters" in cell.metadata.get("tags", []), cell.source


def test_what_is_imported_and_what_is_a_parameter_is_used(source):
    names = [
        node
        for cell in code(source)
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Name)
    ]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    (parameters,) = tagged(source, "parameters")
    assert {node.targets[0].id for node in ast.parse(parameters.source).body} <= used
    nodes = ast.parse(source.cells[1].source).body
    assert {alias.asname or alias.name for node in nodes for alias in node.names} <= used


def prose(cell):
    """Markdown without formulas, code, links, numbers of sections and of arXiv."""
    text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)", " ", cell.source, flags=re.DOTALL)
    return re.sub(r"section \d+(\.\d+)*|arXiv:? \d{4}\.\d{5}", " ", text)


def test_no_measured_number_is_typed(source):
    for cell in source.cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"\d[.,]\d|\d ?%|\d ?[x×]\b|\d{3}", prose(cell)), cell.source


@pytest.mark.parametrize("name", profiles.profiles(ROOT / "params"))
def test_every_profile_gives_every_parameter(name):
    profile = profiles.profile(name, {"models": MODEL})
    needed = {"machine", *STUDY} if name in ("demo", "gpu", "paper") else {"machine"}
    assert needed <= profile.notebooks.keys() <= SOURCES.keys()
    for notebook in profile.notebooks:
        choice = None if notebook in jobs.CROSS_MODEL else profile.choices[0]
        known = {*profile.parameters(notebook, choice), *profiles.FILLED_BY_RUNNER}
        assert known >= notebook_parameters(SOURCES[notebook]).keys()


def test_the_papers_profile_is_the_papers_study():
    profile = profiles.profile("paper")
    models = ["gpt-oss-20b", "Qwen3-32B", "Yi-34B"]
    assert [c.model for c in profile.choices if c.stack == "hf-eager"] == models
    # Again for energy where the GPU sets the pace.
    bound = [c for c in profile.choices if c.stack == "graph-compiled"]
    assert [c.model for c in bound] == models
    assert [list(c.notebooks) for c in bound] == [["energy"]] * 3
    assert profile.parameters("energy", bound[0])["repeats"] >= 5
    given = profile.parameters("latency", profile.choices[0])
    assert given["contexts"] == [128, 512, 1024, 2048]
    assert (given["new_tokens"][0], given["repeats"]) == (64, 10)


# --- that they run

TINY = {
    "defaults": {
        "weights": "random", "stack": "hf-eager", "dtype": "float32", "device": "cpu", "seed": 0,
        "contexts": [16, 32], "new_tokens": 4, "context": 32,
    },
    "notebooks": {
        "machine": {},
        "latency": {"new_tokens": [4, 8], "repeats": 6, "slope_repeats": 2, "ttft_repeats": 6,
                    "itl_repeats": 1, "aa_repeats": 12, "busy_tokens": 2, "trace_batches": [1, 2],
                    "also_experts": ["all_experts"]},
        "memory": {"also_experts": ["all_experts"]},
        "energy": {"block_contexts": [32], "repeats": 2, "other_repeats": 1, "slope_tokens": [1],
                   "slope_repeats": 1, "window_s": 0.0, "idle_s": 0.0, "sampler_pairs": 2,
                   "instrument_s": 1.0, "pue": 1.2, "g_per_kwh": 400.0},
        "energy_again": {"contexts": [32], "repeats": 1, "window_s": 0.0, "idle_s": 0.0},
        "energy_checks": {"context": 16, "weight_values": ["normal", "zero"], "repeats": 1,
                          "real_model": "", "peer_windows": 1, "window_s": 0.0},
        "stacks": {"stacks_to_compare": ["hf-eager", "graph", "graph-compiled"],
                   "contexts": [16, 32], "new_tokens": [4, 8], "repeats": 6, "slope_repeats": 2,
                   "busy_tokens": 2, "harness_pairs": 2},
        "batch": {"stacks_to_compare": ["hf-eager", "graph"], "trace_stacks": ["graph"],
                  "batch_sizes": [1, 2], "context": 16, "new_tokens": [2, 18], "repeats": 3,
                  "energy_windows": 1, "window_s": 0.0, "idle_s": 0.0},
        "serving": {"form": "", "server": "", "server_kind": "", "api": "completions",
                    "server_options": [], "continuous_batching": False, "length_sigma": 0.0,
                    "most_users": 2, "rate_shares": [0.5], "mix_loads": {}, "warmup_s": 0.5,
                    "window_s": 2.0, "idle_s": 0.0, "limits": {"ttft_s": 5.0}, "timeout_s": 60.0},
        "ablations": {"context": 16, "repeats": 6, "base_experts": "all_experts",
                      "decodings": ["greedy", "top-k 50"],
                      "contexts": [16, 32, 5000], "dtypes": ["float32", "bfloat16"],
                      "experts": ["grouped_mm", "all_experts"], "stacks": ["hf-eager", "graph"]},
        "ape": {},
        "summary": {},
        "audit": {"published": "params/published/arxiv-2508.16700.yaml"},
    },
}  # fmt: skip
# All of them, also what runs on request only.
TINY["models"] = [{"name": MODEL, "notebooks": [*{*TINY["notebooks"]} - {*jobs.CROSS_MODEL}]}]
ARMS = {
    "machine": {"environment": 1, "ceilings": 1},
    "latency": {"environment": 1, "card": 1, "latency": 8, "itl": 2, "aa": 1, "busy": 2,
                "trace": 2},
    "memory": {"environment": 1, "card": 1, "memory-paper": 4, "memory": 4},
    "energy": {"environment": 1, "card": 1, "instrument": 1, "energy": 2, "energy-slope": 1},
    "energy_again": {"environment": 1, "card": 1, "energy-again": 1},
    "energy_checks": {"environment": 1, "card": 1, "energy-peer": 1, "energy-weights": 1},
    "stacks": {"environment": 1, "card": 1, "gate": 4, "latency": 18, "busy": 6,
               "harness": 1},
    "batch": {"environment": 1, "card": 1, "gate": 2, "batch": 12, "batch-energy": 8, "trace": 2},
    "serving": {"environment": 1, "serving": 3},
    "ablations": {"environment": 1, "card": 1, "ablation-decoding": 2, "ablation-context": 3,
                  "ablation-stack": 2, "ablation-experts": 2, "ablation-precision": 2,
                  "trace": 2},
}  # fmt: skip
FIGURES = {
    "machine": 1,
    "latency": 3,
    "memory": 4,
    "energy": 5,
    "energy_again": 0,
    "energy_checks": 0,
    "stacks": 1,
    "batch": 2,
    "serving": 3,
    "ablations": 5,
    "ape": 1,
    "summary": 7,
    "audit": 2,
    "start": 1,
}
CONCLUSIONS = {
    "machine": f"{cpu_name()}: memory is read at ",
    "latency": f"{MODEL} (experts grouped_mm) at 32 tokens of context and 4 new tokens: TTFT",
    "memory": f"{MODEL} (experts grouped_mm) under the paper's protocol at 32 tokens: peak",
    "energy": f"{MODEL}: energy not measured (no NVML energy counter: the device is a CPU).",
    "energy_again": f"{MODEL} at 32 tokens, second pass: not measured (",
    "energy_checks": "Not measured on 1 arm(s), zeus_long_j: no NVML energy counter",
    "stacks": f"{MODEL} (graph): decode at 32 tokens of context",
    "batch": f"{MODEL} (graph) at 16 tokens of context: at batch 1",
    "serving": f"{MODEL}: energy not measured (no NVML energy counter: the device is a CPU).",
    "ablations": "context 5000 failed: ModelError",
    "ape": f"{MODEL} (experts grouped_mm) at 32 tokens, per billion of its",
    "summary": "Output throughput: fewer than two models measured, so none are compared.",
    "audit": "",
    "start": f"{MODEL} (experts grouped_mm) at 32 tokens, per billion of its",
}


class Results:
    """What the runner has left of the one run that all these tests look at."""

    def __init__(self, folder):
        (folder / "params").mkdir()
        shutil.copy(ROOT / "params" / "models.yaml", folder / "params")
        (folder / "params" / "tiny.yaml").write_text(json.dumps(TINY))
        self.profile = profiles.profile("tiny", params_dir=folder / "params")
        self.out = folder / "out"
        self.code = loop.run(
            self.profile,
            self.out,
            check=lambda arms, env: None,
            write_page=document.write_notebook_page,
            write_report=document.write,
        )
        self.jobs = {job.notebook: job for job in lib_manifest.plan(self.profile, self.out)}
        self.jobs["start"] = self.start()

    def start(self):
        """The notebook that JupyterLab opens on is no job of a profile; it reads these results."""
        values = {
            "model": MODEL,
            "context": 32,
            "stack": "hf-eager",
            "metric": "ttft",
            "results_dir": str(self.out),
        }
        job = lib_manifest.Task(
            "start", None, "", "", SOURCES["start"], self.out / "_all" / "start", values, self.out
        )
        run_job.run_job(job, sha="x", env=kernel.kernel_env(offline=True))
        document.write_notebook_page(job.folder)
        return job

    def notebook(self, name):
        return read(self.jobs[name].folder / "notebook.ipynb")

    def manifest(self, name):
        return store.read(self.jobs[name].folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    plain = kernel.kernel_env

    def outside_pytest(**options):
        """Where this variable is set, a kernel does not record what its libraries write."""
        return {k: v for k, v in plain(**options).items() if k != "PYTEST_CURRENT_TEST"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "kernel_env", outside_pytest)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("WORKBOOK_COMMIT", "0123456789abcdef")
        yield Results(tmp_path_factory.mktemp("notebooks"))


def outputs(nb):
    return [output for cell in code(nb) for output in cell.outputs]


def figures(nb):
    return [output for output in outputs(nb) if "image/png" in output.get("data", {})]


def conclusion(nb):
    (cell,) = tagged(nb, "conclusion")
    (output,) = cell.outputs
    return output.data["text/markdown"]


@pytest.mark.parametrize("name", SOURCES)
def test_it_runs_to_its_end(results, name):
    told = results.manifest(name)
    assert (told["status"], told["error"]) == ("ok", None)
    known = scrub.names(results.out)
    assert told["parameters"] == scrub.values(results.jobs[name].parameters, known)
    nb = results.notebook(name)
    assert all(cell.execution_count for cell in code(nb))
    assert {output.output_type for output in outputs(nb)} <= {"display_data", "execute_result"}, [
        output.get("text") for output in outputs(nb)
    ]  # a stream is noise to the reader


@pytest.mark.parametrize("name", SOURCES)
def test_its_rows_are_complete(results, name):
    path = results.jobs[name].folder / "records.jsonl"
    if name not in ARMS:
        assert not path.exists()  # it reads what the others wrote
        return
    rows = store.load(path)
    kinds = [row.kind for row in rows]
    assert {kind: kinds.count(kind) for kind in kinds} == ARMS[name]
    arms = [row for row in rows if row.kind not in ("environment", "card")]
    assert {row.env_id for row in rows} == {rows[0].env_id}
    for row in arms:
        if row.error:
            assert row.error.startswith("ModelError") and row.key["context"] == 5000
            continue
        assert {*record.KEY_FIELDS} == row.key.keys()
        if row.kind == "ceilings":  # of the machine, so without a model
            assert not any(row.key.values())
            continue
        assert {"model_source", "model_revision", "loaded_dtype"} <= row.values.keys()
    assert sum(row.error is not None for row in arms) == (1 if name == "ablations" else 0)


@pytest.mark.parametrize("name", SOURCES)
def test_its_tables_are_whole(results, name):
    """Reasons are not cut off, no column is hidden, and what is missing does not read NaN."""
    shown = [
        output.data["text/html"]
        for output in outputs(results.notebook(name))
        if "text/html" in output.get("data", {})
    ]
    cells = [
        cell.get_text()
        for html in shown
        for cell in BeautifulSoup(html, "html.parser").select("td, th")
    ]
    assert [cell for cell in cells if cell.endswith("...") or cell in ("NaN", "<NA>")] == []


@pytest.mark.parametrize("name", SOURCES)
def test_its_figures_are_described(results, name):
    drawn = figures(results.notebook(name))
    assert len(drawn) == FIGURES[name]
    alts = [figure.metadata["image/png"]["alt"] for figure in drawn]
    assert len({*alts}) == len(alts)
    said = [output["data"].get("text/markdown", "") for output in outputs(results.notebook(name))]
    captions = [text for text in said if re.fullmatch(r"\*[^*]+\*", text)]
    assert len(captions) == len(drawn) and not any("None" in text for text in captions), captions
    for alt in alts:
        assert " against " in alt and (
            MODEL in alt or "energy" in name or ":" in alt or alt.endswith("not measured")
        ), alt
    page = (results.jobs[name].folder / "notebook.html").read_text(encoding="utf-8")
    images = BeautifulSoup(page, "html.parser").find_all("img")
    assert [image["alt"] for image in images] == alts and PLACEHOLDER not in page


@pytest.mark.parametrize("name", SOURCES)
def test_its_conclusion_is_computed(results, name):
    text = conclusion(results.notebook(name))
    assert f"- {CONCLUSIONS[name]}" in text
    assert "None" not in text and "nan" not in text
    assert ("Random weights" in text) == (name not in ("audit", "machine"))


def test_the_report_is_written_and_the_runner_is_content(results):
    assert results.code == 0
    page = (results.out / "report.html").read_text(encoding="utf-8")
    assert "tiny-gpt-oss" in page and PLACEHOLDER not in page


# --- that what is asked for is what is done


def contexts_of_tables(page: str) -> set[str]:
    """What stands under "context (tokens)" in the tables of a page."""
    contexts = set()
    for table in BeautifulSoup(page, "html.parser").find_all("table"):
        titles = [cell.get_text(" ", strip=True) for cell in table.find("tr").find_all("th")]
        if "context (tokens)" in titles:
            column = titles.index("context (tokens)")
            for row in table.find_all("tr")[1:]:
                contexts.add(row.find_all(["th", "td"])[column].get_text(" ", strip=True))
    return contexts


def test_the_parameters_given_show_in_the_results(results):
    """None of these values is a default of the notebook."""
    defaults = notebook_parameters(SOURCES["latency"])
    given = results.jobs["latency"].parameters
    assert all(given[name] != defaults[name] for name in ("contexts", "new_tokens", "dtype"))
    nb = results.notebook("latency")
    (injected,) = tagged(nb, "injected-parameters")
    assert "contexts = [16, 32]" in injected.source
    shown = "".join(o.data.get("text/html", "") for o in outputs(nb) if "data" in o)
    assert contexts_of_tables(shown) == {"16", "32"}
    rows = store.load(results.jobs["latency"].folder / "records.jsonl")
    keys = [row.key for row in rows if row.kind in ("latency", "itl")]
    assert {(k["context"], k["new_tokens"]) for k in keys} == {
        (c, g) for c in (16, 32) for g in (1, 4, 8)
    }
    assert {k["dtype"] for k in keys} == {"float32"}


@pytest.mark.parametrize("metric", analysis.explore.FIGURES)
def test_the_first_notebook_names_each_metric_that_it_can_draw(metric):
    (parameters,) = tagged(read(SOURCES["start"]), "parameters")
    assert re.search(rf"metric = .*\b{metric}\b", parameters.source)


def test_jupyterlab_opens_on_the_first_notebook():
    (opened,) = re.findall(
        r"default_url=/lab/tree/outputs/lab/(\S+)", (ROOT / "Makefile").read_text()
    )
    assert SOURCES["start"].name == opened


def test_the_first_notebook_runs_as_it_is(tmp_path):
    """Run All on the released results, which every clone has."""
    values = notebook_parameters(SOURCES["start"])
    folder = tmp_path / "out" / "_all" / "start"
    job = lib_manifest.Task("start", None, "", "", SOURCES["start"], folder, values)
    env = kernel.kernel_env(offline=True)
    for _ in range(2):  # the client waits for ever, once in many runs, for the reply to a widget
        told = run_job.run_job(job, sha="x", env=env, timeout_s=120.0)
        if told["status"] != "timeout":
            break
    assert (told["status"], told["error"]) == ("ok", None)
    name = f"{values['model']} (experts grouped_mm)"
    assert f"- {name} at {values['context']} tokens" in conclusion(read(folder / "notebook.ipynb"))


def test_a_changed_parameter_changes_the_conclusion(results, tmp_path):
    job = results.jobs["ape"]
    changed = dataclasses.replace(
        job, parameters={**job.parameters, "context": 16}, folder=tmp_path / "ape"
    )
    told = run_job.run_job(changed, sha="x", env=kernel.kernel_env(offline=True))
    assert told["status"] == "ok"
    before, after = (
        conclusion(results.notebook("ape")),
        conclusion(read(tmp_path / "ape" / "notebook.ipynb")),
    )
    name = f"{MODEL} (experts grouped_mm)"
    assert f"{name} at 32 tokens" in before and f"{name} at 16 tokens" not in before
    assert f"{MODEL} at 16 tokens" in after and "at 32 tokens" not in after  # one setup there


def test_a_parameter_that_finds_no_rows_stops_at_the_sanity_cell(results, tmp_path):
    job = results.jobs["ape"]
    wrong = dataclasses.replace(
        job, parameters={**job.parameters, "weights": "checkpoint"}, folder=tmp_path / "ape"
    )
    told = run_job.run_job(wrong, sha="x", env=kernel.kernel_env(offline=True))
    assert told["status"] == "failed"
    assert told["error"]["name"] == "AssertionError"
    assert "no rows of tiny-gpt-oss with checkpoint weights" in told["error"]["value"]
