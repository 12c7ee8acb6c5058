"""Pictures of executed notebooks, as PNG with a palette: charts have few colours, and so take a
quarter of the bytes. A page carries them as lossless WebP, which are shorter by a third again."""

from __future__ import annotations

import base64
import io

from PIL import Image

COLORS = 128
PNG = "image/png"


def fewer_colors(encoded: str) -> str:
    """A PNG in base64 with a palette; one that has it or is not opaque keeps its pixels, and one
    that cannot be read stays."""
    smaller = io.BytesIO()
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        see_through = picture.mode == "RGBA" and picture.getchannel("A").getextrema()[0] < 255
        if not see_through and picture.mode != "P":
            picture = picture.convert("RGB").quantize(COLORS, Image.Quantize.FASTOCTREE)
        picture.save(smaller, "png", optimize=True)
    except Exception:  # of a picture that a stranger made, whatever it is
        return encoded
    return min(base64.b64encode(smaller.getvalue()).decode(), encoded, key=len)


def for_page(encoded: str) -> str:
    """A PNG in base64 as a data address: the same pixels as WebP where that is shorter."""
    png = fewer_colors(encoded)
    shorter = io.BytesIO()
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(png)))
        picture.save(shorter, "webp", lossless=True)
    except Exception:  # of a picture that a stranger made, or without the library of WebP
        return f"data:{PNG};base64,{png}"
    webp = f"data:image/webp;base64,{base64.b64encode(shorter.getvalue()).decode()}"
    return min(webp, f"data:{PNG};base64,{png}", key=len)
