"""Part `check`: is every answer right on this device?"""

from __future__ import annotations

from collections.abc import Callable

from bench.gpu import check_device, check_kernels
from bench.gpu.report import Report
from bench.gpu.setup import Setup

Section = Callable[[Setup, Report], None]

# What nothing else could show comes first, should time run out.
SECTIONS: dict[str, Section] = {
    "decompositions": check_device.decompositions,
    "graphs": check_device.graphs,
    "closed_form": check_kernels.closed_form,
    "precisions": check_kernels.precisions,
    "peak_memory": check_device.peak_memory,
    "streams": check_device.streams,
    "products": check_kernels.products,
    "grams": check_kernels.grams,
    "anderson": check_kernels.anderson,
    "fills": check_kernels.fills,
    "equal_bits": check_device.equal_bits,
}
