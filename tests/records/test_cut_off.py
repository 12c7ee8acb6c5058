"""What a run leaves whose runner or machine went away, as a merge takes it up."""

from __future__ import annotations

import json

import pytest

from lib.files import ParamsError
from lib.records import cut_off, slices, store
from lib.run.job import recover
from tests.records.test_slices import JOB, NOTEBOOK, at, card, environment, job, row, seconds


def left(out, rows, notebook=NOTEBOOK, **fields):
    """A job's folder with a run that was cut off after it had written these rows."""
    staged = out / JOB / store.PARTIAL
    staged.mkdir(parents=True)
    run = {"env": {"gpu": "A"}, "parameters": {}, "start": at(4), "job_sha": "new", "attempt": 1}
    cut_off.announce(staged, run | fields)
    for line in rows:
        store.append(staged / "records.jsonl", line)
    (staged / "notebook.ipynb").write_text(notebook)
    return staged


@pytest.fixture
def env():
    return environment()


def test_its_rows_stand_beside_those_of_a_run_that_ended(tmp_path, env):
    job(tmp_path / "a" / JOB, [env, card(env), row(env, 128, 1.0)])
    left(tmp_path / "b", [env, card(env), row(env, 512, 2.0)])
    slices.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert seconds(tmp_path / "both" / JOB) == {(128, "bfloat16"): 1.0, (512, "bfloat16"): 2.0}
    run = store.read(tmp_path / "both" / JOB)
    assert run["status"] == "ok"  # the finished one counts
    assert [(e["status"], e["complete"]) for e in run["earlier"]] == [("interrupted", False)]


def test_alone_it_is_an_interrupted_run(tmp_path, env):
    staged = left(tmp_path / "b", [env, row(env, 512, 2.0)])
    with (staged / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write(store.line(row(env, 1024, 3.0))[:40])  # the power went
    before = {path: path.read_bytes() for path in staged.iterdir()}
    slices.merge([tmp_path / "b"], tmp_path / "out")
    folder = tmp_path / "out" / JOB
    run = store.read(folder)
    assert (run["status"], run["error"]["value"]) == ("interrupted", cut_off.OPEN)
    assert seconds(folder) == {(512, "bfloat16"): 2.0}
    assert store.damage(folder, run) == "" and not (folder / store.PARTIAL).exists()
    assert {path: path.read_bytes() for path in staged.iterdir()} == before


@pytest.mark.parametrize("text", ["", NOTEBOOK[:20], "[]", json.dumps({"cells": [{}]})])
def test_half_a_notebook_is_left_out(tmp_path, env, text):
    left(tmp_path / "b", [env, row(env, 512, 2.0)], notebook=text)
    slices.merge([tmp_path / "b"], tmp_path / "out")
    assert {a["path"] for a in store.read(tmp_path / "out" / JOB)["artefacts"]} == {"records.jsonl"}


@pytest.mark.parametrize("measured", [[], [environment()], [environment(), card(environment())]])
def test_nothing_measured_is_no_run(tmp_path, env, measured):
    left(tmp_path / "b", measured)
    with pytest.raises(ParamsError, match="no run.json below"):
        slices.merge([tmp_path / "b"], tmp_path / "out")


def test_rows_or_a_manifest_that_cannot_be_read_are_no_run(tmp_path, env):
    staged = left(tmp_path / "a", [env, row(env, 512, 2.0)])
    (staged / "records.jsonl").write_text("no row\n")
    assert cut_off.take_up(staged) is None
    staged = left(tmp_path / "b", [env, row(env, 512, 2.0)])
    (staged / "run.json").write_text('{"status": "interr')
    assert cut_off.take_up(staged) is None


def test_a_link_out_of_it_is_refused_before_anything_is_copied(tmp_path, env):
    staged = left(tmp_path / "b", [env, row(env, 512, 2.0)])
    (tmp_path / "secret").write_text("s")
    (staged / "trace.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(ParamsError, match="is not closed"):
        slices.merge([tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_report_says_where_rows_wait(tmp_path, env, capsys):
    from lib.__main__ import main

    job(tmp_path / "a" / JOB, [env, card(env), row(env, 128, 1.0)])
    left(tmp_path / "a", [env, row(env, 512, 2.0)])
    main(["report", "--from", str(tmp_path / "a"), "--out", str(tmp_path / "page")])
    assert f"{JOB} holds a run that nobody ended: `make merge`" in capsys.readouterr().err


def test_a_run_that_ends_while_it_is_copied_is_left_to_its_folder(tmp_path, env, monkeypatch):
    job(tmp_path / "a" / JOB, [env, card(env), row(env, 128, 1.0)])
    left(tmp_path / "a", [env, row(env, 512, 2.0)])

    def gone(source, target):
        target.mkdir(parents=True)
        raise FileNotFoundError(source)

    with monkeypatch.context() as patch:
        patch.setattr(cut_off.shutil, "copytree", gone)
        assert cut_off.take_in(tmp_path / "a", tmp_path / "copies") is None
    slices.merge([tmp_path / "a"], tmp_path / "out")
    assert {context for context, _ in seconds(tmp_path / "out" / JOB)} == {128, 512}


def test_the_next_run_says_whether_the_rows_are_kept(tmp_path, env):
    left(tmp_path / "a", [env, row(env, 512, 2.0)])
    told = recover(tmp_path / "a" / JOB)
    assert told.endswith(f"{cut_off.WHY}; its 2 rows are kept")
    job(tmp_path / "b" / JOB, [env, row(env, 128, 1.0)])
    left(tmp_path / "b", [env, row(env, 512, 2.0)])
    told = recover(tmp_path / "b" / JOB)
    assert told.endswith(f"{cut_off.WHY}; the finished run of before stays")
    assert {context for context, _ in seconds(tmp_path / "b" / JOB)} == {128}
