"""More than a dozen models: a page for each, made again only where it must be, and no dead link."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from bs4 import BeautifulSoup

from lib.analysis.cost import Prices
from lib.records import store
from lib.report import bundle, document, many
from tests.browser import Page
from tests.samples import records as sample
from tools import many_models

COUNT = 14
JOB = "random-hf-eager/latency"
FEW = ("demo-dense", "demo-moe")
MODELS = [*FEW, *(f"{FEW[n % 2]}-{n:03d}" for n in range(2, COUNT))]
OTHER = MODELS[3]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Pages are written in this process, so that a test can count."""
    monkeypatch.setattr(many, "WORKERS", 1)


def few(root: Path) -> Path:
    """Two models with one notebook each, one with hashes, and a notebook over both."""
    env_id = sample.environment_record(sample.CPU).env_id
    for model in FEW:
        rows = [sample.card(model, env_id), *sample.latency(model, env_id, (64, 128))]
        sample.write_job(root, f"{model}/{JOB}", rows, sample.CPU, model=model)
    path = root / FEW[0] / JOB / "run.json"
    run = json.loads(path.read_text()) | {"artefacts": store.artefacts(path.parent)}
    run["artefacts"] = [x for x in run["artefacts"] if x["path"] != "run.json"]
    path.write_text(json.dumps(run))
    sample.write_job(root, "_all/summary", [], sample.CPU, model="_all")
    return root


