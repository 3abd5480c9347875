"""What the operators share: which dtypes and precisions there are, where kernels run, and views of one rank.

An operator runs its Triton kernel on CUDA tensors. On CPU tensors it runs the same kernel where Triton's interpreter is
on (`TRITON_INTERPRET=1`), and plain PyTorch elsewhere. Triton is imported at the first call that needs it: on a machine
without it, CPU tensors still work.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Precision = Literal["ieee", "tf32", "tf32x3"]
"""How float32 products are taken: `ieee` in full, `tf32` with 10 bits of mantissa, `tf32x3` as three of those."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, which are then able to take CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def interprets(dtype: torch.dtype) -> bool:
    """Whether kernels on CPU tensors of `dtype` are right: the interpreter's bfloat16 products are not (triton#11584)."""
    return interpreted() and dtype != torch.bfloat16


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over tensors of `dtype` are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def six_dimensional(kernel: Tensor) -> Tensor:
    """A view of a kernel (B, O, I, *K) with three spatial dimensions, the missing ones in front and of size 1."""
    for _ in range(6 - kernel.ndim):
        kernel = kernel.unsqueeze(3)
    return kernel


def three(sizes: Sequence[int], missing: int = 0) -> list[int]:
    """One number for each of three spatial dimensions, those in front that are missing filled in."""
    return [missing] * (3 - len(sizes)) + list(sizes)


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
