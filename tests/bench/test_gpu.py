"""The GPU suite of the benchmark, rehearsed on the CPU; what it counts, records and calls wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastmorph_kernels import configs

from bench import ledger
from bench.gpu import counts, goals, oracle
from bench.gpu.__main__ import main
from bench.gpu.report import Report
from bench.gpu.tables import render
from bench.measurements import Measured
from fastmorph.equation.frame import make_frame

ROOT = Path(__file__).parent.parent.parent


def test_a_rehearsal_of_check_and_time_ends_well_and_names_every_target():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.gpu", "check", "time", "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.rpartition("suite ")[2]
    for goal in goals.GOALS:
        assert goal.case in table
    for skipped in ("CUDA graphs", "streams", "peak memory"):
        assert f"skipped here: {skipped}" in done.stdout


def test_without_a_gpu_only_a_rehearsal_runs(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", os.environ["TRITON_INTERPRET"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    with pytest.raises(SystemExit):
        main()
    assert "--rehearse" in capsys.readouterr().err


def test_operations_of_a_half_step_by_rows():
    """Three 3x3 kernels of c channels: multiply-adds counted tap by tap, by hand."""
    c, k = 1000, (3, 3)
    assert counts.row_gram(c, c, k, k) / c**3 == pytest.approx(81, rel=1e-3)  # 36 pairs of taps at opposite lags, 9 / 2 at none
    assert counts.correlation(c, c, c, k, k, k, (1, 1)) == 98 * c**3  # 7 of 9 pairs along each axis meet the weight
    assert counts.composition(c, c, c, k, k) == 162 * c**3
    factor, solution = 9**3 / 3, 2 * 9**2
    total = 81 + 98 + factor + solution + 162
    assert counts.half_step(c, c, c, make_frame(k, (k, k))) / c**3 == pytest.approx(total, rel=1e-3)


def test_operations_of_a_banded_factor():
    assert counts.banded_factor(60, 1, 0) == pytest.approx(60**3 / 3)
    assert counts.banded_factor(60, 5, 4) == pytest.approx(60**3 / 3)
    assert counts.banded_factor(60, 5, 2) == pytest.approx(65 / 3 * 12**3)
    assert counts.banded_solution(60, 7, 5, 4) == pytest.approx(2 * 7 * 60**2)
    assert counts.banded_solution(60, 7, 5, 2) == pytest.approx(2 * 7 * 19 * 12**2)


def test_operations_without_spatial_dimensions():
    """F2 F1 = G: C_hid unknowns or C_in equations."""
    assert counts.half_step(5, 7, 3, make_frame((), ((), ()))) == 7 * 3 * 4 + 3**3 / 3 + 2 * 5 * 3**2 + 2 * (2 * 5 * 7 * 3)


def test_products_in_tf32_are_not_taken_for_float32():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 64, 4608, generator=generator).unbind()
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (one, other)]
    exact, bound = one.double() @ other.double().mT, oracle.rounding(4608, torch.float32)
    assert oracle.relative(one @ other.mT, exact) <= bound < oracle.relative(cut[0] @ cut[1].mT, exact)


def a_result(ratio: float) -> Measured:
    return Measured(goals.DIRECT, {"floor": ratio, "kernels": 1.0}, ratio, (ratio, ratio), 1e-7)


def test_results_are_recorded_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "LEDGER", tmp_path / "ledger.jsonl")
    monkeypatch.setenv("FASTMORPH_COMMIT", "abc")
    report = Report(1.0, record=True)
    report.add(a_result(0.5))
    (row,) = map(json.loads, ledger.LEDGER.read_text().splitlines())
    report.check("an error", 1.0, 2.0)
    report.check("an error to be kept", 1.0, 2.0, kept=True)
    assert row["commit"] == "abc"
    assert (row["suite"], row["target"], row["met"], row["ratio"]) == ("gpu", ">= 0.7", False, 0.5)
    with (ROOT / "bench" / "ledger.jsonl").open() as file:
        assert list(json.loads(next(file))) == list(row)
    assert len(ledger.LEDGER.read_text().splitlines()) == 2


def test_a_missed_target_is_a_result_and_a_wrong_answer_is_a_failure(capsys):
    report = Report(1.0)
    report.add(a_result(0.5))
    assert report.close() == 0
    for wrong in (lambda: report.check("an error", 2.0, 1.0), lambda: report.check("nan", float("nan"), None)):
        report.failures.clear()
        wrong()
        assert report.close() == 1
    report.failures.clear()
    report.hold("things", 1)
    assert report.close() == 1
    assert "MISSED" in capsys.readouterr().out


def test_a_section_that_breaks_does_not_stop_the_next(capsys):
    report, ran = Report(1.0), []

    def broken() -> None:
        raise RuntimeError("out of memory")

    report.run([("one", broken), ("two", lambda: ran.append(2))], lambda: None)
    assert ran == [2]
    assert report.close() == 1
    assert "one: RuntimeError: out of memory" in capsys.readouterr().out


def test_no_section_begins_after_its_time(capsys):
    report, ran = Report(0.0), []
    report.run([("late", lambda: ran.append(1))], lambda: None)
    assert not ran
    assert report.close() == 1
    assert "late: not begun" in capsys.readouterr().out


def test_a_table_is_written_as_it_was_read():
    for path in configs.table_paths().values():
        table = json.loads(path.read_text())
        table["a device"] = {"float32": {"a": {"block": 1}, "b": {"block": 2}}}
        assert json.loads(render(table)) == table
