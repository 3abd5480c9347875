"""The kernels for Anderson's memory: every configuration; on sm_90 well-aligned contiguous tensors too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastmorph_kernels.anderson.kernel import _TOTAL_N, _TOTAL_S, _gram_kernel, _total_kernel, _update_kernel
from fastmorph_kernels.configs import shipped

from bench.cases.case import Case, aligned_with

# Arguments that are 1 for contiguous tensors.
_GRAM_UNIT = ("stride_mn", "stride_nn")
_UPDATE_UNIT = ("stride_jn", "stride_in", "stride_sm", "stride_on")


def cases(target: str) -> Iterator[Case]:
    """A memory of 20, as the solver has it, fills 32 rows; on sm_90 with float64 sums of float32 too."""
    for entry in shipped("anderson"):
        config, dtype = entry.config, str(entry.dtype).removeprefix("torch.")
        common = {
            "kernel": "anderson",
            "dtype": dtype,
            "variant": entry.variant,
            "options": {"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
        }
        tile = {"BLOCK_M": 32, "BLOCK_N": config["block_n"]}
        if entry.variant == "update":
            yield from _layouts(target, _update_kernel, _UPDATE_UNIT, common | {"constants": tile})
            continue
        for sums in dict.fromkeys((dtype, "float64")) if target == "sm_90" else (dtype,):
            constants = tile | {"TILES": config["tiles"]}
            types = {"partial_ptr": {"float64": "*fp64", "float32": "*fp32"}[sums]}
            yield from _layouts(target, _gram_kernel, _GRAM_UNIT, common | {"constants": constants, "types": types})
    for dtype in ("float32", "float64"):
        constants = {"BLOCK_S": _TOTAL_S, "BLOCK_N": _TOTAL_N}
        yield Case("anderson", _total_kernel, dtype, "total", constants, {"num_warps": 4})


def _layouts(target: str, function: Any, unit: tuple[str, ...], common: dict[str, Any]) -> Iterator[Case]:
    yield Case(function=function, **common)
    if target == "sm_90":
        aligned = (*aligned_with(function, unit), "size")
        yield Case(function=function, **common, layout="contiguous", unit=unit, aligned=aligned)
