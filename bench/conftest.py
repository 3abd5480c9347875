"""Every suite names its contenders, in one group or in several; each visit runs a group in turn, each as a test of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tqdm.auto import tqdm

from bench.race import VISITS, Contender, time_exact

Race = Callable[[str, Contender], None]


_bar: tqdm[Any] | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one visit of one round for every contender")
    parser.addoption("--all", action="store_true", dest="everything", help="what takes long as well")
    parser.addoption("--silent", action="store_true", help="no progress bar")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "contenders(*names or *lists of names, slow, visits): what a suite compares, in one group or in several; those left "
        "out without --all; how often they have their turns",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("contenders")
    if marker is not None:
        visits = range(1 if metafunc.config.getoption("quick") else marker.kwargs.get("visits", VISITS))
        groups = [marker.args] if isinstance(marker.args[0], str) else marker.args
        left = () if metafunc.config.getoption("everything") else marker.kwargs.get("slow", ())
        turns = [(visit, name) for group in groups for visit in visits for name in group if name not in left]
        metafunc.parametrize(("visit", "name"), turns)


def pytest_collection_finish(session: pytest.Session) -> None:
    global _bar
    _bar = tqdm(total=len(session.items), unit="visit", disable=session.config.getoption("silent"))


def pytest_runtest_logstart(nodeid: str) -> None:
    if _bar is not None:
        _bar.set_description(nodeid.rpartition("[")[2].rstrip("]"))


def pytest_runtest_logfinish() -> None:
    if _bar is not None:
        _bar.update()


def pytest_sessionfinish() -> None:
    if _bar is not None:
        _bar.close()


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots between the lines of the bar."""
    return ("passed", "", "") if report.passed else None


@pytest.fixture
def race(benchmark: Any, visit: int, name: str, pytestconfig: pytest.Config) -> Race:
    """Time this test's contender in a suite, if its answer is exact."""
    quick = bool(pytestconfig.getoption("quick"))
    return lambda suite, contender: time_exact(benchmark, suite, name, visit, contender, quick=quick)
