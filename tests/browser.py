"""A page as tests see it: in the Chromium that is installed (never a download), and its data."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from bs4 import BeautifulSoup, Tag

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium(environ: Mapping[str, str] = os.environ) -> str:
    """Path of the browser, from CHROMIUM= or PATH.

    Without one the test is skipped and says so; under WORKBOOK_REQUIRE_BROWSER=1 it fails.
    """
    wanted = environ.get("CHROMIUM")
    for name in (wanted,) if wanted else NAMES:
        path = shutil.which(name, path=environ.get("PATH"))
        if path:
            return path
    reason = (
        f"CHROMIUM={wanted} is not a program"
        if wanted
        else f"no {', '.join(NAMES)} on PATH; install one or set CHROMIUM=path"
    )
    if environ.get("WORKBOOK_REQUIRE_BROWSER") == "1":
        pytest.fail(f"a browser is required here: {reason}", pytrace=False)
    pytest.skip(reason)


def unpacked(link: Tag) -> bytes:
    """The file that a page embeds compressed in a link."""
    return gzip.decompress(base64.b64decode(link["href"].partition(",")[2]))


def records_of(soup: BeautifulSoup) -> dict[str, dict[str, str]]:
    """The lines of the embedded records.csv by the name of their record."""
    text = unpacked(soup.find("a", download="records.csv.gz")).decode()
    return {line["record"]: line for line in csv.DictReader(io.StringIO(text))}


class Page:
    """A page opened from its file, offline, with what it asked for and what it complained of."""

    def __init__(self, browser, path: Path, fragment: str = "", **options) -> None:
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(path.as_uri() + fragment)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
