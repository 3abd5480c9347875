"""The Gram matrix of a half-step's columns as a registered operator, and the validated function in front of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from ..checks import Precision, check_fixed_kernel
from ..configs import lookup
from ..register import register
from ..support import accumulator, frame_size, six_dimensional, three
from ..tiling import choose, packed


def column_gram(first: Tensor, k2: Sequence[int], *, precision: Precision = "ieee") -> Tensor:
    """Return A^T A of the system F2 A = G that a half-step solves for the second kernel: one equation a row.

        out[b, (u, i), (u', i')] = sum over h, v of first[b, h, i, u - v] * first[b, h, i', u' - v]      u in [0, K1 + K2 - 1)

    Its inverse gives the solution of smallest norm. Arguments, order of rows, filling and errors are those of `row_gram`.

    Returns:
        (B, |N| * Ci, |N| * Ci) with N = K1 + K2 - 1, contiguous; float64 for float64, float32 otherwise.
    """
    out: Tensor = _column_gram_op(first, list(k2), check_fixed_kernel("column_gram", first, k2, precision))
    return out


def _allocate(first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    equations = first.shape[2]
    for size in frame_size(first, k2):
        equations = equations * size
    return first.new_empty((first.shape[0], equations, equations), dtype=accumulator(first.dtype))


def _launch(out: Tensor, first: Tensor, k2: Sequence[int], precision: str) -> None:
    if out.numel() == 0:  # an empty grid is an error
        return
    from .kernel import launch_product, launch_shifts

    first = six_dimensional(first)
    batch, channels, k1 = first.shape[0], first.shape[2], first.shape[3:]
    taps = k1[0] * k1[1] * k1[2]
    config = choose("column_gram", first.dtype, precision, first.device, channels, channels, batch * taps * taps)
    product = out.new_empty((batch, taps * channels, taps * channels))
    launch_product(packed(first, 1, config.pack), product, precision=precision, config=config)
    launch_shifts(product, k1, three(k2, 1), out, **lookup("column_gram", out.dtype, "shifts", out.device))


def _plain(out: Tensor, first: Tensor, k2: Sequence[int], precision: str) -> None:
    exact, sizes = six_dimensional(first).double(), three(k2, 1)
    k1, frame = exact.shape[3:], frame_size(exact, sizes)
    rows = exact.permute(0, 3, 4, 5, 2, 1).flatten(1, 4)  # (B, |K1| * Ci, Ch)
    product = (rows @ rows.mT).view(len(exact), *k1, exact.shape[2], *k1, exact.shape[2])
    shifted = exact.new_zeros(len(exact), *frame, exact.shape[2], *frame, exact.shape[2])
    for v in itertools.product(*map(range, sizes)):
        box = tuple(slice(start, start + n) for start, n in zip(v, k1, strict=True))
        shifted[(slice(None), *box, slice(None), *box)] += product
    out.copy_(shifted.view(out.shape))


_column_gram_op = register("column_gram", allocate=_allocate, launch=_launch, plain=_plain)
