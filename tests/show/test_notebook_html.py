"""What nbconvert is asked to leave out of a notebook, and what it folds."""

import base64
import copy
import io

import nbformat.v4 as v4
from bs4 import BeautifulSoup
from PIL import Image

from lib.show import notebook_html
from lib.show.notebook_html import render_fragment


def test_code_is_folded_and_prompts_banners_and_noise_are_left_out():
    output = v4.new_output("execute_result", {"text/plain": "42"}, execution_count=1)
    bar = v4.new_output("stream", name="stderr", text="50%|##  | 1/2 [00:01]\n")
    notebook = v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# An error", metadata={"tags": ["papermill-error-cell-tag"]}),
            v4.new_code_cell("secret = 1", metadata={"tags": ["remove-cell", "other"]}),
            v4.new_code_cell("6 * 7", outputs=[bar, output], execution_count=1),
            v4.new_code_cell("", outputs=[output]),
        ]
    )
    before = copy.deepcopy(notebook)
    soup = BeautifulSoup(render_fragment(notebook, "x"), "html.parser")
    assert soup.get_text(" ", strip=True).split() == ["Code", "6", "*", "7", "42", "42"]
    (code,) = soup.select("details.code")  # the cell without a source has none
    assert code.summary.string == "Code" and code.pre.get_text().strip() == "6 * 7"
    assert all(pre["tabindex"] == "0" for pre in soup.find_all("pre"))
    assert notebook == before


def test_a_chart_gets_a_palette_and_what_is_no_chart_stays():
    drawn = Image.new("RGB", (200, 100), "white")
    drawn.paste((10, 120, 200), (20, 20, 60, 60))
    drawn.putpixel((0, 0), (9, 9, 9))
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    before, see_through = (embedded(picture) for picture in (drawn, clear))
    after = notebook_html._fewer_colors(before)
    assert len(after) <= len(before)
    shown = Image.open(io.BytesIO(base64.b64decode(after.partition(",")[2]))).convert("RGB")
    assert shown.size == drawn.size and shown.getpixel((30, 30)) == (10, 120, 200)
    for kept in (see_through, "data:image/png;base64,AAAA", "data:image/svg+xml,<svg/>", ""):
        assert notebook_html._fewer_colors(kept) == kept


def embedded(picture):
    file = io.BytesIO()
    picture.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
