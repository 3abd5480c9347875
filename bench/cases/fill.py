"""The kernel that writes many grown tensors: every configuration; on sm_90 the widest tensors and one tensor alone, too."""

from __future__ import annotations

from collections.abc import Iterator

from fastmorph_kernels.configs import shipped
from fastmorph_kernels.fill.kernel import _fill_kernel

from bench.cases.case import Case


def cases(target: str) -> Iterator[Case]:
    """It sees no stride and no size: those stand in its table, so that there is one layout."""
    for entry in shipped("fill"):
        each = [(True, False, False)]
        if target == "sm_90":
            each += [(False, False, False), (True, True, False), (False, False, True)]
        for shared, wide, alone in each:
            yield Case(
                kernel="fill",
                function=_fill_kernel,
                dtype=str(entry.dtype).removeprefix("torch."),
                variant=entry.variant,
                constants={"DIMS": 3, "GROWN": 2, "SHARED": shared, "WIDE": wide, "BLOCK": entry.config["block"]},
                options={name: entry.config[name] for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": False},
                layout="one tensor" if alone else "any",
                unit=("rows", "steps") if alone else (),
                types={"table_ptr": "*i64"},
            )
