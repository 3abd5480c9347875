"""The kernels of the two Gram matrices; sums of 16-bit products leave them as float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fastmorph_kernels.column_gram.kernel import _product_kernel, _shift_kernel
from fastmorph_kernels.configs import shipped
from fastmorph_kernels.row_gram.kernel import _row_gram_kernel

from bench.cases.case import Case
from bench.cases.tiles import tile_cases

_SUMS = {"float64": "*fp64", "float32": "*fp32", "bfloat16": "*fp32", "float16": "*fp32"}
_ALIGNED = ("out_channels", "stride_ob", "stride_or")


def cases(target: str) -> Iterator[Case]:
    """Every configuration; large tiles of the rows' matrix are for aligned outputs alone."""
    for case in tile_cases("row_gram", _row_gram_kernel, target, packed={1: ("stride_fi",), 2: ("stride_fh",)}):
        aligned = case.aligned + _ALIGNED * case.variant.startswith("large")
        yield replace(case, aligned=aligned, types={"out_ptr": _SUMS[case.dtype]})
    for case in tile_cases("column_gram", _product_kernel, target, packed={1: ("stride_fh",), 2: ("stride_fi",)}):
        yield replace(case, types={"out_ptr": _SUMS[case.dtype]})
    for entry in shipped("column_gram"):
        if entry.variant == "shifts":
            for layout in ("any", "aligned") if target == "sm_90" else ("any",):
                yield Case(
                    kernel="column_gram",
                    function=_shift_kernel,
                    dtype=str(entry.dtype).removeprefix("torch."),
                    variant=entry.variant,
                    constants={"BLOCK_M": entry.config["block_m"], "BLOCK_N": entry.config["block_n"]},
                    options={"num_warps": entry.config["num_warps"], "num_stages": entry.config["num_stages"]},
                    layout=layout,
                    unit=("k1_x", "k2_x"),
                    aligned=(*_ALIGNED, "stride_pb", "stride_pr") if layout == "aligned" else (),
                )
