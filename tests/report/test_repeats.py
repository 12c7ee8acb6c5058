"""A notebook in a report carries what stands above it as a link, and nothing else is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bs4 import BeautifulSoup
from markupsafe import Markup
from matplotlib import pyplot as plt
from nbformat import v4

from lib import stats
from lib.report import repeats
from lib.show import figure
from lib.show.notebook_html import render_fragment
from lib.show.table import Column, Table
from tests.samples import records as sample

WHY = stats.missing("the board has no counter")
TIMES = Table(
    "times",
    "Times of <a>",
    (Column("model", numeric=False), Column("time", "s")),
    (("a", stats.exact(1.0)), ("b", stats.exact(2.0)), ("c", WHY)),
    ("one note",),
)
ALTERED = {
    "a number": replace(TIMES, rows=(("a", stats.exact(1.5)), *TIMES.rows[1:])),
    "a reason": replace(TIMES, rows=(*TIMES.rows[:2], ("c", stats.missing("other")))),
    "a note": replace(TIMES, notes=("another note",)),
    "a row": replace(TIMES, rows=TIMES.rows[:2]),
    "a unit": replace(TIMES, columns=(TIMES.columns[0], Column("time", "ms"))),
}


def report(*outputs: str, above: str = "") -> BeautifulSoup:
    """A page with these outputs in a notebook, below a table and what else stands above."""
    cells = [v4.new_output("display_data", {"text/html": html}) for html in outputs]
    notebook = v4.new_notebook(cells=[v4.new_code_cell("show()", outputs=cells)])
    fragment = render_fragment(notebook, "m--summary")
    page = f'{TIMES.html()}{above}<h2 id="notebooks">Notebooks</h2>{fragment}'
    return BeautifulSoup(repeats.linked(page), "html.parser")


def test_a_table_that_stands_above_is_a_link_to_it():
    page = report(TIMES._repr_html_())
    (link,) = page.select(".output a")
    assert page.select_one(link["href"]) is page.table.find_parent("figure")
    assert link.parent.text == "As above: Times of <a>." and not page.select(".output table")


@pytest.mark.parametrize("what", ALTERED)
def test_a_table_that_differs_stays(what):
    page = report(ALTERED[what]._repr_html_(), TIMES._repr_html_())
    (stays,) = page.select(".output table")
    assert stays.get_text() == BeautifulSoup(ALTERED[what].html(), "html.parser").table.get_text()
    assert len(page.select(".output .note a")) == 1


def test_a_picture_is_one_by_all_that_its_description_says():
    def drawn(end: float):
        ax = plt.subplots()[1]
        ax.plot([1, 2], [1.0, end], label='a "b"')
        ax.set(title="Time & more", xlabel="context", ylabel="s")
        return ax

    alts = [figure.describe(drawn(end)) for end in (2.0, 3.0)]
    source = f"data:image/png;base64,{sample.png()}"
    images = [Markup('<img alt="{}" src="{}">').format(alt, source) for alt in alts]
    page = report(*images, above=figure.html(drawn(2.0), []))
    (link,) = page.select(".output .note a")
    assert page.select_one(link["href"]).name == "figure"
    assert link.parent.text == "As above: Time & more."
    assert [image["alt"] for image in page.select(".output img")] == [alts[1]]


def test_what_repeats_within_the_notebooks_stays():
    other = ALTERED["a number"]._repr_html_()
    assert len(report(other, other).select(".output table")) == 2
