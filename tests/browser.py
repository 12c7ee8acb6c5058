"""The Chromium that browser tests drive: one already installed, never a download."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

import pytest

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
