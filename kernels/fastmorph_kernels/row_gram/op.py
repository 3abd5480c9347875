"""The Gram matrix of a half-step's rows as a registered operator, and the validated function in front of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import Precision, check_fixed_kernel
from ..correlate.op import correlate_torch
from ..register import register
from ..support import accumulator, six_dimensional, three
from ..tiling import choose, packed


def row_gram(first: Tensor, k2: Sequence[int], *, precision: Precision = "ieee") -> Tensor:
    """Return A A^T of the system F2 A = G that a half-step solves for the second kernel: one unknown a row.

        out[b, (v, h), (v', h')] = sum over i, w of first[b, h, i, w] * first[b, h', i, w + v - v']      v, v' in [0, K2)

    Rows and columns are ordered tap by tap, channels fastest. The matrix is filled whole, both triangles, and symmetric to
    the last bit except perhaps within the tiles on its diagonal. There are 0 to 3 spatial dimensions; strides are free; a
    batch of 0 and channels of 0 are allowed. Not differentiable.

    Args:
        first: (B, Ch, Ci, *K1), the fixed kernel; float32, float64, bfloat16 or float16.
        k2: kernel size of the unknown one.
        precision: how float32 products are taken; other dtypes take theirs in full.

    Returns:
        (B, |K2| * Ch, |K2| * Ch), contiguous; float64 for float64, float32 otherwise, since a Gram matrix rounded to 16
        bits has in general no Cholesky factor.

    Raises:
        TypeError: the dtype is not supported.
        ValueError: the shape does not fit, or `precision` is unknown.
    """
    out: Tensor = _row_gram_op(first, list(k2), check_fixed_kernel("row_gram", first, k2, precision))
    return out


def _allocate(first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    unknowns = first.shape[1]
    for size in k2:
        unknowns = unknowns * size
    return first.new_empty((first.shape[0], unknowns, unknowns), dtype=accumulator(first.dtype))


def _launch(out: Tensor, first: Tensor, k2: Sequence[int], precision: str) -> None:
    if out.numel() == 0:  # an empty grid is an error
        return
    from .kernel import launch_row_gram

    batch, channels = first.shape[:2]
    sizes = three(k2, 1)
    lags = ((2 * sizes[0] - 1) * (2 * sizes[1] - 1) * (2 * sizes[2] - 1) + 1) // 2
    aligned = channels % 16 == 0
    config = choose("row_gram", first.dtype, precision, first.device, channels, channels, batch * lags, aligned=aligned)
    launch_row_gram(packed(six_dimensional(first), 2, config.pack), sizes, out, precision=precision, config=config)


def _plain(out: Tensor, first: Tensor, k2: Sequence[int], precision: str) -> None:
    sizes = three(k2, 1)
    lags = correlate_torch(  # (B, Ch, Ch, *(2 * K2 - 1)), h' by h
        six_dimensional(first), [n - 1 for n in sizes], six_dimensional(first), [2 * n - 1 for n in sizes]
    )
    taps = torch.tensor(list(itertools.product(*map(range, sizes))))  # (|K2|, 3)
    x, y, z = (taps[:, None] - taps[None, :] + torch.tensor(sizes) - 1).unbind(-1)
    out.copy_(lags[..., x, y, z].permute(0, 3, 2, 4, 1).reshape(out.shape))


_row_gram_op = register("row_gram", allocate=_allocate, launch=_launch, plain=_plain)
