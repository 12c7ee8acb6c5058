"""Results are shared: folders of one machine do not stay in what a run writes.

The folder of the results becomes `<out>`, the interpreter's `<python>`, the temporary folder
`<tmp>`, the home folder `~` (which a shell and this workbook read again), and a path below the
repository starts at its root.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.files import ROOT, write_text

TEXTS = (".ipynb", ".json", ".jsonl", ".log")
Names = list[tuple[re.Pattern[str], str]]


def names(out_dir: Path | None = None, *, home: Path | None = None, root: Path = ROOT) -> Names:
    """What to write for each folder of this machine, the innermost first."""
    home = home or Path.home()
    short = {
        Path(sys.prefix): "<python>",
        Path(sys.base_prefix): "<python>",
        Path(tempfile.gettempdir()): "<tmp>",
    }
    # A folder such as /usr or /tmp is no one's.
    short = {path: name for path, name in short.items() if len(path.parts) > 2}
    short |= {home: "~"} if len(home.parts) > 1 else {}
    if out_dir is not None and not out_dir.is_relative_to(root):
        short[out_dir] = "<out>"
    short[root] = ""
    inner = sorted(short, key=lambda path: len(path.parts), reverse=True)
    return [(_pattern(path, below=path == root), short[path]) for path in inner]


def _pattern(path: Path, *, below: bool) -> re.Pattern[str]:
    """The folder as a whole, as it is or as JSON writes it; with its slash where `below`."""
    forms = {re.escape(str(path)), re.escape(json.dumps(str(path))[1:-1])}
    end = r"[/\\]+" if below else r"(?![\w.-])"
    start = r"(?:(?<![\w.~>-])|(?<=[\[;]\dm)|(?<=[\[;]\d\dm))"  # or after the colour of a traceback
    return re.compile(rf"{start}(?:{'|'.join(sorted(forms))}){end}")


def text(content: str, folders: Names) -> str:
    """The text with each folder by its name."""
    for pattern, name in folders:
        content = pattern.sub(lambda _, name=name: name, content)
    return content


def values(data: Any, folders: Names) -> Any:
    """The same for every text in lists and mappings."""
    if isinstance(data, str):
        return text(data, folders)
    if isinstance(data, dict):
        return {key: values(item, folders) for key, item in data.items()}
    if isinstance(data, list):
        return [values(item, folders) for item in data]
    return data


def files(paths: Iterable[Path], folders: Names) -> None:
    """Rewrite the text files among the paths that name such a folder."""
    for path in paths:
        if path.suffix in TEXTS and path.is_file():
            content = path.read_text(encoding="utf-8")
            if (shared := text(content, folders)) != content:
                write_text(path, shared)
