"""What a notebook leaves as it is kept: itself and its logs, in fewer bytes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from lib.files import write_text
from lib.records.pictures import PNG, fewer_colors

HTML, TEXT = "text/html", "text/plain"
LINES = 12  # of the plain text beside a table in HTML, which has them all


def shrink(path: Path) -> None:
    """Rewrite a notebook: pictures with a palette, of plain text beside HTML the first lines, and
    of a cell's times those that papermill wrote."""
    if not path.exists():  # its kernel never started
        return
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if "papermill" in cell["metadata"]:
            cell["metadata"].pop("execution", None)  # the kernel's, of the same start and end
        for output in cell.get("outputs", ()):
            _shrink(output.get("data", {}))
    write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def pack_logs(folder: Path) -> None:
    """Put name.log.gz in the place of each name.log below a folder."""
    for log in sorted(folder.rglob("*.log")):
        packed = gzip.compress(log.read_bytes(), mtime=0)
        log.with_name(f"{log.name}.gz").write_bytes(packed)
        log.unlink()


def _shrink(data: dict[str, Any]) -> None:
    if picture := data.get(PNG):
        data[PNG] = fewer_colors("".join(picture))
    if HTML in data and TEXT in data:
        lines = "".join(data[TEXT]).splitlines(keepends=True)
        if len(lines) > LINES + 1:
            rest = f"... and {len(lines) - LINES} more lines, which the HTML beside this shows"
            data[TEXT] = [*lines[:LINES], rest]
