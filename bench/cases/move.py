"""The kernel that moves the entries of many weights: every configuration; on sm_90 without scales too."""

from __future__ import annotations

from collections.abc import Iterator

from fastmorph_kernels.configs import shipped
from fastmorph_kernels.move.kernel import COLUMNS, _move_kernel

from bench.cases.case import Case


def cases(target: str) -> Iterator[Case]:
    """It sees no stride and no size: those stand in its table, so that there is one layout."""
    for entry in shipped("move"):
        dtype = str(entry.dtype).removeprefix("torch.")
        for scaled in (False, True) if target == "sm_90" else (True,):
            yield Case(
                kernel="move",
                function=_move_kernel,
                dtype=dtype,
                variant=entry.variant,
                constants={"SCALED": scaled, "COLUMNS": COLUMNS, "BLOCK": entry.config["block"]},
                options={"num_warps": entry.config["num_warps"], "num_stages": entry.config["num_stages"]},
                types={"table_ptr": "*i64", "scales_ptr": "*fp64" if dtype == "float64" else "*fp32"},
            )
