"""Part `tests`: the kernels' tests on this GPU, where they compile, each file in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from bench.gpu.report import Report
from bench.gpu.setup import Setup

_FOLDER = Path(__file__).resolve().parents[2] / "tests" / "kernels"
# What is compiled ahead of time needs no GPU.
FILES = sorted(path.name for path in _FOLDER.glob("test_*.py") if path.name != "test_kernel_aot.py")
_PROCESSES = 8  # compiling takes longer than running


def run(setup: Setup, report: Report, name: str) -> None:
    """One file of tests."""
    if setup.rehearsal or importlib.util.find_spec("pytest") is None:
        report.skip(f"{name}, which needs {'a GPU' if setup.rehearsal else 'pytest'}")
        return
    command = [sys.executable, "-m", "pytest", "-q", str(_FOLDER / name)]
    if importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", str(_PROCESSES)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=_FOLDER.parents[1], env=environment, check=False, timeout=max(1.0, report.left))
    report.hold(f"{name}: exit status", done.returncode)
