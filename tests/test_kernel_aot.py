"""Every kernel compiles ahead of time, with every shipped configuration, within each architecture's resources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
# Bytes of shared memory that a block may use: CUDA C++ programming guide, compute capabilities; on gfx942 all of its LDS.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """One row for each kernel, configuration, dtype, layout and target."""
    # Its own process: this one has decorated the kernels for the interpreter, and those do not compile.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "tests" / "aot_compile.py"), *SHARED_LIMIT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_kernel_fits_into_shared_memory(compiled, target):
    rows = [row for row in compiled if row["target"] == target]
    assert {row["dtype"] for row in rows} == {"float32", "float64", "bfloat16", "float16"}
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[target]] == []


def test_no_kernel_spills_on_sm_90(compiled):
    assert [row for row in compiled if row["target"] == "sm_90" and row["stack"]] == []
