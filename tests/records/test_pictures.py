"""Pictures of a notebook keep what they show in fewer bytes."""

import base64
import io
import json

import nbformat.v4 as v4
import pytest
from PIL import Image

from lib.records import pictures


def encoded(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def chart(size=(200, 100)) -> Image.Image:
    drawn = Image.new("RGBA", size, "white")
    drawn.paste((10, 120, 200, 255), (20, 20, 60, 60))
    for x in range(60, size[0]):  # edges of lines, as drawing programs smooth them
        for y in range(60, size[1]):
            drawn.putpixel((x, y), ((x * y) % 250, x, y, 255))
    return drawn


def test_a_chart_gets_a_palette():
    before = encoded(chart())
    after = pictures.fewer_colors(before)
    shown = opened(after)
    assert shown.mode == "P" and shown.size == (200, 100) and len(after) < len(before)
    assert shown.convert("RGB").getpixel((30, 30)) == (10, 120, 200)


@pytest.mark.parametrize("kept", [encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 0))), "AAAA", ""])
def test_what_is_no_opaque_picture_stays(kept):
    assert pictures.fewer_colors(kept) == kept


def test_a_notebook_is_the_same_but_for_its_pictures(tmp_path):
    path = tmp_path / "notebook.ipynb"
    shown = {"image/png": encoded(chart()) + "\n", "text/plain": "<Figure é>"}
    cell = v4.new_code_cell("draw()", outputs=[v4.new_output("display_data", shown)])
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# é"), cell])
    before = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(before)
    pictures.shrink(path)
    after = json.loads(path.read_text())
    picture = after["cells"][1]["outputs"][0]["data"]["image/png"]
    assert len(picture) < len(shown["image/png"]) and opened(picture).mode == "P"
    assert path.read_text().replace(picture, shown["image/png"].replace("\n", "\\n")) == before
    pictures.shrink(path)
    assert json.loads(path.read_text()) == after
    pictures.shrink(tmp_path / "none.ipynb")
