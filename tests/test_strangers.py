"""Nobody is let in: what others have written stays text, and reaches nothing outside its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lib import files
from lib.files import ParamsError
from lib.records import jobs, slices, store
from lib.report import bundle, document
from lib.run import job as run_job
from lib.run import lease, loop, profiles
from tests.records.test_slices import JOB, at, environment, job, row

OUTSIDE = [
    "../x",
    "../../../../precious.txt",
    "/precious.txt",
    "a/../../x",
    "..",
    "",
    "a\\..\\x",
    7,
]


@pytest.fixture
def received(tmp_path) -> Path:
    """A folder of results from somebody else, beside a file that is not its business."""
    (tmp_path / "precious.txt").write_text("mine")
    env = environment()
    job(tmp_path / "r" / JOB, [env, row(env, 128, 1.0)])
    (tmp_path / "r" / JOB / "notebook.ipynb").write_text(
        '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    )
    rewrite(tmp_path / "r" / JOB)
    return tmp_path / "r"


def rewrite(folder: Path, **more) -> None:
    manifest = json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()
    files.write_json(folder / "run.json", manifest | {"artefacts": store.artefacts(folder)} | more)


def everything_outside(received: Path) -> dict[str, bytes]:
    """All files beside the folder, and those of the folder above."""
    return {
        p.as_posix(): p.read_bytes()
        for p in received.parent.rglob("*")
        if p.is_file() and not p.is_relative_to(received) and "out" not in p.parts
    }


def every_reader(received: Path) -> None:
    """What takes a folder from others: each must do its work or refuse, and touch nothing else."""
    out = received.parent / "out"
    for read in (
        lambda: document.write(received, out / "report"),
        lambda: document.write(received),
        lambda: bundle.write(received, out / "x.zip", []),
        lambda: slices.merge([received], out / "merged"),
        lambda: run_again(received),
    ):
        try:
            read()
        except ParamsError as error:
            assert "\n" not in str(error)


def run_again(received: Path) -> None:
    """A run with that folder as OUT, when its notebook has ended."""
    store.refuse_links(received)
    folder = received / JOB
    old = store.read(folder)
    staged = run_job.begin(folder)
    (staged / "notebook.ipynb").write_text("{}")
    manifest = {"status": "ok", "start": at(5), "end": at(6), "job_sha": "n", "artefacts": []}
    added = slices.add_earlier(staged, folder, manifest)
    run_job._settle(folder, old, manifest, added)


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_artefacts_name_does_not_lead_out(received, name):
    rewrite(received / JOB, artefacts=[{"path": name, "sha256": "0"}])
    before = everything_outside(received)
    (found,) = jobs.find(received)
    assert found.status == "damaged" and "artefacts" in found.error
    every_reader(received)
    assert everything_outside(received) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_plans_name_does_not_lead_out(received, name):
    plan = {"jobs": [name]}
    (received / "plan.json").write_text(json.dumps(plan))
    before = everything_outside(received)
    with pytest.raises(ParamsError, match=r"plan\.json is damaged"):
        jobs.find(received)
    every_reader(received)
    assert everything_outside(received) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_traces_name_does_not_lead_out(received, name, tmp_path):
    env = environment(host=2.0)
    other = job(tmp_path / "other" / JOB, [env, row(env, 512, 1.0, trace=name)], end=at(1))
    before = everything_outside(received)
    slices.merge([received, other.parents[2]], tmp_path / "out" / "merged")
    assert everything_outside(received) == before
    merged = {p.name for p in (tmp_path / "out" / "merged" / JOB).iterdir()}
    assert merged == {"run.json", "records.jsonl", "notebook.ipynb"}


LINKS = {
    "a file": (f"{JOB}/trace.gz", "precious.txt"),
    "the page that is written": (f"{JOB}/notebook.html", "precious.txt"),
    "a file on its way": (f"{JOB}/notebook.html.tmp", "precious.txt"),
    "the report": ("report.html", "precious.txt"),
    "a folder of tables": ("tables", "elsewhere"),
    "a job": ("n/random-hf-eager/energy", "elsewhere"),
    "what a run puts away": (f"{JOB}/.previous", "elsewhere"),
    "what a run writes": (f"{JOB}/.partial", "elsewhere"),
}


@pytest.mark.parametrize("case", LINKS)
def test_a_link_does_not_lead_out(received, case):
    name, target = LINKS[case]
    (received.parent / "elsewhere").mkdir()
    (received.parent / "elsewhere" / "run.json").write_text("{}")
    (received / name).parent.mkdir(parents=True, exist_ok=True)
    (received / name).symlink_to(received.parent / target)
    before = everything_outside(received)
    with pytest.raises(ParamsError, match="is a link that leads out of it; remove"):
        jobs.find(received)
    with pytest.raises(ParamsError, match="is a link that leads out of it; remove"):
        loop.run(profiles.profile("demo"), received)
    every_reader(received)
    assert everything_outside(received) == before


def test_a_text_on_its_way_follows_no_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.txt.tmp").symlink_to(tmp_path / "precious")
    files.write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "text"


# --- locks


def test_a_lock_is_one_per_machine_whatever_the_session_says(monkeypatch, tmp_path):
    before = lease.shared()
    for name in ("XDG_RUNTIME_DIR", "TMPDIR", "TEMP", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    assert lease.shared() == before and before.stat().st_mode & 0o1002 == 0o1002


def test_a_lock_can_be_taken_by_every_user(tmp_path):
    old = os.umask(0o077)
    try:
        with lease.lock("a", what="it", folder=tmp_path):
            mode = (tmp_path / "workbook-a.lock").stat().st_mode
    finally:
        os.umask(old)
    assert mode & 0o777 == 0o666


@pytest.mark.parametrize("kind", ["link", "dangling link", "second name", "pipe", "folder"])
def test_a_lock_cannot_be_redirected(tmp_path, kind):
    precious, path = tmp_path / "precious", tmp_path / "workbook-a.lock"
    precious.write_text("mine")
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "new")
    elif kind == "second name":
        path.hardlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with (
        pytest.raises(lease.BusyError, match=r"the lock .*workbook-a\.lock .*remove it"),
        lease.lock("a", what="it", folder=tmp_path),
    ):
        pass
    assert precious.read_text() == "mine" and not (tmp_path / "new").exists()


# --- YAML


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "alias"),
        ("a: &a {x: 1}\nb: {<<: *a}", "alias"),
        ("a: &a [*a]", "alias"),
        ("a: " + "[" * 5000 + "]" * 5000, "too deeply"),
        ("a: !!python/object/apply:os.system [x]", "no valid YAML"),
        ("? [a, b]\n: 1", "a key is a word"),
        ("a: \x00", "no valid YAML"),
    ],
)
def test_yaml_that_would_hang_or_run_is_one_line(tmp_path, text, says):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ParamsError, match=says) as error:
        files.read_yaml(tmp_path / "x.yaml")
    assert "x.yaml" in str(error.value) and "\n" not in str(error.value)


def test_yaml_may_repeat_a_word_by_an_alias(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a text\nb: *a")
    assert files.read_yaml(tmp_path / "x.yaml") == {"a": "text", "b": "text"}
