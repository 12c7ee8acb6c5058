"""An executed notebook keeps what it shows, in fewer bytes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import nbformat.v4 as v4
import pytest
from PIL import Image

from lib.records import executed

ROWS = [f"| {n} | {n * n} |\n" for n in range(40)]


def picture() -> str:
    drawn, file = Image.new("RGB", (100, 100)), io.BytesIO()
    drawn.putdata([(x * y % 250, x, y) for x in range(100) for y in range(100)])
    drawn.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def shrunk(path: Path, data: dict[str, Any], **metadata: Any) -> tuple[dict, dict]:
    """A notebook with this output before and after, as JSON."""
    output = v4.new_output("display_data", data)
    cell = v4.new_code_cell("show()", outputs=[output], metadata=metadata)
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# é"), cell])
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    before = json.loads(path.read_text())
    executed.shrink(path)
    after = json.loads(path.read_text())
    executed.shrink(path)
    assert json.loads(path.read_text()) == after  # once is enough
    return before, after


def outputs(notebook: dict) -> dict[str, Any]:
    return notebook["cells"][1]["outputs"][0]["data"]


def test_but_for_its_pictures_a_notebook_is_the_same(tmp_path):
    shown = {"image/png": picture() + "\n", "text/plain": "<Figure é>"}
    before, after = shrunk(tmp_path / "notebook.ipynb", shown)
    assert len(outputs(after)["image/png"]) < len(shown["image/png"])
    outputs(after)["image/png"] = shown["image/png"]
    assert after == before
    executed.shrink(tmp_path / "none.ipynb")


def test_of_text_beside_html_the_first_lines_stay_and_say_how_many_more(tmp_path):
    table = {"text/html": "<table>", "text/plain": "".join(ROWS)}
    before, after = shrunk(tmp_path / "notebook.ipynb", table)
    *first, last = outputs(after)["text/plain"]
    assert first == ROWS[: executed.LINES] and f"{len(ROWS) - executed.LINES} more lines" in last
    outputs(after)["text/plain"] = outputs(before)["text/plain"]
    assert after == before


@pytest.mark.parametrize(
    "data",
    [
        {"text/plain": "".join(ROWS)},  # nothing else shows it
        {"text/plain": "".join(ROWS), "text/markdown": "x"},
        {"text/html": "<table>", "text/plain": "".join(ROWS[: executed.LINES + 1])},
    ],
)
def test_other_text_stays_whole(tmp_path, data):
    before, after = shrunk(tmp_path / "notebook.ipynb", data)
    assert after == before


def test_times_of_a_cell_are_kept_once(tmp_path):
    papermill = {"start_time": "2026-01-01", "end_time": "2026-01-02"}
    execution = {"iopub.execute_input": "2026-01-01"}
    _, after = shrunk(tmp_path / "a.ipynb", {}, papermill=papermill, execution=execution)
    assert after["cells"][1]["metadata"] == {"papermill": papermill}
    _, after = shrunk(tmp_path / "b.ipynb", {}, execution=execution)
    assert after["cells"][1]["metadata"] == {"execution": execution}
