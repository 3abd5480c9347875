from __future__ import annotations

import pytest
from processes import Processes, skip_unless_possible


def started(size, folder):
    skip_unless_possible()
    processes = Processes(size, folder)
    yield processes
    processes.stop()


@pytest.fixture(scope="package")
def two(tmp_path_factory):
    """Two ranks."""
    yield from started(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="package")
def four(tmp_path_factory):
    """Four ranks."""
    yield from started(4, tmp_path_factory.mktemp("four"))
