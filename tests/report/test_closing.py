"""The lines that a run ends with."""

from __future__ import annotations

import pytest

from lib.report import closing
from tests.samples import records as sample


def test_each_model_and_stack_is_a_line_with_what_one_user_gets(tmp_path):
    lines = closing.text(sample.write_paper(tmp_path)).splitlines()
    assert lines[0].split()[:2] == ["model", "stack"]
    mine = next(line for line in lines if line.startswith("gpt-oss-20b") and "hf-eager" in line)
    assert "2,048" in mine
    first_ms = 1e3 * sample.prefill_s("gpt-oss-20b", 2048)
    assert f"{first_ms:.4g}"[:3] in mine
    assert len({line.index("hf-eager") for line in lines if "hf-eager" in line}) == 1  # a column


def test_nothing_timed_is_no_table(tmp_path):
    sample.write_job(tmp_path, "_all/summary", [], sample.GPU, model="x")
    assert closing.text(tmp_path) == ""


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_of_a_run_that_measured_nothing_there_is_no_table(status, tmp_path):
    folder = sample.write_job(tmp_path, "m/x/latency", [], sample.CPU, status=status, model="m")
    (folder / "records.jsonl").unlink()
    assert closing.text(tmp_path) == ""
