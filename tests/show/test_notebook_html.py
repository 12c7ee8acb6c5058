"""What nbconvert is asked to leave out of a notebook, and what it folds."""

import copy

import nbformat.v4 as v4
from bs4 import BeautifulSoup

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
