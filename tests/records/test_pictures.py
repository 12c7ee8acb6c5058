"""Pictures keep what they show in fewer bytes."""

import base64
import io

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


def glass() -> Image.Image:
    seen_through = chart()
    seen_through.putalpha(100)
    return seen_through


@pytest.mark.parametrize("picture", [glass(), chart().convert("P"), chart().convert("L")])
def test_one_that_has_a_palette_or_is_not_opaque_keeps_its_pixels(picture):
    before = encoded(picture)
    after = pictures.fewer_colors(before)
    assert len(after) <= len(before) and pictures.fewer_colors(after) == after
    if picture.mode != "L":
        assert opened(after).convert("RGBA").tobytes() == picture.convert("RGBA").tobytes()


@pytest.mark.parametrize("text", ["AAAA", "", "no base64!"])
def test_what_is_no_picture_stays(text):
    assert pictures.fewer_colors(text) == text
    assert pictures.for_page(text) == f"data:image/png;base64,{text}"


@pytest.mark.parametrize("picture", [chart(), glass(), chart().convert("P")])
def test_a_page_has_the_same_pixels_in_fewer_bytes(picture):
    png = pictures.fewer_colors(encoded(picture))
    kind, _, coded = pictures.for_page(encoded(picture)).partition(";base64,")
    assert kind == "data:image/webp" and len(coded) < len(png)
    assert opened(coded).convert("RGBA").tobytes() == opened(png).convert("RGBA").tobytes()


def test_without_the_library_of_webp_a_page_has_the_png(monkeypatch):
    monkeypatch.setitem(Image.SAVE, "WEBP", None)
    png = pictures.fewer_colors(encoded(chart()))
    assert pictures.for_page(encoded(chart())) == f"data:image/png;base64,{png}"
