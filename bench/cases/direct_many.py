"""The kernels for closed forms of many weights: those of `direct` with a table, for one layout of each factor, and the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastmorph_kernels.configs import shipped
from fastmorph_kernels.direct.launch import SCALES_BLOCK
from fastmorph_kernels.direct_many.kernel import direct_many_kernel, scales_many_kernel, sums_many_kernel
from fastmorph_kernels.direct_many.launch import END_BLOCK, PRODUCT, SKETCH
from fastmorph_kernels.direct_many.remainder_kernel import end_kernel, product_kernel, sketch_kernel

from bench.cases import direct
from bench.cases.case import Case

_TABLE = {"table_ptr": "*i64", "scratch_ptr": "*fp64", "told_ptr": "*fp64", "exact_ptr": "*i1"}
_FUNCTIONS = {"direct_kernel": direct_many_kernel, "sums_kernel": sums_many_kernel}
_LAYOUTS = ("conv", "conv_t", "linear", "odd", "far")


def cases(target: str) -> Iterator[Case]:
    """What `direct` is compiled for in the layouts of contiguous weights; and the kernels for what is left."""
    for case in direct.cases(target):
        if case.function.fn.__name__ in _FUNCTIONS and case.layout in _LAYOUTS:
            yield _with_table(case)
    dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in shipped("direct")})
    for dtype in dtypes:
        yield _case(scales_many_kernel, dtype, {"BLOCK": SCALES_BLOCK}, {"scales_ptr": _accumulator(dtype)})
        yield _case(sketch_kernel, dtype, SKETCH)
    yield _case(product_kernel, "float64", PRODUCT)
    yield _case(end_kernel, "float64", {"BLOCK": END_BLOCK})


def _with_table(case: Case) -> Case:
    function, constants = _FUNCTIONS[case.function.fn.__name__], dict(case.constants)
    ones = {
        "ONE_W": 0 if constants.get("DELTA") else _one(case.unit, "stride_wz", "stride_wo"),
        "ONE_O": _one(case.unit, "stride_oz", "stride_oh"),
        "EVEN": bool(case.aligned) and constants.pop("ALIGNED", True),
    }
    constants.pop("ALIGNED", None)
    kept = {name: value for name, value in (constants | ones).items() if name in function.arg_names}
    acc = _accumulator(case.dtype)
    types = {"mixing_ptr": acc, "sums_ptr": acc, "scales_ptr": acc}
    return _case(function, case.dtype, kept, types, case.options, case.variant, case.layout)


def _one(unit: tuple[str, ...], last: str, row: str) -> int:
    return 1 if last in unit else 2 if row in unit else 0


def _case(
    function: Any,
    dtype: str,
    constants: dict[str, Any],
    types: dict[str, str] | None = None,
    options: Any = None,
    variant: str = "table",
    layout: str = "any",
) -> Case:
    named = {name: kind for name, kind in (_TABLE | (types or {})).items() if name in function.arg_names}
    return Case("direct_many", function, dtype, variant, constants, options or {"num_warps": 4}, layout, types=named)


def _accumulator(dtype: str) -> str:
    return "*fp64" if dtype == "float64" else "*fp32"
