"""How a report reads in a browser: its length, its tables, and what one can take out of each."""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import nbformat.v4 as v4
import pytest
from markupsafe import Markup

from lib import stats
from lib.analysis import glossary
from lib.files import ROOT
from lib.report import document
from lib.show import page
from lib.show.notebook_html import render_fragment
from lib.show.table import Column, Table
from lib.stats import Estimate
from tests.browser import Page
from tests.samples import records as sample

SCREEN = {"width": 1280, "height": 900}
SCREENS, FIRST, WORDS, WORDS_OPEN = 30, 250, 15_000, 40_000
COLUMNS = 8
OUTSIDE = "!e.closest('section:has(> #notebooks)')"  # notebooks are counted apart


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The paper's models, every notebook of them."""
    root = sample.write_paper(tmp_path_factory.mktemp("reading"))
    return document.write(root)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The released set, which is what readers see first."""
    out = tmp_path_factory.mktemp("released")
    return document.write(ROOT / "outputs/released/h100-sxm", out)


def words(page) -> int:
    return page.evaluate(
        "[...document.querySelectorAll('main > :not(section:has(> #notebooks))')]"
        ".map(e => e.innerText.split(/\\s+/).filter(Boolean).length).reduce((a, b) => a + b)"
    )


def open_all(page) -> None:
    page.evaluate("document.querySelectorAll('details:not(.job)').forEach(d => { d.open = true; })")
    page.wait_for_timeout(100)  # a part is filled after it is opened


@pytest.mark.browser
def test_the_body_is_short_and_stays_so_with_its_folds_open(browser, released):
    with Page(browser, released, viewport=SCREEN) as opened:
        first = opened.page.locator("section.answer").inner_text().split()
        assert 100 < len(first) <= FIRST
        assert opened.page.evaluate("document.documentElement.scrollHeight") <= SCREENS * 900
        assert 1000 < words(opened.page) <= WORDS
        open_all(opened.page)
        assert opened.page.locator("#records tbody tr").count() > 0
        for fold in opened.page.locator(".columns button").filter(visible=True).all():
            fold.click()
        assert WORDS < words(opened.page) <= WORDS_OPEN
        assert opened.errors == []


@pytest.mark.browser
def test_a_table_shows_eight_columns_and_the_rest_on_demand(browser, report):
    shown = (
        "t => [...t.tBodies[0].rows[0].cells].filter(c => getComputedStyle(c).display !== 'none')"
        ".length"
    )
    with Page(browser, report, viewport=SCREEN) as opened:
        open_all(opened.page)
        tables = opened.page.locator("figure.table table.sortable")
        wide = 0
        for table in tables.all():
            if not table.evaluate(f"e => {OUTSIDE}"):
                continue
            total = table.evaluate("t => t.tBodies[0].rows[0].cells.length")
            assert table.evaluate(shown) <= COLUMNS
            if total > COLUMNS:
                wide += 1
                figure = table.locator("xpath=ancestor::figure")
                figure.locator(".columns button").click()
                assert table.evaluate(shown) == total
        assert wide > 2
        # a grouped head is cut between two groups, with the columns under it
        opened.page.locator("#table-1 .columns button").click()
        spans = opened.page.evaluate(
            "[...document.querySelectorAll('#table-1 thead tr')].map(r => [...r.cells]"
            ".filter(c => getComputedStyle(c).display !== 'none')"
            ".reduce((n, c) => n + (c.scope === 'colgroup' ? 0 : 1), 0)).reduce((a, b) => a + b)"
        )
        assert spans == opened.page.locator("#table-1 table").evaluate(shown)


@pytest.mark.browser
def test_the_head_of_a_long_table_stays_and_a_wide_one_hints_at_more(browser, report):
    with Page(browser, report, viewport=SCREEN) as opened:
        open_all(opened.page)
        opened.page.locator("#records button", has_text="Show all").click()
        region = opened.page.locator("#records .scroll")
        assert region.bounding_box()["height"] <= 0.86 * SCREEN["height"]
        region.evaluate("e => { e.scrollTop = 2000; }")
        head, box = region.locator("thead").bounding_box(), region.bounding_box()
        assert abs(head["y"] - box["y"]) < 3
        assert "gradient" in region.evaluate("e => getComputedStyle(e).backgroundImage")


@pytest.mark.browser
def test_each_table_and_picture_has_a_link_and_its_files(browser, report):
    with Page(browser, report, viewport=SCREEN) as opened:
        open_all(opened.page)
        figures = "[...document.querySelectorAll('figure.table, figure.picture')]"
        bare = opened.page.evaluate(
            f"{figures}.filter(e => {OUTSIDE} && (e.querySelector('svg') || "
            "e.querySelector('tbody tr'))).filter(f => !f.id || "
            "!f.querySelector('.tools a[href=\"#' + f.id + '\"]') || "
            "!f.querySelector('.tools [data-shows=CSV]') || "
            "(f.querySelector('svg') && !f.querySelector('.tools [data-shows=SVG]')))"
            ".map(f => f.id || f.outerHTML.slice(0, 80))"
        )
        assert bare == [] and opened.page.locator("figure.picture").count() > 2
        tools = opened.page.locator("#table-1 .tools")
        assert tools.evaluate("e => getComputedStyle(e).opacity") == "0"
        tools.locator("a").focus()
        assert tools.evaluate("e => getComputedStyle(e).opacity") == "1"
        tools.locator("a").press("Enter")
        assert opened.page.url.endswith("#table-1")
        assert opened.errors == []


def downloaded(opened, control) -> tuple[str, str]:
    with opened.page.expect_download() as download:
        control.click()
    name = download.value.suggested_filename
    return name, Path(download.value.path()).read_text(encoding="utf-8")


@pytest.mark.browser
def test_the_csv_of_a_table_holds_what_it_shows(browser, report):
    """Against the file that the report writes beside itself, number for number."""
    with Page(browser, report, "#grid-latency", viewport=SCREEN) as opened:
        tools = opened.page.locator("#grid-latency .tools")
        name, text = downloaded(opened, tools.get_by_role("button", name="CSV"))
        assert name == "grid-latency.csv" and opened.errors == []
    lines = list(csv.DictReader(io.StringIO(text)))
    with (report.parent / "tables" / "latency.csv").open(encoding="utf-8") as file:
        wanted = list(csv.DictReader(file))
    assert len(lines) == len(wanted) > 3

    def of(line: dict, start: str, end: str) -> str:
        (name,) = [k for k in line if k.startswith(start) and k.endswith(end)]
        return line[name]

    for mine, theirs in zip(lines, wanted, strict=True):
        for column in ("TTFT", "output throughput"):
            for end, other in ((" low", "_low"), (" high", "_high"), (" n", "_n")):
                assert of(mine, column, end) == of(theirs, column, other)
        assert re.fullmatch(r"[\d.]+|– \(.+\)", of(mine, "ITL", "ms"))


@pytest.mark.browser
def test_a_picture_can_be_taken_out_as_svg_and_csv(browser, report):
    with Page(browser, report, "#ladder", viewport=SCREEN) as opened:
        figure = opened.page.locator("figure.picture").first
        figure.scroll_into_view_if_needed()
        name, text = downloaded(opened, figure.get_by_role("button", name="SVG"))
        root = ElementTree.fromstring(text)
        assert name.endswith(".svg") and root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.search(r"var\(|currentColor|color-mix", text)
        name, text = downloaded(opened, figure.locator("a[download]"))
        assert name.endswith(".csv") and text.startswith("series,") and text.count("\n") > 2
        assert opened.errors == []


@pytest.mark.browser
def test_a_word_opens_its_definition_by_mouse_and_keyboard(browser, report):
    meaning = {word: x.meaning for x in glossary.DEFINITIONS for word in x.words}
    with Page(browser, report, "#grid-latency", viewport=SCREEN) as opened:
        page, panel = opened.page, opened.page.locator(".about:popover-open")
        opened.page.locator("main p .term, main li .term, main td .term").first.click()
        assert panel.get_attribute("aria-label") == "What the word means"
        page.keyboard.press("Escape")
        assert panel.count() == 0
        header = (
            page.locator("#grid-latency thead")
            .get_by_role("button", name="What this column means")
            .first
        )
        header.focus()
        assert header.evaluate("e => getComputedStyle(e).opacity") == "1"
        page.keyboard.press("Enter")
        text = panel.inner_text()
        assert "TTFT (ms)" in text and meaning["TTFT"][1:] in text
        panel.locator("a").click()
        assert panel.count() == 0
        assert page.locator("#term-ttft-ms").is_visible()
        number = page.locator("#grid-latency td[data-n] .open").first  # TTFT
        number.click()
        assert meaning["TTFT"] in panel.inner_text()
        assert opened.errors == []


@pytest.mark.browser
def test_words_are_marked_once_a_part_whole_and_nowhere_that_already_acts(browser, tmp_path):
    root = sample.write_demo(tmp_path)
    path = document.write(root)
    planted = (
        "<section><p>MBU, then MBU and APE-TPOT; an ape, a TTFTs and knees.</p>"
        "<p><a href='#data'>TTFT</a> <code>ITL</code> A Knee.</p></section>"
    )
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("<section>", planted + "<section>", 1), encoding="utf-8")
    with Page(browser, path) as opened:
        terms = opened.page.locator("section", has_text="then MBU").first.locator(".term")
        assert terms.all_inner_texts() == ["MBU", "APE-TPOT", "Knee"]
        opened.page.emulate_media(media="print")
        style = "e => getComputedStyle(e).textDecorationLine"
        assert terms.first.evaluate(style) == "none"  # plain text on paper
        assert not opened.page.locator("th .term").filter(visible=True).count()


TIMED = Estimate(6473.4, 6332.0, 6516.5, 6, "median")


@pytest.mark.browser
def test_in_a_notebook_too_numbers_sort_and_say_how_they_were_measured(browser, tmp_path):
    """By what stands before the interval; a count beside them says nothing and is left alone."""
    large = replace(TIMED, value=11000.0, low=10000.0, high=12000.0)
    rows = (
        ("a", large, 20),
        ("b", stats.missing("no counter"), 3),
        ("c", TIMED, 1000),
        ("d", stats.exact(99.0), 4),
    )
    grid = Table("t", "T", (Column("m", numeric=False), Column("t", "s"), Column("n")), rows)
    output = v4.new_output("display_data", {"text/html": grid._repr_html_()})
    notebook = v4.new_notebook(cells=[v4.new_code_cell("t", outputs=[output])])
    fragment = render_fragment(notebook, "x")
    path = tmp_path / "page.html"
    shell = {"title": "T", "kicker": "", "subtitle": "", "footer": "", "demo": False}
    job = {"status": "ok", "end": "", "id": "x"}
    shell |= {"fragment": Markup(fragment), "job": job, "report_href": "r", "ipynb_href": "n"}
    path.write_text(
        page.document("notebook.html", terms=glossary.terms(), **shell), encoding="utf-8"
    )
    with Page(browser, path) as opened:
        names, cells = opened.page.locator("tbody th"), opened.page.locator("tbody tr")
        for column, order in (("t", ["d", "c", "a", "b"]), ("n", ["b", "d", "a", "c"])):
            opened.page.locator("thead th", has_text=column).last.locator("button.sort").click()
            assert names.all_inner_texts() == order
        titles = [
            [td.get_attribute("title") for td in row.locator("td").all()] for row in cells.all()
        ]
        own = stats.exact(1.0)
        assert dict(zip(names.all_inner_texts(), titles, strict=True)) == {
            "a": ["n = 6; median", None],
            "b": [None, None],
            "c": ["n = 6; median", None],
            "d": [f"n = 1; {own.method}; {own.reason}", None],
        }
        assert opened.errors == []
