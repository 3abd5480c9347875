"""Every kernel on offsets beyond 2^31."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fastmorph_kernels import support
from fastmorph_kernels.register import OPERATORS
from kernel_arguments import ARGUMENTS

pytest.importorskip("triton")

CLOSED_FORM = [name for name in ARGUMENTS if name.startswith("direct")]
OTHERS = [name for name in ARGUMENTS if name not in CLOSED_FORM]


@pytest.mark.skipif(sys.platform != "linux", reason="memory that is never touched is promised on Linux alone")
@pytest.mark.skipif(not support.interpreted(), reason="a GPU has no memory that is not there")
@pytest.mark.parametrize("names", [OTHERS, CLOSED_FORM], ids=["products and memories", "closed form"])
def test_offsets_beyond_32_bits(names):
    # Its own process: a wrong offset reads memory that is not there, which ends it.
    command = [sys.executable, str(Path(__file__).with_name("far.py")), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.splitlines()[-1:]
    assert (done.returncode, last) == (0, ["done"]), f"{last} {done.stderr}"


def test_every_operator_has_arguments():
    assert {name.partition(",")[0] for name in ARGUMENTS} == set(OPERATORS)
