"""The kernel that writes many grown tensors: every configuration; on sm_90 the widest tensors, too."""

from __future__ import annotations

from collections.abc import Iterator

from fastmorph_kernels.configs import shipped
from fastmorph_kernels.fill.kernel import _fill_kernel

from bench.cases.case import Case


def cases(target: str) -> Iterator[Case]:
    """It sees no stride and no size: those stand in its table, so that there is one layout."""
    for entry in shipped("fill"):
        for shared, wide in ((False, False), (True, False), (True, True)) if target == "sm_90" else ((True, False),):
            yield Case(
                kernel="fill",
                function=_fill_kernel,
                dtype=str(entry.dtype).removeprefix("torch."),
                variant=entry.variant,
                constants={"DIMS": 3, "GROWN": 2, "SHARED": shared, "WIDE": wide, "BLOCK": entry.config["block"]},
                options={"num_warps": entry.config["num_warps"], "num_stages": entry.config["num_stages"]},
                types={"table_ptr": "*i64"},
            )
