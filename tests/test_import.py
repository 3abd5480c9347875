"""`import fastmorph` takes no GPU and no Triton, starts no CUDA context, and prints nothing."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys

if BLOCK:
    sys.modules["triton"] = None  # as if it were not installed
before = set(sys.modules)
import fastmorph as fm
import torch
assert not torch.cuda.is_initialized()
assert "fastmorph_kernels" not in sys.modules
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = new & {"matplotlib", "sklearn", "safetensors", "triton"}
assert not heavy, heavy
assert "fastmorph.distributed" not in sys.modules
answer = fm.decompose(torch.randn(4, 3, 3, 3), 8)
assert bool(answer.converged)
if BLOCK:
    try:
        fm.decompose(torch.randn(4, 3, 3, 3), 8, backend="triton")
    except fm.MorphError as error:
        assert "Triton is not installed" in str(error), error
    else:
        raise AssertionError("the triton backend ran without Triton")
"""


def run(block: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE.replace("BLOCK", str(block))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_import_is_light_and_silent():
    run(block=False)


def test_everything_works_without_triton():
    run(block=True)
