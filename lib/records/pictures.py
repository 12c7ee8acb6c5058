"""Pictures of executed notebooks, as PNG with a palette: charts have few colours, and so take a
quarter of the bytes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

from lib.files import write_text

COLORS = 128
PNG = "image/png"


def fewer_colors(encoded: str) -> str:
    """A PNG in base64 with a palette; one that has it, is not opaque or cannot be read stays."""
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        see_through = picture.mode == "RGBA" and picture.getchannel("A").getextrema()[0] < 255
        if see_through or picture.mode == "P":
            return encoded
        smaller = io.BytesIO()
        picture.convert("RGB").quantize(COLORS, Image.Quantize.FASTOCTREE).save(smaller, "png")
    except Exception:  # of a picture that a stranger made, whatever it is
        return encoded
    return min(base64.b64encode(smaller.getvalue()).decode(), encoded, key=len)


def shrink(path: Path) -> None:
    """Rewrite a notebook with the PNG pictures among its outputs so."""
    if not path.exists():  # its kernel never started
        return
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if picture := output.get("data", {}).get(PNG):
                output["data"][PNG] = fewer_colors("".join(picture))
    write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
