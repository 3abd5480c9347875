"""The cases of a kernel that is built on the shared tile of products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fastmorph_kernels.configs import DEFAULT, Shipped, shipped

from bench.cases.case import Case

# Which arguments are 1 for kernels of so many spatial dimensions: each variant is compiled for one of them.
_FLAT = {
    "small": (),
    "medium": ("k1_x", "k1_y", "k1_z", "k2_x", "k2_y", "k2_z", "size_x", "size_y", "size_z"),
    "large": ("k1_x", "k2_x", "size_x"),
}
# Which strides are 1 in each way of packing: those of the dimension summed over, or those of the others.
Packed = Mapping[int, tuple[str, ...]]
BOTH_INPUTS: Packed = {1: ("stride_fh", "stride_sh"), 2: ("stride_fi", "stride_so")}


def tile_cases(
    kernel: str,
    function: Any,
    target: str,
    *,
    packed: Packed = BOTH_INPUTS,
    types: Mapping[str, str] | None = None,
) -> Iterator[Case]:
    """The configurations that `_is_compiled` names."""
    for entry in shipped(kernel):
        if not _is_compiled(kernel, entry, target):
            continue
        config, dtype = entry.config, str(entry.dtype).removeprefix("torch.")
        pack = config["pack"]
        unit = packed.get(pack, ())
        flat = tuple(n for n in _FLAT[entry.variant.partition("_")[0]] if n in function.arg_names)
        padded = [n for n in function.arg_names if n.startswith(("stride_f", "stride_s")) or n.endswith("_channels")]
        aligned = [n for n in padded if n not in (*unit, "out_channels", "in_channels")]  # the inputs are padded, the rest not
        for precision in _precisions(entry.variant, target):
            known = {
                "PRECISION": precision,
                "FIRST_T": pack == 1,
                "SECOND_T": pack == 2,
                "ALONG_I": pack == 1,
                "ALONG_H": pack == 1,
                "WIDE": False,
                "BLOCK": config["block_m"],
                "BLOCK_M": config["block_m"],
                "BLOCK_N": config["block_n"],
                "BLOCK_I": config["block_n"],
                "BLOCK_U": 1,
                "BLOCK_K": config["block_k"],
            }
            yield Case(
                kernel=kernel,
                function=function,
                dtype=dtype,
                variant=entry.variant,
                constants={name: value for name, value in known.items() if name in function.arg_names},
                options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                layout="packed" if pack else "any",
                unit=unit + flat,
                aligned=tuple(aligned) if pack else (),
                types=types or {},
            )


def _precisions(variant: str, target: str) -> tuple[str, ...]:
    """How products are taken. Those of three parts need the most registers: they stand for the others, but for large tiles."""
    if not variant.endswith("_tensor"):
        return ("ieee",)
    if target.startswith("gfx"):  # AMD has no tf32x3
        return ("tf32",)
    return ("tf32", "tf32x3") if variant.startswith("large") and target == "sm_90" else ("tf32x3",)


def _is_compiled(kernel: str, entry: Shipped, target: str) -> bool:
    """Every product on sm_90, for which they were chosen; elsewhere large tiles alone, which need the most memory.

    Of the two 16-bit types, which differ in nothing but the name of a product, float16 is compiled for one kernel; that
    kernel, whose main loop they all have, stands for the others on other targets at all dtypes but float32.
    """
    if "block_k" not in entry.config:  # not a product
        return False
    if target == "sm_90":
        return entry.dtype != torch.float16 or kernel == "compose"
    large = entry.variant.startswith("large") and entry.device == DEFAULT
    return large and (entry.dtype == torch.float32 or (kernel == "compose" and entry.dtype != torch.float16))
