"""A page is taken over where this program wrote it here; what others sent is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lib import files
from lib.records import store
from lib.report import document, many, pages
from tests.samples import records as sample

JOB = "random-hf-eager/latency"
MODELS = ("demo-dense", "demo-moe")


def at_home(home: Path, patch: pytest.MonkeyPatch) -> None:
    """As in a process of a user who has this home."""
    patch.setenv(files.CACHE_VARIABLE, str(home))
    patch.setattr(pages, "OWN", set())


@pytest.fixture
def sent(tmp_path) -> Path:
    """A set of two models."""
    root, env_id = tmp_path / "set", sample.environment_record(sample.CPU).env_id
    for model in MODELS:
        rows = [sample.card(model, env_id), *sample.latency(model, env_id, (64, 128))]
        sample.write_job(root, f"{model}/{JOB}", rows, sample.CPU, model=model)
    return root


@pytest.fixture(params=["one page", "a page for each model"])
def received(request, sent, tmp_path, monkeypatch) -> Path:
    """The set with its report, as somebody else has sent it, who has this program too."""
    monkeypatch.setattr(many, "WORKERS", 1)
    monkeypatch.setattr(many, "DOZEN", 12 if request.param == "one page" else 1)
    at_home(tmp_path / "sender", monkeypatch)
    document.write(sent, called="outputs/set")
    at_home(tmp_path / "mine", monkeypatch)
    return sent


def html(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.html")}


def write(root: Path) -> dict[str, bytes]:
    document.write(root, called="outputs/set")
    return html(root)


PLACES = (document.FRAGMENT[1], "<main", "</main>")  # within the notebook, before, and at the end


def planted(root: Path) -> None:
    """In every page, which goes on to say truly what it was made from."""
    for path in root.rglob("*.html"):
        text = path.read_text()
        for place in PLACES:
            text = text.replace(place, f"<b>planted</b>{place}", 1)
        path.write_text(text)


def test_a_page_of_others_is_made_again(received):
    before = html(received)
    planted(received)
    assert all(b"planted" in text for text in html(received).values())
    assert write(received) == before


def test_a_page_that_was_written_here_and_changed_since_is_made_again(received):
    before = write(received)
    planted(received)
    assert write(received) == before
    one, other = (received / model / JOB / "notebook.html" for model in MODELS)
    shutil.copy(one, other)  # written here too, of another notebook
    assert write(received) == before


@pytest.mark.parametrize("status", ["damaged", "missing"])
def test_a_page_without_a_notebook_goes(received, status):
    folder = received / MODELS[0] / JOB
    if status == "damaged":
        (folder / "notebook.ipynb").write_text("{}")
    else:
        (folder / "run.json").unlink()
        (folder / "notebook.ipynb").unlink()
        (received / "plan.json").write_text(json.dumps({"jobs": [f"{MODELS[0]}/{JOB}"]}))
    assert (folder / "notebook.html").exists()
    assert f"{MODELS[0]}/{JOB}/notebook.html" not in write(received)


def test_a_table_of_others_is_written_again(received):
    """It stands beside the page of a model, which holds the same table."""
    tables = {p: p.read_bytes() for p in received.rglob("*.csv")}
    write(received)
    for path in tables:
        path.write_text("a,b\n1,2\n")
    added = next(iter(tables)).with_name("added.csv")
    added.write_text("a,b\n1,2\n")
    write(received)
    assert {p: p.read_bytes() for p in received.rglob("*.csv")} == tables


@pytest.mark.parametrize("name", ["page.html", "./notebook.html", "a/b.HTM", "p.svg", "x.xhtml"])
def test_a_page_among_the_files_of_a_run_is_damage(sent, name):
    """No run writes one, and a bundle would pass it on."""
    folder = sent / MODELS[0] / JOB
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("<b>planted</b>")
    run = json.loads((folder / "run.json").read_text())
    run["artefacts"] = [{"path": name, "sha256": files.file_sha(folder / name)}]
    (folder / "run.json").write_text(json.dumps(run))
    job = next(job for job in document.find(sent) if job.folder == folder)
    assert f"lists {name}, which no run has written" in job.error
    assert store.read(folder) is None  # so that nothing copies what it lists


# --- the list of what was written here -----------------------------------------------------------


def test_a_page_is_known_to_later_processes(tmp_path, monkeypatch):
    at_home(tmp_path, monkeypatch)
    pages.write(tmp_path / "a.html", "page")
    monkeypatch.setattr(pages, "OWN", set())
    assert pages.is_own(tmp_path / "a.html")
    at_home(tmp_path / "another", monkeypatch)
    assert not pages.is_own(tmp_path / "a.html")


def no_home(path: Path) -> Path:
    raise RuntimeError("no home")


@pytest.mark.parametrize("fault", ["a file for a folder", "nowhere"])
def test_where_no_list_can_be_kept_pages_are_known_to_this_process(tmp_path, monkeypatch, fault):
    (tmp_path / "file").write_text("x")
    at_home(tmp_path / "file", monkeypatch)
    if fault == "nowhere":
        monkeypatch.delenv(files.CACHE_VARIABLE)
        monkeypatch.setattr(Path, "expanduser", no_home)
    pages.write(tmp_path / "a.html", "page")
    assert pages.is_own(tmp_path / "a.html")
    monkeypatch.setattr(pages, "OWN", set())
    assert not pages.is_own(tmp_path / "a.html")


@pytest.mark.parametrize("before", [b"\xff\x00", b"abc"])
def test_a_damaged_list_costs_no_later_line(tmp_path, monkeypatch, before):
    (tmp_path / pages.NAME).write_bytes(before)
    at_home(tmp_path, monkeypatch)
    pages.write(tmp_path / "a.html", "page")
    monkeypatch.setattr(pages, "OWN", set())
    assert pages.is_own(tmp_path / "a.html")


def test_the_list_keeps_the_newest(tmp_path, monkeypatch):
    at_home(tmp_path, monkeypatch)
    monkeypatch.setattr(pages, "MOST", 4 * 65)
    written = []
    for number in range(8):
        written.append(tmp_path / f"{number}.html")
        pages.write(written[-1], f"page {number}")
        monkeypatch.setattr(pages, "OWN", set())
        assert pages.is_own(written[-1])
    assert (tmp_path / pages.NAME).stat().st_size <= 5 * 65
    assert not pages.is_own(written[0])
