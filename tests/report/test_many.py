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
from lib.records import jobs, store
from lib.report import answer, bundle, document, many
from tests.browser import Page, records_of
from tests.report.test_answer import rows as timed
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


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The set with its report, made once."""
    folder = tmp_path_factory.mktemp("many")
    many_models.copies(few(folder / "few"), COUNT, folder / "set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many, "WORKERS", 1)
        return write(folder / "set").parent


def write(source: Path, **options) -> Path:
    """The report of a set, which its commands call the same wherever it lies."""
    return document.write(source, called="outputs/set", **options)


@pytest.fixture
def source(built, tmp_path) -> Path:
    """The set with its report, to be changed."""
    return Path(shutil.copytree(built, tmp_path / "set"))


@pytest.fixture
def pair(tmp_path) -> Path:
    """Two models."""
    return few(tmp_path / "set")


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The folders of the models whose pages would be written, in turn."""
    folders = []
    monkeypatch.setattr(document, "_write_one", lambda task: folders.append(task.folder))
    return folders


def soup_of(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


# --- what stands where ---------------------------------------------------------------------------


def test_a_copied_model_has_rows_and_hashes_of_its_own(built):
    assert sorted(MODELS) == sorted(p.parts[-4] for p in built.rglob(f"{JOB}/run.json"))
    for model in MODELS:
        folder = built / model / JOB
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
        assert "Measured on a CPU" in page.select_one(".banner").text
        assert [job["id"] for job in page.select("details.job")] == [f"{model}--latency"]
        assert page.select("details.job .notebook") and page.select("#grid-latency tbody tr")
        assert {line["folder"] for line in records_of(page).values()} == {f"{model}/{JOB}"}


def test_the_numbers_are_those_of_one_page(built, pair):
    """Each number of a model is the same where one page holds all models."""
    whole = soup_of(write(pair))
    assert not list(pair.rglob("details.html"))
    for model in FEW:
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
    shown = [th.find(string=True).strip() for th in report.select("#card tbody th")]
    assert named == {*shown[:4]} and "Of the 4 models that serve most" in stated
    places = report.select_one("#places").text
    assert "2 more" in places


def test_the_first_figure_is_of_the_few_that_serve_most():
    rates = {f"fast-{n:02d}": {1: 10.0 + n, 8: 40.0 + n} for n in range(COUNT)}
    first = answer.answer([r for name in rates for r in timed(name, "graph", rates[name], 400.0)])
    assert list(first.leading) == [*reversed(rates)][:4]
    assert {*re.findall(r"fast-\d\d", first.figure)} == {*first.leading}
    assert (len(first.card.rows), len(first.every.rows)) == (12, 14)


def test_a_set_that_grows_or_shrinks_leaves_nothing_of_its_other_form(pair, monkeypatch):
    assert many.DOZEN == 12
    for most in (2, 1, 2):  # models that one page holds
        monkeypatch.setattr(many, "DOZEN", most)
        jobs = soup_of(write(pair)).select("details.job")
        pages = sorted(p.parent.name for p in pair.rglob("details.html"))
        tables = {p.name for p in (pair / "tables").iterdir()}
        if most == 2:
            assert len(jobs) == 3 and not pages
            assert "latency.csv" in tables and "models.csv" not in tables
        else:
            assert len(jobs) == 1 and pages == [*FEW]
            assert tables == {"models.csv"} and (pair / FEW[0] / "tables/latency.csv").exists()


# --- made once -----------------------------------------------------------------------------------


def test_a_second_build_renders_nothing_again(source, written, monkeypatch):
    pages = {p: p.read_bytes() for p in source.rglob("*.html")}
    rendered = []
    monkeypatch.setattr(document, "render_fragment", lambda *a, **k: rendered.append(a))
    write(source)
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
    change, models = CHANGES[case]
    write(source, **change(source, monkeypatch))
    assert written == sorted(models)


def test_it_tells_how_far_it_has_come(source, written):
    texts = []
    write(source, prices=Prices(2.0), tell=texts.append)
    assert texts == ["pages of models: 12 of 14", "pages of models: 14 of 14"]


def test_what_has_changed_is_what_the_page_shows(source):
    path = source / OTHER / JOB / "notebook.ipynb"
    path.write_text(path.read_text().replace("Question", "Query"))
    before = {p: p.read_bytes() for p in source.rglob("*.html")}
    write(source)
    after = {p: p.read_bytes() for p in source.rglob("*.html")}
    pages = {source / OTHER / "details.html", path.with_suffix(".html")}
    assert {p for p in after if before[p] != after[p]} == pages
    assert all(b"Query" in after[p] for p in pages)


# --- several processes ---------------------------------------------------------------------------


def test_processes_write_what_one_would(source, monkeypatch):
    before = {p: p.read_bytes() for p in source.rglob("*.html")}
    for model in MODELS[:2]:
        (source / model / "details.html").unlink()
    monkeypatch.setattr(many, "WORKERS", 2)
    monkeypatch.setattr(many, "cores", lambda: 2)
    write(source)
    assert {p: p.read_bytes() for p in source.rglob("*.html")} == before


def test_what_fails_in_a_process_is_raised_here(monkeypatch):
    monkeypatch.setattr(many, "WORKERS", 2)
    monkeypatch.setattr(many, "cores", lambda: 2)
    with pytest.raises(ValueError, match="'x'"):
        list(many.each(int, ["1", "x", "2"]))


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


def test_the_bundle_carries_every_page(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(many, "DOZEN", 1)
    with zipfile.ZipFile(bundle.write(pair, tmp_path / "x.zip", [])) as file:
        names = {*file.namelist()}
    assert {f"set/{model}/details.html" for model in FEW} < names


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


def test_one_notebook_of_many_models_reads_no_other_job(source, monkeypatch):
    """A run writes the page of each notebook when it ends."""
    paths, read = [], jobs._read
    monkeypatch.setattr(jobs, "_read", lambda root, path: paths.append(path) or read(root, path))
    page = source / OTHER / JOB / "notebook.html"
    before = page.read_bytes()
    page.unlink()
    assert document.write_notebook_page(page.parent) == page
    assert page.read_bytes() == before and paths == [f"{OTHER}/{JOB}"]
