"""The scripts in examples/ run as they stand, without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    command = [sys.executable, "-W", "error", str(path)]
    if "from transformers import" in path.read_text():
        pytest.importorskip("transformers", reason="the example is of its models")
        declared = "from bench.zoo.models import declare_torchvision_operators as declare; declare()"
        command[3:] = ["-c", f"import runpy; {declared}; runpy.run_path({str(path)!r}, run_name='__main__')"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
