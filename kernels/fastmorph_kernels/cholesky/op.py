"""Cholesky factors of many matrices and the solves with them, as registered operators and validated functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..configs import lookup
from ..register import register

_DTYPES = (torch.float32, torch.float64)


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factor symmetric positive definite matrices, matrix = lower lower^T, without waiting for the device.

    `cholesky_preferred` says where this is to be preferred to `torch.linalg.cholesky_ex`, whose conventions it has. Strides are
    free; n and the batch may be 0. Not differentiable.

    Args:
        matrix: (B, n, n), float32 or float64; its strict upper triangle is not read.

    Returns:
        lower: (B, n, n), contiguous, zero above the diagonal. Where `info` is not 0 it is of no use.
        info: (B,) int32: 0, or the order of the first leading minor that is not positive definite, as LAPACK's potrf has it.

    Raises:
        TypeError: the dtype is not supported.
        ValueError: the matrices are not square.
    """
    _check_dtype("cholesky", matrix)
    if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
        raise ValueError(f"cholesky needs square matrices (B, n, n), but matrix has shape {tuple(matrix.shape)}: reshape it.")
    lower, info = _cholesky_op(matrix)
    return lower, info


def cholesky_solve(lower: Tensor, right: Tensor) -> Tensor:
    """Solve lower lower^T out = right, by a forward and a backward substitution.

    Strides are free; n, m and the batch may be 0. Not differentiable.

    Args:
        lower: (B, n, n), as `cholesky` makes it; float32 or float64; its strict upper triangle is not read.
        right: (B, n, m), of the dtype and on the device of `lower`.

    Returns:
        (B, n, m), contiguous.

    Raises:
        TypeError: the dtypes differ or are not supported.
        ValueError: the shapes do not fit, or the devices differ.
    """
    _check_dtype("cholesky_solve", lower)
    if right.dtype != lower.dtype:
        raise TypeError(f"cholesky_solve needs one dtype, but lower has {lower.dtype} and right {right.dtype}: use .to().")
    if right.device != lower.device:
        raise ValueError(
            f"cholesky_solve needs one device, but lower is on {lower.device}, right on {right.device}: use .to()."
        )
    if lower.ndim != 3 or lower.shape[1] != lower.shape[2] or right.ndim != 3 or right.shape[:2] != lower.shape[:2]:
        raise ValueError(
            "cholesky_solve needs lower (B, n, n) and right (B, n, m), but they have shapes "
            f"{tuple(lower.shape)} and {tuple(right.shape)}: a vector needs unsqueeze(-1)."
        )
    out: Tensor = _cholesky_solve_op(lower, right)
    return out


def cholesky_preferred(size: int, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `batch` matrices of `size` rows are better factored by `cholesky` than by `torch.linalg.cholesky_ex`.

    Not measured on a GPU: the kernels' table gives no range for any device, so that this is false wherever nobody has
    written one, "prefer_from" to "prefer_to" rows in batches of at least "prefer_batch".
    """
    if dtype not in _DTYPES:
        return False
    sizes = lookup("cholesky", dtype, "sizes", device)
    return sizes["prefer_from"] <= size <= sizes["prefer_to"] and batch >= sizes["prefer_batch"]


def _allocate(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_zeros(matrix.shape), matrix.new_zeros(matrix.shape[0], dtype=torch.int32)


def _launch(out: tuple[Tensor, Tensor], matrix: Tensor) -> None:
    if matrix.numel() == 0:  # an empty grid is an error
        return
    from .kernel import config_for, launch_single, launch_spread

    if matrix.shape[1] <= lookup("cholesky", matrix.dtype, "sizes", matrix.device)["single"]:
        launch_single(matrix, *out, config=config_for("single", matrix))
    else:
        launch_spread(matrix, *out, matrix.new_empty(matrix.shape), config=config_for("spread", matrix))


def _plain(out: tuple[Tensor, Tensor], matrix: Tensor) -> None:
    for filled, exact in zip(out, torch.linalg.cholesky_ex(matrix), strict=True):
        filled.copy_(exact)


def _allocate_solution(lower: Tensor, right: Tensor) -> Tensor:
    return right.new_empty(right.shape)


def _launch_solution(out: Tensor, lower: Tensor, right: Tensor) -> None:
    if out.numel() == 0:
        return
    from .kernel import config_for
    from .solve_kernel import launch_solve

    launch_solve(lower, right, out, config=config_for("solve", right))


def _plain_solution(out: Tensor, lower: Tensor, right: Tensor) -> None:
    out.copy_(torch.cholesky_solve(right, lower))


def _check_dtype(operator: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{operator} needs float32 or float64, but has {tensor.dtype}: convert with .to().")


_cholesky_op = register("cholesky", allocate=_allocate, launch=_launch, plain=_plain)
_cholesky_solve_op = register("cholesky_solve", allocate=_allocate_solution, launch=_launch_solution, plain=_plain_solution)
