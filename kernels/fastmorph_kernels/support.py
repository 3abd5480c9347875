"""What the operators share: which dtypes there are, where kernels run, and views of one rank.

An operator runs its Triton kernel on CUDA tensors. On CPU tensors it runs the same kernel where Triton's interpreter is
on (`TRITON_INTERPRET=1`), and plain PyTorch elsewhere. Triton is imported at the first call that needs it: on a machine
without it, CPU tensors still work.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

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


def frame_size(first: Tensor, k2: Sequence[int]) -> list[int]:
    """N = K1 + K2 - 1, the kernel size of the composition of `first` (B, Ch, Ci, *K1) with a kernel of size `k2`."""
    return [one + two - 1 for one, two in zip(first.shape[3:], k2, strict=True)]


def six_dimensional(kernel: Tensor) -> Tensor:
    """A view of a kernel (B, O, I, *K) with three spatial dimensions, the missing ones in front and of size 1."""
    for _ in range(6 - kernel.ndim):
        kernel = kernel.unsqueeze(3)
    return kernel


def three(sizes: Sequence[int], missing: int = 0) -> list[int]:
    """One number for each of three spatial dimensions, those in front that are missing filled in."""
    return [missing] * (3 - len(sizes)) + list(sizes)
