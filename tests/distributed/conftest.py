from __future__ import annotations

import sys

import pytest
import torch.distributed as dist

from bench.processes import Processes


@pytest.fixture(scope="session")
def possible():
    """Whether ranks can be started here."""
    if sys.platform != "linux" or not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("processes of a gloo group on the loopback interface need Linux and PyTorch's gloo")


def started(size, folder):
    processes = Processes(size, folder)
    yield processes
    processes.stop()


@pytest.fixture(scope="package")
def two(possible, tmp_path_factory):
    """Two ranks."""
    yield from started(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="package")
def four(possible, tmp_path_factory):
    """Four ranks."""
    yield from started(4, tmp_path_factory.mktemp("four"))
