"""Refusals that several operators share; each names the operator, the argument and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .support import DTYPES, frame_size

Precision = Literal["ieee", "tf32", "tf32x3"]
"""How float32 products are taken: `ieee` in full, `tf32` with 10 bits of mantissa, `tf32x3` as three of those."""


def check_tensors(operator: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all have one supported dtype, ValueError unless all are on one device."""
    named = list(tensors.items())
    if len({tensor.dtype for tensor in tensors.values()}) > 1 or named[0][1].dtype not in DTYPES:
        have = " and ".join(f"{name} has {tensor.dtype}" for name, tensor in named)
        raise TypeError(
            f"{operator} needs tensors of one dtype, float32, float64, bfloat16 or float16, but {have}: convert with .to()."
        )
    if len({tensor.device for tensor in tensors.values()}) > 1:
        on = " and ".join(f"{name} is on {tensor.device}" for name, tensor in named)
        raise ValueError(f"{operator} needs its tensors on one device, but {on}: move with .to().")


def check_precision(precision: str, dtype: torch.dtype = torch.float32) -> str:
    """How products of tensors of `dtype` are taken: those of other dtypes than float32 in full. ValueError if unknown."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, but it is {precision!r}.")
    return precision if dtype == torch.float32 else "ieee"


def check_pair(operator: str, first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless the shapes are those of two kernels that follow each other."""
    if first.ndim != second.ndim or not 3 <= first.ndim <= 6:
        raise ValueError(
            f"{operator} needs first (B, Ch, Ci, *K1) and second (B, Co, Ch, *K2) with the same 0 to 3 spatial dimensions, "
            f"but first has shape {tuple(first.shape)} and second {tuple(second.shape)}: "
            "add the missing dimensions with unsqueeze()."
        )
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"first has a batch of {first.shape[0]} and second one of {second.shape[0]} (dimension 0), but {operator} "
            "pairs them up: expand() the smaller one."
        )
    if first.shape[1] != second.shape[2]:
        raise ValueError(
            f"first makes {first.shape[1]} hidden channels (its dimension 1) but second takes {second.shape[2]} (its "
            "dimension 2), and the two must be equal: check that the kernels are not swapped."
        )
    if 0 in first.shape[3:] or 0 in second.shape[3:]:
        raise ValueError(
            f"first has kernel size {tuple(first.shape[3:])} and second {tuple(second.shape[3:])}, but an empty kernel "
            "has no composition: kernel sizes must be at least 1."
        )


def check_sizes(operator: str, first: Tensor, k2: Sequence[int]) -> None:
    """Raise ValueError unless `k2` is a kernel size for a second kernel behind `first`."""
    if len(k2) != first.ndim - 3 or 0 in first.shape[3:] or any(size < 1 for size in k2):
        raise ValueError(
            f"{operator} needs a kernel size k2 of {first.ndim - 3} numbers, one for each spatial dimension of first, and "
            f"no empty kernel, but k2 is {tuple(k2)} and the kernel size of first {tuple(first.shape[3:])}."
        )


def check_place(name: str, kernel: Tensor, before: Sequence[int], first: Tensor, k2: Sequence[int]) -> None:
    """Raise ValueError unless a kernel (B, Co, Ci, *K) behind `before` zeros lies in the frame K1 + K2 - 1."""
    frame = tuple(frame_size(first, k2))
    if len(before) != len(frame) or not all(
        k > 0 and 0 <= b <= n - k for b, k, n in zip(before, kernel.shape[3:], frame, strict=True)
    ):
        raise ValueError(
            f"a {name} of kernel size {tuple(kernel.shape[3:])} behind {tuple(before)} zeros does not lie in the frame "
            f"{frame} of the composition: before + K must be at most K1 + K2 - 1."
        )


def check_fixed_kernel(operator: str, first: Tensor, k2: Sequence[int], precision: str) -> str:
    """Raise TypeError or ValueError unless a half-step for `k2` can start from `first`; return how products are taken."""
    check_tensors(operator, first=first)
    if not 3 <= first.ndim <= 6:
        raise ValueError(
            f"{operator} needs first (B, Ch, Ci, *K1) with 0 to 3 spatial dimensions, but it has shape {tuple(first.shape)}."
        )
    check_sizes(operator, first, k2)
    return check_precision(precision, first.dtype)
