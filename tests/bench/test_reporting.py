"""No benchmark reports what was not exact, and what it records has every field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.ledger import EACH, FIELDS, LEDGER, rows
from bench.measurements import Exponent, Extrapolated, Measurement, measure, table
from bench.tables import HEADLINES, SUITES, by_contender
from bench.tables import table as page

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import pytest
from bench.floors import Job
from bench.race import Contender

@pytest.mark.contenders("right", "wrong", slow=["slow"], visits=2)
def test_suite(race, name):
    job = Job("3 numbers", "float64", moved=48)
    expected = 3 if name == "right" else {given}
    race("suite", Contender(lambda: 3.0, lambda answer: abs(answer - expected), 1e-12, rounds=2, job=job))
"""


def run(folder, given):
    (folder / "test_suite.py").write_text(SUITE.format(given=given))
    arguments = ["-q", "-p", "bench.conftest", "--benchmark-only", "--benchmark-quiet", "--silent", "--benchmark-json=out.json"]
    told = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "test_suite.py", f"--rootdir={folder}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        # Where these tests are dealt to several processes, the suite is not: it is timed.
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    return told, folder / "out.json"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    told, results = run(tmp_path_factory.mktemp("right"), 3)
    assert told.returncode == 0, told.stdout + told.stderr
    return json.loads(results.read_text())


def test_a_wrong_answer_is_not_timed_and_fails_the_run(tmp_path):
    told, _ = run(tmp_path, 4)
    assert told.returncode != 0
    assert "residual 1.0e+00, exact means at most 1.0e-12; not timed" in told.stdout


def test_nothing_is_reported_where_a_suite_is_red(monkeypatch, capsys):
    ledger = LEDGER.read_bytes()
    red = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(command.subprocess, "run", lambda *_, **__: red)
    monkeypatch.setattr(sys, "argv", ["bench", "--record", "--suite", "equation"])
    assert command.main() == 1
    out = capsys.readouterr()
    assert out.out == ""
    assert "Nothing is reported" in out.err
    assert LEDGER.read_bytes() == ledger


def test_a_recorded_row_has_every_field(report):
    cases = [
        Measurement("suite", "a ratio", "right", "wrong", at_least=0.1),
        Extrapolated("suite", "a ratio, extrapolated", "right", "wrong", power=2.0),
    ]
    measured = measure(report, cases)
    lines = rows(measured, report, threads=1)
    assert len(lines) == 2
    for line in lines:
        assert set(line) == set(FIELDS)
        for field in EACH:
            assert set(line[field]) == (set() if field == "asks" else {"right", "wrong"}), field
        assert all(line["p20_s"][name] <= line["median_s"][name] <= line["p80_s"][name] for name in ("right", "wrong"))
        assert line["dtype"] == dict.fromkeys(("right", "wrong"), "float64")
        assert line["shape"]["right"] == "3 numbers"
        assert 0 < line["floor_s"]["right"] < 1e-6  # 48 bytes, on any machine that copies 48 MB a second
    assert json.loads(json.dumps(lines)) == lines
    assert "a ratio, extrapolated" in table(measured)
    assert page(lines).count("\n") == 4
    assert "3 numbers" in by_contender(lines)


def test_what_grows_with_a_power_is_extrapolated_by_it():
    def taken(name, work, seconds):
        info = {
            "contender": name,
            "visit": 0,
            "work": work,
            "residual": 0.0,
            "shape": "",
            "dtype": "",
            "floor": 0.0,
            "asks": "",
        }
        return {"group": "suite", "extra_info": info, "stats": {"data": [seconds], "median": seconds}}

    runs = {"benchmarks": [taken("small", 10, 2.0), taken("large", 40, 0.5)]}
    (found,) = measure(runs, [Extrapolated("suite", "", "small", "large", power=1.5)])
    assert found.ratio == pytest.approx(2.0 * 4**1.5 / 0.5)
    (found,) = measure(runs, [Exponent("suite", "", ("small", "large"))])
    assert found.ratio == pytest.approx(-1.0)  # a quarter of the time for four times the work


def test_every_line_of_the_present_schema_has_every_field():
    for line in map(json.loads, LEDGER.read_text().splitlines()):
        assert line.get("schema") is None or set(line) == set(FIELDS), (line["suite"], line["case"])


def test_what_the_readme_tells_is_measured():
    assert set(HEADLINES) <= {m.case for m in SUITES}
    assert len({(m.suite, m.case) for m in SUITES}) == len(SUITES)
