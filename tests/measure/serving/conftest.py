"""Some tests time a client in milliseconds, which a machine without a free processor cannot."""

import os

import pytest


@pytest.fixture(scope="module")
def a_processor_is_free():
    """Skip, and say so, where more than two processes wait for each processor."""
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load > 2 * processors:
        pytest.skip(f"{load:.1f} processes want {processors} processors: too busy to time a client")
