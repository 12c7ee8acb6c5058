"""The browser in which pages are opened; closed with its module, for it runs an event loop."""

from collections.abc import Iterator

import pytest

from tests.browser import CHROMIUM_FLAGS, chromium


@pytest.fixture(scope="module")
def browser() -> Iterator:
    path = chromium()
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield program
        program.close()
