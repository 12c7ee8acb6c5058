"""Where a job's time went, by hand."""

import dataclasses
import json

import pytest

from lib.records.jobs import Job
from lib.records.record import Record
from lib.report import provenance

KEY = {"model": "m", "stack": "graph"}


@pytest.fixture
def job(tmp_path):
    cells = [{"cell_type": "markdown", "metadata": {}}] + [
        {"cell_type": "code", "metadata": {"papermill": {"duration": seconds}}}
        for seconds in (4.0, 3.0, 20.0)
    ]
    (tmp_path / "notebook.ipynb").write_text(json.dumps({"cells": cells}))
    run = {
        "status": "ok",
        "start": "2026-11-24T10:00:00.000+00:00",
        "end": "2026-11-24T10:00:32.500+00:00",
    }
    rows = (
        Record("environment", values={}, env_id="e"),
        Record("card", KEY, values={"load_s": 2.5}),
        Record(
            "latency",
            KEY,
            samples={"warmup_s": [3.0, 1.0], "e2e_s": [5.0, 5.0]},
            values={"prepare_s": 2.0},
        ),
        Record("latency", KEY, samples={"warmup_s": [0.5], "ttft_s": [1.0]}),
    )
    return Job("m/random-graph/latency", tmp_path, run, rows)


def test_jobs_on_other_gpus_of_the_host_are_told(job):
    def facts(**values):
        env = Record("environment", values={"gpu": "H", **values}, env_id="e")
        table = provenance.provenance([dataclasses.replace(job, records=(env,))])
        return {line["fact"]: line["value"] for line in table.lines()}

    told = facts(neighbours=3)["neighbours"]
    assert told == "3 other GPU(s) of the host had jobs of their own"
    assert "neighbours" not in facts()


def test_the_parts_of_a_job_add_up_to_it(job):
    seconds = provenance.parts(job)
    assert seconds == pytest.approx(
        {
            "job": 32.5,
            "startup": 5.5,
            "imports": 4.0,
            "build": 2.5,
            "prepare": 2.0,
            "warmup": 2.5,
            "timed": 11.0,
            "other": 5.0,
        }
    )
    assert sum(seconds.values()) == pytest.approx(2 * seconds["job"])


def test_rows_of_an_earlier_run_cost_this_one_nothing(job):
    old = Record("latency", KEY | {"context": 1}, samples={"e2e_s": [100.0]}, env_id="before")
    run = job.run | {"earlier": [{"env_ids": ["before"]}]}
    again = Job(job.path, job.folder, run, (*job.records, old))
    assert provenance.parts(again) == provenance.parts(job)


def test_the_table_says_what_share_setting_up_took(job):
    table = provenance.table([job])
    assert len(table.rows) == 1 and table.rows[0][:2] == ("m", "random-graph")
    assert "37%" in table.notes[-1]  # (5.5 + 4 + 2.5) / 32.5


def test_a_job_that_failed_or_measured_nothing_has_no_line(job):
    failed = Job(job.path, job.folder, job.run | {"status": "failed"}, job.records)
    reading = Job(job.path, job.folder, job.run, ())
    assert not provenance.table([failed, reading]).rows


@pytest.mark.parametrize("end", ["2026-11-24T09:59:00+00:00", "2026-11-24T10:00:20+00:00"])
def test_a_clock_that_was_set_back_tells_no_seconds(job, end):
    """By an hour or by twelve seconds: the cells alone took 27 s."""
    before = provenance.table([job])
    other = dataclasses.replace(job, run=job.run | {"end": end})
    table = provenance.table([other, job])
    first, second = table.rows
    assert {cell.value for cell in first[3:]} == {None}
    assert {cell.reason for cell in first[3:]} == {"the clock was set back while it ran"}
    assert (second, table.notes) == (before.rows[0], before.notes)
