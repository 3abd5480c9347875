"""The two Gram matrices of a half-step as registered operators, and the validated functions in front of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .configs import lookup
from .correlate_op import check_sizes, correlate_torch
from .support import Precision, accumulator, check_precision, check_tensors, interprets, six_dimensional, three
from .tiling import choose, packed


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
    out: Tensor = _row_gram_op(first, list(k2), _check("row_gram", first, k2, precision))
    return out


def column_gram(first: Tensor, k2: Sequence[int], *, precision: Precision = "ieee") -> Tensor:
    """Return A^T A of the system F2 A = G that a half-step solves for the second kernel: one equation a row.

        out[b, (u, i), (u', i')] = sum over h, v of first[b, h, i, u - v] * first[b, h, i', u' - v]      u in [0, K1 + K2 - 1)

    Its inverse gives the solution of smallest norm. Arguments, order of rows, filling and errors are those of `row_gram`.

    Returns:
        (B, |N| * Ci, |N| * Ci) with N = K1 + K2 - 1, contiguous; float64 for float64, float32 otherwise.
    """
    out: Tensor = _column_gram_op(first, list(k2), _check("column_gram", first, k2, precision))
    return out


def _check(operator: str, first: Tensor, k2: Sequence[int], precision: str) -> str:
    """Raise TypeError or ValueError unless all fits; return how products are taken."""
    check_tensors(operator, first=first)
    if not 3 <= first.ndim <= 6:
        raise ValueError(
            f"{operator} needs first (B, Ch, Ci, *K1) with 0 to 3 spatial dimensions, but it has shape {tuple(first.shape)}."
        )
    check_sizes(operator, first, k2)
    return check_precision(precision, first.dtype)


@torch.library.custom_op("fastmorph_kernels::row_gram", mutates_args=(), device_types="cuda")
def _row_gram_op(first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    with torch.cuda.device(first.device):  # Triton launches on the current device, wherever its arguments are
        return _launch_row_gram(first, k2, precision)


@_row_gram_op.register_kernel("cpu")
def _row_gram_cpu(first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    if interprets(first.dtype):
        return _launch_row_gram(first, k2, precision)
    sizes = three(k2, 1)
    lags = correlate_torch(  # (B, Ch, Ch, *(2 * K2 - 1)), h' by h
        six_dimensional(first), [n - 1 for n in sizes], six_dimensional(first), [2 * n - 1 for n in sizes]
    )
    taps = torch.tensor(list(itertools.product(*map(range, sizes))))  # (|K2|, 3)
    x, y, z = (taps[:, None] - taps[None, :] + torch.tensor(sizes) - 1).unbind(-1)
    return lags[..., x, y, z].permute(0, 3, 2, 4, 1).reshape(_empty_row_gram(first, k2).shape)


@_row_gram_op.register_fake
def _row_gram_fake(first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    return _empty_row_gram(first, k2)


@torch.library.custom_op("fastmorph_kernels::column_gram", mutates_args=(), device_types="cuda")
def _column_gram_op(first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    with torch.cuda.device(first.device):
        return _launch_column_gram(first, k2, precision)


@_column_gram_op.register_kernel("cpu")
def _column_gram_cpu(first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    if interprets(first.dtype):
        return _launch_column_gram(first, k2, precision)
    exact = six_dimensional(first).to(accumulator(first.dtype))
    k1, sizes = exact.shape[3:], three(k2, 1)
    rows = exact.permute(0, 3, 4, 5, 2, 1).flatten(1, 4)  # (B, |K1| * Ci, Ch)
    product = (rows @ rows.mT).view(len(exact), *k1, exact.shape[2], *k1, exact.shape[2])
    frame = [one + two - 1 for one, two in zip(k1, sizes, strict=True)]
    out = exact.new_zeros(len(exact), *frame, exact.shape[2], *frame, exact.shape[2])
    for v in itertools.product(*map(range, sizes)):
        box = tuple(slice(start, start + n) for start, n in zip(v, k1, strict=True))
        out[(slice(None), *box, slice(None), *box)] += product
    return out.view(_empty_column_gram(first, k2).shape)


@_column_gram_op.register_fake
def _column_gram_fake(first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    return _empty_column_gram(first, k2)


def _empty_row_gram(first: Tensor, k2: Sequence[int]) -> Tensor:
    n = first.shape[1]
    for size in k2:
        n = n * size
    return first.new_empty((first.shape[0], n, n), dtype=accumulator(first.dtype))


def _empty_column_gram(first: Tensor, k2: Sequence[int]) -> Tensor:
    n = first.shape[2]
    for one, two in zip(first.shape[3:], k2, strict=True):
        n = n * (one + two - 1)
    return first.new_empty((first.shape[0], n, n), dtype=accumulator(first.dtype))


def _launch_row_gram(first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    out = _empty_row_gram(first, k2)
    if out.numel() == 0:  # an empty grid is an error
        return out
    from .row_gram_kernel import launch_row_gram

    batch, channels = first.shape[:2]
    sizes = three(k2, 1)
    lags = ((2 * sizes[0] - 1) * (2 * sizes[1] - 1) * (2 * sizes[2] - 1) + 1) // 2
    aligned = channels % 16 == 0
    config = choose("row_gram", first.dtype, precision, first.device, channels, channels, batch * lags, aligned=aligned)
    first = packed(six_dimensional(first), 2, config.pack)
    launch_row_gram(first, sizes, out, precision=precision, config=config)
    return out


def _launch_column_gram(first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    out = _empty_column_gram(first, k2)
    if out.numel() == 0:
        return out
    from .column_gram_kernel import launch_product, launch_shifts

    first = six_dimensional(first)
    batch, channels, k1 = first.shape[0], first.shape[2], first.shape[3:]
    taps = k1[0] * k1[1] * k1[2]
    config = choose("column_gram", first.dtype, precision, first.device, channels, channels, batch * taps * taps)
    product = out.new_empty((batch, taps * channels, taps * channels))
    launch_product(packed(first, 1, config.pack), product, precision=precision, config=config)
    shifts = lookup("column_gram", out.dtype, "shifts", out.device)
    launch_shifts(product, k1, three(k2, 1), out, **shifts)
    return out
