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

ROOT = Path(__file__).parents[2]
# Bytes of shared memory that a block may use: CUDA C++ programming guide, compute capabilities; on gfx942 all of its LDS.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


CASES = sorted(path.stem for path in (ROOT / "bench" / "cases").glob("*.py") if "def cases(" in path.read_text())
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", params=CASES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """One row for each configuration, dtype, layout and target of a file's kernels."""
    # Its own process: this one has decorated the kernels for the interpreter, and those do not compile.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    report = tmp_path_factory.mktemp("static") / "rows.json"
    command = [sys.executable, "-m", "bench.static", "--cases", request.param, "--json", str(report), *SHARED_LIMIT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text())


def test_every_kernel_file_has_its_cases():
    cases = "".join((ROOT / "bench" / "cases" / f"{name}.py").read_text() for name in CASES)
    files = (ROOT / "kernels" / "fastmorph_kernels").glob("*/*kernel.py")
    names = [f"fastmorph_kernels.{path.parent.name}.{path.stem}" for path in files]
    assert names
    assert [name for name in names if f"from {name} " not in cases] == []


def test_every_kernel_fits_into_shared_memory(compiled):
    assert {row["target"] for row in compiled} == set(SHARED_LIMIT)
    assert [row for row in compiled if row["shared"] > SHARED_LIMIT[row["target"]]] == []


def test_no_kernel_spills_on_sm_90(compiled):
    assert [row for row in compiled if row["target"] == "sm_90" and row["stack"]] == []


# The shortcut past the tensor cores is a compiler's silent choice, and costs a factor of ten.
def test_float32_products_in_tf32_use_warpgroups_on_sm_90(compiled):
    rows = [row for row in compiled if row["target"] == "sm_90" and row["dtype"] == "float32"]
    tensor = [row for row in rows if row["constants"].get("PRECISION") in ("tf32", "tf32x3")]
    assert [row for row in tensor if row["matrix"] != "wgmma"] == []


# Copied inputs are laid out for loads of 128 bits; the weight of a residual is not copied.
def test_packed_inputs_are_loaded_wide_on_sm_90(compiled):
    rows = [row for row in compiled if row["target"] == "sm_90" and row["layout"] == "packed" and row["kernel"] != "residual"]
    assert [row for row in rows if row["wide"] < row["loads"]] == []


# A pointer or a stride that comes from a table is known to be even only because the kernel says so.
def test_what_a_table_holds_is_loaded_wide_where_it_is_even_on_sm_90(compiled):
    even = [row for row in compiled if row["target"] == "sm_90" and row["constants"].get("EVEN")]
    assert [row for row in even if row["constants"]["UNIFORM_W"] and row["wide"] == 0] == []
