"""What the device gives at best, measured in the run that its figures are held against: bytes copied and products taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.floors import Ceilings
from bench.gpu.clock import Times, on_device
from bench.gpu.report import Report
from bench.gpu.setup import Setup
from bench.measurements import Measured, Measurement

_MATRICES = {
    "float64": (torch.float64, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
}


def measure(setup: Setup, report: Report) -> Ceilings:
    """Copy 2 GiB, and multiply square matrices of 8192 rows."""
    size = setup.size(2**29, 2**12)
    copying = on_device(
        setup, lambda to, source: to.copy_(source), lambda seed: (setup.random(size), setup.random(size, seed=1))
    )
    bytes_moved = 8.0 * size
    _tell(report, "copy: bytes read and written, TB/s", bytes_moved, copying)
    setup.release()
    side = setup.size(8192, 32)
    rates = {}
    for name, (dtype, precision) in _MATRICES.items():

        def make(seed: int, dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
            return setup.random(side, side, dtype=dtype, seed=2 * seed), setup.random(
                side, side, dtype=dtype, seed=2 * seed + 1
            )

        with matmul_precision(precision):
            times = on_device(setup, torch.mm, make)
        _tell(report, f"matrix products, {name}: TFLOP/s", 2.0 * side**3, times)
        rates[name] = 2.0 * side**3 / times.median
    return Ceilings(bytes_moved / copying.median, rates | {"tf32x3": rates["tf32"] / 3})


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """How PyTorch takes float32 products meanwhile: "highest" in full, "high" by tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tell(report: Report, case: str, amount: float, times: Times) -> None:
    tera = amount / 1e12
    medians = {"run": times.median}
    spread = (tera / times.high, tera / times.low)
    report.add(Measured(Measurement("gpu ceiling", case, "amount", "run"), medians, tera / times.median, spread, None))
