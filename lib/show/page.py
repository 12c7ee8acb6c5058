"""The shell of every HTML page: one template, one style, one script, and nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


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
    css, js = ((TEMPLATES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment.filters["math"] = _display_math
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


def data_link(path: Path) -> str:
    """A CSV file as a link that needs no other file."""
    return "data:text/csv;base64," + base64.b64encode(path.read_bytes()).decode()


def entry(name: str, title: str, children: Sequence = ()) -> SimpleNamespace:
    """An entry of a page's contents."""
    return SimpleNamespace(id=name, title=title, children=list(children))
