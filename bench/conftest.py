"""Every suite names its contenders; each visit runs them in turn, each as a test of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from bench.race import VISITS, Contender, time_exact

Race = Callable[[str, Contender], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one visit of one round for every contender")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contenders(*names): what a suite compares")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("contenders")
    if marker is not None:
        visits = range(1 if metafunc.config.getoption("quick") else VISITS)
        metafunc.parametrize(("visit", "name"), list(itertools.product(visits, marker.args)))


@pytest.fixture
def race(benchmark: Any, visit: int, name: str, pytestconfig: pytest.Config) -> Race:
    """Time this test's contender in a suite, if its answer is exact."""
    quick = bool(pytestconfig.getoption("quick"))
    return lambda suite, contender: time_exact(benchmark, suite, name, visit, contender, quick=quick)
