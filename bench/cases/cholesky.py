"""The Cholesky kernels: every configuration; on sm_90 well-aligned contiguous matrices too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastmorph_kernels.cholesky.kernel import _panel_kernel, _single_kernel, _trailing_kernel
from fastmorph_kernels.cholesky.solve_kernel import _solve_kernel
from fastmorph_kernels.configs import shipped

from bench.cases.case import Case, aligned_with

# Which kernels run at a variant, and their arguments that are 1 for contiguous tensors.
_KERNELS: dict[str, list[tuple[Any, tuple[str, ...]]]] = {
    "single": [(_single_kernel, ("stride_an", "stride_ln"))],
    "spread": [
        (_panel_kernel, ("stride_rn", "stride_ln")),
        (_trailing_kernel, ("stride_sn", "stride_ln", "stride_rn")),
    ],
    "solve": [(_solve_kernel, ("stride_ln", "stride_rm", "stride_om"))],
}


def cases(target: str) -> Iterator[Case]:
    """Each kernel at every entry of the table; the variant "sizes" holds no tiles."""
    for entry in shipped("cholesky"):
        config = entry.config
        for function, unit in _KERNELS.get(entry.variant, ()):
            for layout in ("any", "contiguous") if target == "sm_90" else ("any",):
                contiguous = layout == "contiguous"
                yield Case(
                    kernel="cholesky",
                    function=function,
                    dtype=str(entry.dtype).removeprefix("torch."),
                    variant=entry.variant,
                    constants={"BLOCK_M": config["block_m"], "BLOCK_N": config["block_n"]},
                    options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                    layout=layout,
                    unit=unit if contiguous else (),
                    aligned=(*aligned_with(function, unit), "size") if contiguous else (),
                    types={"info_ptr": "*i32"},
                )
