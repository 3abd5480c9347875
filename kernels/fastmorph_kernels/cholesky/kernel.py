"""Triton kernels for many Cholesky factorisations.

    matrix[b] = lower[b] lower[b]^T      matrix (B, n, n), of which the lower triangle is read -> lower (B, n, n)

A panel is BLOCK_N columns. Its diagonal block is factored in registers, a column at a time; the rows below it are then
substituted through that factor, which, unlike a product with the block's inverse, leaves a backward error of rounding
whatever the block's condition. Everything else is `tl.dot`.

- `_single_kernel`: one program a matrix, for small ones. Each panel first takes off what the panels to its left owe it
  (left-looking), so that every block of the factor is written once and the matrix is never copied. What one panel
  writes the next ones read: hence the barriers, and hence no software pipeline, whose loads would run ahead of them.
- `_panel_kernel` and `_trailing_kernel`, two launches a panel, for large ones: rows of the panel, then tiles of what is
  left of the matrix (right-looking), spread over the chip. Each program of a panel factors the diagonal block again,
  which takes no longer than to wait for it. What is left of the matrix stands in `rest`, not in `lower`: a program
  must be able to read the diagonal block after another has written its factor.

Rows and columns beyond n are those of an identity. No atomics, no host synchronisation, sums in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..configs import launch_options, lookup


@dataclass(frozen=True)
class CholeskyConfig:
    """Tile sizes and launch settings; powers of two, at least 16."""

    block_m: int  # rows of a panel that are substituted at once, columns of `right` that are, and both sides of a trailing tile
    block_n: int  # columns of a panel
    num_warps: int
    num_stages: int  # 1: no load may run ahead of a barrier


def config_for(variant: str, like: torch.Tensor) -> CholeskyConfig:
    """The configuration of a variant, "single", "spread" or "solve", for tensors like this one."""
    return CholeskyConfig(**lookup("cholesky", like.dtype, variant, like.device))


@triton.jit
def _load_diagonal(block_ptr, start, size, stride_m, stride_n, BLOCK_N: tl.constexpr):
    """The lower triangle of the diagonal block from row `start`, zeros above it; an identity beyond the matrix."""
    offs = tl.arange(0, BLOCK_N)
    place = start + offs.to(tl.int64)
    inside = (place[:, None] < size) & (offs[:, None] >= offs[None, :])
    block = tl.load(block_ptr + place[:, None] * stride_m + place[None, :] * stride_n, mask=inside, other=0.0)
    return tl.where((offs[:, None] == offs[None, :]) & (place[:, None] >= size), 1.0, block)  # [BLOCK_N, BLOCK_N]


@triton.jit
def _factor(block, BLOCK_N: tl.constexpr):
    """The factor of a block, of which the lower triangle is read, and the order of its first bad pivot or 0."""
    offs = tl.arange(0, BLOCK_N)
    lower = tl.zeros_like(block)
    bad = tl.full((), 0, tl.int32)
    for c in range(0, BLOCK_N):
        row = tl.sum(tl.where(offs[:, None] == c, lower, 0.0), 0)  # [BLOCK_N], what is known of row c
        column = tl.sum(tl.where(offs[None, :] == c, block, -lower * row[None, :]), 1)  # [BLOCK_N]
        pivot = tl.sum(tl.where(offs == c, column, 0.0), 0)
        good = pivot > 0.0  # false for NaN too
        bad = tl.where(good | (bad > 0), bad, c + 1)
        root = tl.sqrt(tl.where(good, pivot, float("nan")))
        lower = tl.where((offs[None, :] == c) & (offs[:, None] >= c), (column / root)[:, None], lower)
    return lower, bad


@triton.jit
def _substitute(right, triangle, BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows x [BLOCK_M, BLOCK_N] of which x triangle^T = right: from the first column, or from the last where BACKWARD."""
    offs = tl.arange(0, BLOCK_N)
    solved = tl.zeros_like(right)
    for step in range(0, BLOCK_N):
        c = BLOCK_N - 1 - step if BACKWARD else step
        row = tl.sum(tl.where(offs[:, None] == c, triangle, 0.0), 0)  # [BLOCK_N]
        pivot = tl.sum(tl.where(offs == c, row, 0.0), 0)
        column = tl.sum(tl.where(offs[None, :] == c, right, -solved * row[None, :]), 1) / pivot  # [BLOCK_M]
        solved = tl.where(offs[None, :] == c, column[:, None], solved)
    return solved


