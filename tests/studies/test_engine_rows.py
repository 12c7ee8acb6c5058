"""An engine's rows beside the study: its row of table 12, and the last rungs of the ladder."""

from __future__ import annotations

import pytest

from lib.records.record import Record, environment_record
from lib.studies import paper_tables
from lib.studies.arxiv_2508_16700 import ladder
from lib.studies.study import load
from tests.samples.records import key, spread

ENV = environment_record({"gpu": "NVIDIA H100 80GB HBM3", "device": "cuda"})
VLLM = {"stack": "vllm", "engine": "a1b2c3", "experts": "Triton"}
STUDY = load()


def call(model: str, seconds: float, kind: str = "latency", **changes) -> Record:
    return Record(kind, key(model, **changes), {"e2e_s": spread(seconds)}, env_id=ENV.env_id)


def table_12(rows):
    (table,) = [t for t in paper_tables.paper_tables(rows, STUDY.data) if t.number == 12]
    return {(cell.row, cell.column): cell for cell in table.cells}


def test_table_12_has_the_engine_at_the_arm_of_the_other_stacks():
    """64 tokens in 0.32 s at 128 tokens of context, where the other stacks were measured."""
    arm = {"context": 128}
    rows = [
        ENV,
        call("gpt-oss-20b", 2.0, "ablation-stack", **arm),
        call("gpt-oss-20b", 0.5, "ablation-stack", stack="graph", **arm),
        call("gpt-oss-20b", 0.32, **arm, **VLLM),
        call("gpt-oss-20b", 9.0, **VLLM),  # at another context
        call("gpt-oss-20b", 9.0, **arm, **VLLM, dtype="mxfp4"),
        call("gpt-oss-20b", 9.0, **arm, **VLLM, weights="random-dummy"),
    ]
    cells = table_12(rows)
    assert cells["vLLM", "p50 tok/s"].measured.value == pytest.approx(64 / 0.32)
    assert "vllm, bfloat16" in cells["vLLM", "p50 time (s)"].note
    assert cells["Transformers", "p50 time (s)"].measured.value == pytest.approx(2.0)
    assert [row for row, _ in cells if row == "vllm"] == []  # the paper's row, and no other
    assert cells["graph", "p50 time (s)"].measured.value == pytest.approx(0.5)


def test_table_12_without_an_engine_says_how_to_get_one():
    cells = table_12([ENV, call("gpt-oss-20b", 2.0, "ablation-stack", context=128)])
    assert "make vllm, then STACK=vllm" in cells["vLLM", "p50 tok/s"].measured.reason


def rungs(rows):
    found = {rung.name: rung.ratio for rung in ladder.rungs(rows, STUDY)}
    return {name: ratio for name, ratio in found.items() if "vLLM" in name}


def test_the_last_rungs_are_what_people_deploy():
    """6.0 s against 1.2 in bfloat16, 1.0 in MXFP4: ratios of 5 and 6; stand-in weights are none."""
    both = [call("gpt-oss-20b", 1.2, **VLLM), call("qwen3-32b", 6.0, **VLLM)]
    rows = [ENV, *both, call("gpt-oss-20b", 0.1, **VLLM, weights="random-dummy")]
    assert rungs(rows)["whole call, vLLM, both in bfloat16"].value == pytest.approx(5)
    assert len(rungs(rows)) == 1
    rows += [call("gpt-oss-20b", 1.0, **VLLM, dtype="mxfp4")]
    assert rungs(rows)["whole call, vLLM, as people deploy it"].value == pytest.approx(6)
    rows += [call("qwen3-32b", 4.0, **VLLM, dtype="fp8")]
    assert rungs(rows)["whole call, vLLM, as people deploy it"].value == pytest.approx(4)


def test_a_rung_that_lacks_a_model_says_which():
    ratio = rungs([ENV, call("gpt-oss-20b", 1.2, **VLLM)])["whole call, vLLM, both in bfloat16"]
    assert ratio.value is None and "no row of vLLM of Qwen3-32B in bfloat16" in ratio.reason
    assert rungs([ENV, call("gpt-oss-20b", 1.2)]) == {}


def test_an_engines_row_stands_where_the_study_computed_other_experts():
    """The study's experts are all of them; an engine has no such choice, and no second value."""
    arm = {"context": 128}
    rows = [
        ENV,
        call("gpt-oss-20b", 1.0),  # the library's choice, so that the study's is another
        call("gpt-oss-20b", 2.0, "ablation-stack", **arm),
        call("gpt-oss-20b", 0.32, **arm, **VLLM),
    ]
    cell = table_12(rows)["vLLM", "p50 tok/s"]
    assert cell.measured.value == pytest.approx(200) and cell.today is None
    assert "vllm" in cell.note
