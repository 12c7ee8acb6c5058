"""The shell of every HTML page: one template, one style, one script, and nothing from elsewhere."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

SECTION = re.compile(r'<h2[^>]* id="([^"]+)"[^>]*>(.*?)</h2>', re.DOTALL)
TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = (
    "popover",
    "terms",
    "records",
    "tables",
    "page",
)  # parts of one function; the last one starts


@cache
def shell() -> Environment:
    """Templates with the style, the script and the policy that allows these two alone."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    css = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    parts = [(TEMPLATES / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    js = "\n".join(['"use strict";\n(function () {', *parts, "})();\n"])
    environment.filters |= {"math": _display_math, "embedded": embedded}
    environment.globals |= {"css": Markup(css), "js": Markup(js), "csp": _policy(css, js)}
    return environment


def _display_math(formula: str) -> Markup:
    from lib.show.notebook_html import mathml  # loads nbconvert, which a table does not need

    return Markup(mathml(formula).replace("<math ", '<math displaystyle="true" ', 1))


def _policy(css: str, js: str) -> str:
    """Content security policy: nothing loads; this style and this script run, no other."""
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, js)
    )
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; "
        f"script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'"
    )


def embedded(data: Any) -> Markup:
    """Data as JSON that a page's script reads; no text in it can end the element around it."""
    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def data_link(csv: bytes) -> str:
    """A CSV file as a link that needs no other file."""
    return "data:text/csv;base64," + base64.b64encode(csv).decode()


def packed(data: bytes) -> str:
    """Bytes compressed, as text that a page's script unpacks; the same bytes give the same text."""
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


def packed_link(csv: bytes) -> str:
    """A CSV file as a link to it compressed, which the page's script saves unpacked; without the
    script it is a .csv.gz. A report has dozens, which take a quarter of the bytes so."""
    return f"data:application/gzip;base64,{packed(csv)}"


def document(template: str, *, terms: Sequence[Mapping[str, Any]], **values: Any) -> str:
    """A page: the body that a template makes, in the shell; its sections are the contents.

    `terms` open on their words, see `analysis.glossary.terms`.
    """
    body = shell().get_template(template).render(values)
    contents = [(name, Markup(text).striptags()) for name, text in SECTION.findall(body)]
    return (
        shell()
        .get_template("page.html")
        .render(values | {"body": Markup(body), "contents": contents, "terms": terms})
    )