@triton.jit
def _single_kernel(
    matrix_ptr,
    lower_ptr,
    info_ptr,
    size,
    stride_ab,
    stride_am,
    stride_an,
    stride_lb,
    stride_lm,
    stride_ln,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_b = tl.program_id(0).to(tl.int64)
    matrix_ptr += pid_b * stride_ab
    lower_ptr += pid_b * stride_lb
    info = tl.full((), 0, tl.int32)
    offs = tl.arange(0, BLOCK_N)
    for start in range(0, size, BLOCK_N):
        columns = (start + offs).to(tl.int64)  # [BLOCK_N]
        owed = tl.zeros((BLOCK_N, BLOCK_N), dtype=lower_ptr.dtype.element_ty)
        for before in range(0, start, BLOCK_N):
            known = (before + offs).to(tl.int64)
            left_ptrs = lower_ptr + columns[:, None] * stride_lm + known[None, :] * stride_ln
            left = tl.load(left_ptrs, mask=(columns < size)[:, None], other=0.0)
            owed = tl.dot(left, tl.trans(left), owed, input_precision="ieee", out_dtype=owed.dtype)
        block = _load_diagonal(matrix_ptr, start, size, stride_am, stride_an, BLOCK_N)
        diagonal, bad = _factor(block - owed, BLOCK_N)
        info = tl.where((info == 0) & (bad > 0), start + bad, info)
        lower_ptrs = lower_ptr + columns[:, None] * stride_lm + columns[None, :] * stride_ln
        inside = (columns[:, None] < size) & (offs[:, None] >= offs[None, :])
        tl.store(lower_ptrs, diagonal, mask=inside)

        for below in range(start + BLOCK_N, size, BLOCK_M):
            rows = (below + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
            mask_m = (rows < size)[:, None]  # a panel with rows below it has all of its columns
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=lower_ptr.dtype.element_ty)
            for before in range(0, start, BLOCK_N):
                known = (before + offs).to(tl.int64)
                left_ptrs = lower_ptr + rows[:, None] * stride_lm + known[None, :] * stride_ln
                top_ptrs = lower_ptr + columns[None, :] * stride_lm + known[:, None] * stride_ln
                left = tl.load(left_ptrs, mask=mask_m, other=0.0)
                total = tl.dot(left, tl.load(top_ptrs), total, input_precision="ieee", out_dtype=total.dtype)
            matrix_ptrs = matrix_ptr + rows[:, None] * stride_am + columns[None, :] * stride_an
            right = tl.load(matrix_ptrs, mask=mask_m, other=0.0) - total
            solved = _substitute(right, diagonal, False, BLOCK_N)
            tl.store(lower_ptr + rows[:, None] * stride_lm + columns[None, :] * stride_ln, solved, mask=mask_m)
        tl.debug_barrier()
    tl.store(info_ptr + pid_b, info)


@triton.jit
def _panel_kernel(
    rest_ptr,
    lower_ptr,
    info_ptr,
    start,
    size,
    row_blocks,
    stride_rb,
    stride_rm,
    stride_rn,
    stride_lb,
    stride_lm,
    stride_ln,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_m = pid % row_blocks
    pid_b = (pid // row_blocks).to(tl.int64)
    rest_ptr += pid_b * stride_rb
    lower_ptr += pid_b * stride_lb
    offs = tl.arange(0, BLOCK_N)
    columns = (start + offs).to(tl.int64)  # [BLOCK_N]
    block = _load_diagonal(rest_ptr, start, size, stride_rm, stride_rn, BLOCK_N)
    diagonal, bad = _factor(block, BLOCK_N)
    if pid_m == 0:
        inside = (columns[:, None] < size) & (offs[:, None] >= offs[None, :])
        tl.store(lower_ptr + columns[:, None] * stride_lm + columns[None, :] * stride_ln, diagonal, mask=inside)
        info = tl.load(info_ptr + pid_b)
        tl.store(info_ptr + pid_b, tl.where((info == 0) & (bad > 0), start + bad, info))
    rows = (start + BLOCK_N + pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    mask_m = (rows < size)[:, None]
    right = tl.load(rest_ptr + rows[:, None] * stride_rm + columns[None, :] * stride_rn, mask=mask_m, other=0.0)
    solved = _substitute(right, diagonal, False, BLOCK_N)
    tl.store(lower_ptr + rows[:, None] * stride_lm + columns[None, :] * stride_ln, solved, mask=mask_m)


@triton.jit
def _trailing_kernel(
    source_ptr,
    lower_ptr,
    rest_ptr,
    start,
    size,
    blocks,
    stride_sb,
    stride_sm,
    stride_sn,
    stride_lb,
    stride_lm,
    stride_ln,
    stride_rb,
    stride_rm,
    stride_rn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_n = pid % blocks
    pid_m = pid // blocks % blocks
    pid_b = (pid // (blocks * blocks)).to(tl.int64)
    if pid_m < pid_n:
        return
    corner = start + BLOCK_N
    rows = (corner + pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    columns = (corner + pid_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    known = (start + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BLOCK_N]
    lower_ptr += pid_b * stride_lb + known * stride_ln
    left = tl.load(lower_ptr[None, :] + rows[:, None] * stride_lm, mask=(rows < size)[:, None], other=0.0)
    top = tl.load(lower_ptr[:, None] + columns[None, :] * stride_lm, mask=(columns < size)[None, :], other=0.0)
    inside = (rows[:, None] < size) & (rows[:, None] >= columns[None, :])
    source_ptrs = source_ptr + pid_b * stride_sb + rows[:, None] * stride_sm + columns[None, :] * stride_sn
    source = tl.load(source_ptrs, mask=inside, other=0.0)
    rest = source - tl.dot(left, top, input_precision="ieee", out_dtype=source.dtype)
    rest_ptrs = rest_ptr + pid_b * stride_rb + rows[:, None] * stride_rm + columns[None, :] * stride_rn
    tl.store(rest_ptrs, rest, mask=inside)


def launch_single(matrix: torch.Tensor, lower: torch.Tensor, info: torch.Tensor, *, config: CholeskyConfig) -> None:
    """Factor (B, n, n), any strides, into the lower triangle of `lower`; `info` (B,) int32, contiguous. Nothing is empty."""
    _single_kernel[(len(matrix),)](
        matrix,
        lower,
        info,
        matrix.shape[1],
        *matrix.stride(),
        *lower.stride(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **launch_options(config),
    )


def launch_spread(
    matrix: torch.Tensor, lower: torch.Tensor, info: torch.Tensor, rest: torch.Tensor, *, config: CholeskyConfig
) -> None:
    """As `launch_single`, with `info` zero and `rest`, another (B, n, n), to work in."""
    batch, size, _ = matrix.shape
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    options = launch_options(config)
    source = matrix
    for start in range(0, size, config.block_n):
        tiles = triton.cdiv(size - start - config.block_n, config.block_m)  # below the diagonal block
        grid, strides = (batch * max(1, tiles),), (*source.stride(), *lower.stride())
        _panel_kernel[grid](source, lower, info, start, size, max(1, tiles), *strides, **blocks, **options)
        if tiles > 0:
            strides += rest.stride()
            _trailing_kernel[(batch * tiles * tiles,)](source, lower, rest, start, size, tiles, *strides, **blocks, **options)
        source = rest
