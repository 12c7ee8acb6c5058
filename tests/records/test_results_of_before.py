"""A result folder written before lib was packages still loads, merges, renders and is finished."""

from __future__ import annotations

import json
import zipfile

import pytest

from lib.files import ROOT
from lib.records import jobs, slices, store
from lib.records.record import select
from lib.report import document

LATENCY = "tiny-yi/random-hf-eager/latency"


@pytest.fixture
def results(tmp_path):
    """The folder as commit fd305ae wrote it, less its summary and pages that can be made again."""
    with zipfile.ZipFile(ROOT / "tests" / "data" / "results-fd305ae.zip") as archive:
        archive.extractall(tmp_path / "before")
    return tmp_path / "before"


def test_its_rows_load_with_samples_and_key(results):
    rows = store.load_tree(results)
    calls = select(rows, "latency", context=256, new_tokens=16)
    assert [len(row.samples["e2e_s"]) for row in calls] == [6]
    assert calls[0].samples["e2e_s"][0] == 0.096349944999929
    assert calls[0].key["stack"] == "hf-eager" and calls[0].key["model"] == "tiny-yi"
    assert {row.kind for row in rows} >= {"environment", "card", "latency", "memory-paper"}


def test_its_jobs_are_finished_by_their_own_hashes(results):
    manifest = store.read(results / LATENCY)
    assert store.is_finished(results / LATENCY, manifest, manifest["job_sha"])
    assert [job.status for job in jobs.find(results)] == ["ok", "ok", "missing"]


def test_it_merges_into_what_it_was(results, tmp_path):
    assert slices.merge([results], tmp_path / "merged") == []
    rows = (tmp_path / "merged" / LATENCY / "records.jsonl").read_text()
    assert rows == (results / LATENCY / "records.jsonl").read_text()


def test_its_report_shows_the_numbers_it_showed(results, tmp_path):
    page = document.write(results, tmp_path / "out").read_text()
    assert "tiny-yi" in page and "ended" in page
    lines = (tmp_path / "out" / "tables" / "latency.csv").read_text().splitlines()
    manifest = json.loads((results / LATENCY / "run.json").read_text())
    assert len(lines) == 1 + len(manifest["parameters"]["contexts"]) == 3
    # TTFT, output and decode throughput of the shorter context, as fd305ae printed the first two
    line = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    names = ("TTFT (ms)", "output throughput (tok/s)", "decode throughput (tok/s)")
    values = [[line[name], line[f"{name}_low"], line[f"{name}_high"]] for name in names]
    assert values[0] == ["11.875387", "7.786654", "17.850594"]
    assert values[1] == ["255.36435", "160.24577", "342.21251"]
    assert values[2] == ["300.98149", "182.93567", "429.17831"]  # with calls of one token