@pytest.fixture
def source(tmp_path) -> Path:
    many_models.copies(few(tmp_path / "few"), COUNT, tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The report of the set, elsewhere than its rows."""
    folder = tmp_path_factory.mktemp("many")
    many_models.copies(few(folder / "few"), COUNT, folder / "set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many, "WORKERS", 1)
        return document.write(folder / "set", folder / "out").parent


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The folders of the models whose pages are written, in turn."""
    folders, write = [], document._write_one

    def note(task):
        folders.append(task.folder)
        write(task)

    monkeypatch.setattr(document, "_write_one", note)
    return folders


def soup_of(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


# --- what stands where ---------------------------------------------------------------------------


def test_a_copied_model_has_rows_and_hashes_of_its_own(source):
    assert sorted(MODELS) == sorted(p.name for p in source.iterdir() if p.name != "_all")
    for model in MODELS:
        folder = source / model / JOB
        rows = store.load(folder / "records.jsonl")
        assert {r.key["model"] for r in rows if r.kind != "environment"} == {model}
        assert store.fault(folder) == ""
        assert f"latency of {model}" in (folder / "notebook.ipynb").read_text()


def test_details_are_pages_of_their_own(built):
    report = soup_of(built / "report.html")
    names = [th.span for th in report.select("#models-table tbody th")]
    assert sorted(name.text for name in names) == sorted(MODELS)
    assert [name["data-page"] for name in names] == [f"{n.text}/details.html" for n in names]
    assert [job["id"] for job in report.select("details.job")] == ["all--summary"]
    assert not report.select("#records, #grid-latency")
    for model in MODELS:
        page = soup_of(built / model / "details.html")
        assert page.h1.text == model
        assert [job["id"] for job in page.select("details.job")] == [f"{model}--latency"]
        assert page.select("details.job .notebook") and page.select("#grid-latency tbody tr")
        folders = {tr.find_all("td")[-1].text for tr in page.select("#records tbody tr")}
        assert folders == {f"{model}/{JOB}"}


def test_the_numbers_are_those_of_one_page(built, tmp_path, monkeypatch):
    """Each number of a model is the same where one page holds all models."""
    monkeypatch.setattr(many, "DOZEN", COUNT)
    whole = soup_of(document.write(built.parent / "set", tmp_path))
    assert not list(tmp_path.rglob("details.html"))
    for model in (MODELS[0], MODELS[-1]):
        page = soup_of(built / model / "details.html")
        for grid in page.select("figure.table[id^=grid-]"):
            if grid["id"] != "grid-costs":  # rows by job
                same = [tr for tr in whole.select(f"#{grid['id']} tbody tr") if tr.th.text == model]
                assert numbers(grid.select("tbody tr")) == numbers(same) != [], grid["id"]


def numbers(rows: list) -> list[list[dict]]:
    fields = ("data-value", "data-low", "data-high", "data-n", "data-records")
    return [[{f: td.get(f) for f in fields} for td in row.select("td.num")] for row in rows]


def test_what_is_over_all_models_is_bounded(built):
    report = soup_of(built / "report.html")
    assert "14 models" in report.select_one(".subtitle").text
    assert len(report.select("#card tbody tr")) == 12
    assert "The 12 that serve most of 14" in report.select_one("#card").text
    stated = report.select_one(".abstract").text
    named = {m for m in MODELS if re.search(rf"{m}(?![\w-])", stated)}
    shown = {th.find(string=True).strip() for th in report.select("#card tbody th")}
    assert named == shown and len(named) == 12
    places = report.select_one("#places").text
    assert "2 more" in places


def test_a_dozen_models_share_one_page(source, tmp_path):
    for model in MODELS[12:]:
        shutil.rmtree(source / model)
    report = soup_of(document.write(source, tmp_path / "out"))
    assert len(report.select("details.job")) == 13
    assert not list((tmp_path / "out").rglob("details.html"))


def test_nothing_of_the_other_form_is_left(source, tmp_path):
    """A set that grows beyond a dozen models, or shrinks to it, where its report stands already."""
    out = tmp_path / "out"
    for model in MODELS[12:]:
        shutil.move(source / model, tmp_path / model)
    document.write(source, out)
    assert (out / "tables/latency.csv").exists()
    for model in MODELS[12:]:
        shutil.move(tmp_path / model, source / model)
    document.write(source, out)
    assert [p.name for p in (out / "tables").iterdir()] == ["models.csv"]
    assert (out / "demo-moe/tables/latency.csv").exists()
    for model in MODELS[12:]:
        shutil.rmtree(source / model)
    document.write(source, out)
    assert not [p for p in out.rglob("details.html") if p.parent.name in MODELS[:12]]
    assert not (out / "tables/models.csv").exists()


# --- made once -----------------------------------------------------------------------------------


def test_a_second_build_renders_nothing_again(source, written, monkeypatch):
    before = document.write(source).read_bytes()
    assert written == sorted(MODELS)
    pages = {p: p.read_bytes() for p in source.rglob("*.html")}
    rendered, render = [], document.render_fragment
    monkeypatch.setattr(
        document, "render_fragment", lambda *a, **k: rendered.append(a) or render(*a, **k)
    )
    written.clear()
    assert document.write(source).read_bytes() == before
    assert (written, rendered) == ([], [])
    assert {p: p.read_bytes() for p in source.rglob("*.html")} == pages


def changed(name: str, old: str, new: str):
    def change(source: Path, patch) -> dict:
        path = source / OTHER / JOB / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return {}

    return change


def gone(name: str):
    def change(source: Path, patch) -> dict:
        (source / OTHER / name).unlink()
        return {}

    return change


def with_machine(source: Path, patch) -> dict:
    ceilings = store.Record("ceilings", {}, {}, {"read_bytes_per_s": 1e10}, env_id="x")
    sample.write_job(source, "_all/machine", [ceilings], sample.CPU, model="_all")
    return {}


def with_visit(source: Path, patch) -> dict:
    folder = source.parent / "visits"
    folder.mkdir()
    (folder / "a.jsonl").write_text("")
    return {}


def with_code(source: Path, patch) -> dict:
    patch.setattr(many, "_code", lambda: "other")
    return {}


CHANGES = {
    "a sample": (changed("records.jsonl", "9.0", "9.5"), [OTHER]),
    "a notebook": (changed("notebook.ipynb", "Question", "Query"), [OTHER]),
    "how a job ended": (changed("run.json", '"ok"', '"interrupted"'), [OTHER]),
    "its page is gone": (gone("details.html"), [OTHER]),
    "a notebook's page is gone": (gone(f"{JOB}/notebook.html"), [OTHER]),
    "a price": (lambda source, patch: {"prices": Prices(2.0)}, MODELS),
    "the machine": (with_machine, MODELS),
    "visits": (with_visit, MODELS),
    "the code": (with_code, MODELS),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_page_is_made_again_where_what_it_shows_has_changed(source, written, monkeypatch, case):
    document.write(source)
    before = {m: (source / m / "details.html").read_bytes() for m in MODELS}
    written.clear()
    change, models = CHANGES[case]
    document.write(source, **change(source, monkeypatch))
    assert written == sorted(models)
    after = {m: (source / m / "details.html").read_bytes() for m in MODELS}
    same = [m for m in MODELS if before[m] == after[m]]
    assert same == [m for m in MODELS if m not in models] or "gone" in case


# --- several processes ---------------------------------------------------------------------------


def test_processes_write_what_one_would(source, tmp_path, monkeypatch):
    document.write(source, tmp_path / "a" / "out")
    monkeypatch.setattr(many, "WORKERS", 2)
    monkeypatch.setattr(many, "cores", lambda: 2)
    document.write(source, tmp_path / "b" / "out")
    pages = [
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.html")}
        for n in ("a", "b")
    ]
    assert pages[0] == pages[1] and len(pages[0]) == 2 * COUNT + 2


def test_what_fails_in_a_process_is_raised_here(monkeypatch):
    monkeypatch.setattr(many, "WORKERS", 2)
    monkeypatch.setattr(many, "cores", lambda: 2)
    with pytest.raises(ValueError, match="'x'"):
        many.each(int, ["1", "x", "2"])


# --- links ---------------------------------------------------------------------------------------


def test_no_link_is_dead(built):
    ids: dict[Path, set[str]] = {}
    pages = list(built.rglob("*.html"))
    assert len(pages) == 2 * COUNT + 2
    for page in pages:
        soup = soup_of(page)
        targets = [a["href"] for a in soup.find_all("a", href=True)]
        targets += [name["data-page"] for name in soup.select("[data-page]")]
        for target in targets:
            path, fragment = urldefrag(target)
            if path.startswith(("http", "data:")):
                continue
            file = (page.parent / unquote(path)).resolve() if path else page
            assert file.is_file(), f"{page}: {target}"
            if fragment:
                if file not in ids:
                    ids[file] = {tag["id"] for tag in soup_of(file).find_all(id=True)}
                assert fragment in ids[file], f"{page}: {target}"


@pytest.mark.parametrize("name", ["report.html", "demo-moe/details.html"])
def test_mailed_alone_nothing_leads_to_what_is_not_there(built, name):
    links = {a["href"] for a in soup_of(built / name).find_all("a", href=True)}
    assert not [x for x in links if not x.startswith(("#", "data:", "https://", "http://"))]


def test_the_bundle_carries_every_page(source, tmp_path):
    with zipfile.ZipFile(bundle.write(source, tmp_path / "x.zip", [])) as file:
        names = {*file.namelist()}
    assert {f"set/{model}/details.html" for model in MODELS} < names


@pytest.mark.browser
def test_names_are_links_while_the_pages_lie_beside(browser, built, tmp_path):
    with Page(browser, built / "report.html") as opened:
        links = opened.page.locator("#models-table tbody th a")
        assert links.count() == COUNT and opened.errors == []
        opened.page.get_by_role("link", name=OTHER, exact=True).click()
        assert opened.page.title() == OTHER
        opened.page.get_by_role("link", name="the report of all").click()
        assert opened.page.title() == document.TITLE
    alone = tmp_path / "report.html"
    shutil.copyfile(built / "report.html", alone)
    with Page(browser, alone) as opened:
        assert opened.page.locator("#models-table tbody th").count() == COUNT
        assert opened.page.locator("#models-table tbody th a").count() == 0
        assert len(opened.requests) == 1


def test_the_tool_refuses_a_folder_that_is_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        many_models.main([str(tmp_path), "3", str(tmp_path)])
    assert "exists" in capsys.readouterr().err
