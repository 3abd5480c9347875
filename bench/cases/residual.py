"""The residual's kernels."""

from __future__ import annotations

from collections.abc import Iterator

from fastmorph_kernels.residual.kernel import _SUM_BLOCK, _residual_kernel, _sum_kernel

from bench.cases.case import Case
from bench.cases.tiles import tile_cases

_DOUBLE = {"partial_ptr": "*fp64", "out_ptr": "*fp64"}


def cases(target: str) -> Iterator[Case]:
    """Every configuration."""
    yield from tile_cases("residual", _residual_kernel, target, types=_DOUBLE)
    yield Case(
        kernel="residual",
        function=_sum_kernel,
        dtype="float64",
        variant="sum",
        constants={"BLOCK": _SUM_BLOCK},
        options={"num_warps": 4},
        types=_DOUBLE,
    )
