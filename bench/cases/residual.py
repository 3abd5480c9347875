"""The residual's kernels, with and without an error that is written."""

from __future__ import annotations

from collections.abc import Iterator

from fastmorph_kernels.residual_kernel import _SUM_BLOCK, _residual_kernel, _sum_kernel

from bench.cases.case import Case
from bench.cases.tiles import tile_cases

_DOUBLE = {"partial_ptr": "*fp64", "out_ptr": "*fp64"}


def cases(target: str) -> Iterator[Case]:
    """Every configuration; one of them also as `residual_norm` runs it."""
    yield from tile_cases("residual", _residual_kernel, target, types=_DOUBLE, STORE=True)
    for case in tile_cases("residual", _residual_kernel, target, types=_DOUBLE, STORE=False):
        if target == "sm_90" and case.dtype == "float32" and case.variant == "large":
            yield case
    yield Case(
        kernel="residual",
        function=_sum_kernel,
        dtype="float64",
        variant="sum",
        constants={"ROOT": True, "BLOCK": _SUM_BLOCK},
        options={"num_warps": 4},
        types=_DOUBLE,
    )
