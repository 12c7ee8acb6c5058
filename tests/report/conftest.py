"""A cache of its own, and the browser in which pages are opened."""

from collections.abc import Iterator

import pytest

from lib import files
from tests.browser import CHROMIUM_FLAGS, chromium


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """What pages were written is noted in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(files.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Closed with its module, for it runs an event loop."""
    path = chromium()
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield program
        program.close()
