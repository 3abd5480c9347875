"""Triton kernel for the solves with Cholesky factors.

    lower[b] lower[b]^T out[b] = right[b]      lower (B, n, n), of which the lower triangle is read; right, out (B, n, m)

Columns of `right` are independent: a program takes BLOCK_M of them through both substitutions, BLOCK_N unknowns at a time.
It holds them as rows, [BLOCK_M, BLOCK_N], which makes each block's substitution that of a factorisation's panel. Blocks
already solved are read back from `out`: hence the barriers, and no software pipeline, whose loads would run ahead of them.
Unknowns beyond n are those of an identity. Sums run in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..configs import launch_options
from .kernel import CholeskyConfig, _load_diagonal, _substitute


@triton.jit
def _solve_kernel(
    lower_ptr,
    right_ptr,
    out_ptr,
    size,
    right_columns,
    column_blocks,
    stride_lb,
    stride_lm,
    stride_ln,
    stride_rb,
    stride_rn,
    stride_rm,
    stride_ob,
    stride_on,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_m = (pid % column_blocks).to(tl.int64)
    pid_b = (pid // column_blocks).to(tl.int64)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], columns of `right`
    mask_m = (rows < right_columns)[:, None]
    lower_ptr += pid_b * stride_lb
    right_ptrs = right_ptr + pid_b * stride_rb + rows[:, None] * stride_rm
    out_ptrs = out_ptr + pid_b * stride_ob + rows[:, None] * stride_om
    offs = tl.arange(0, BLOCK_N)
    panels = tl.cdiv(size, BLOCK_N)

    for panel in range(0, panels):  # y lower^T = right
        place = (panel * BLOCK_N + offs).to(tl.int64)  # [BLOCK_N]
        mask_n = (place < size)[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=out_ptr.dtype.element_ty)
        for other in range(0, panel):
            known = (other * BLOCK_N + offs).to(tl.int64)
            x = tl.load(out_ptrs + known[None, :] * stride_on, mask=mask_m, other=0.0)
            block_ptrs = lower_ptr + known[:, None] * stride_ln + place[None, :] * stride_lm
            total = tl.dot(x, tl.load(block_ptrs, mask=mask_n, other=0.0), total, input_precision="ieee", out_dtype=total.dtype)
        right = tl.load(right_ptrs + place[None, :] * stride_rn, mask=mask_m & mask_n, other=0.0)
        triangle = _load_diagonal(lower_ptr, panel * BLOCK_N, size, stride_lm, stride_ln, BLOCK_N)
        solved = _substitute(right - total, triangle, False, BLOCK_N)
        tl.store(out_ptrs + place[None, :] * stride_on, solved, mask=mask_m & mask_n)
        tl.debug_barrier()

    for step in range(0, panels):  # x lower = y
        panel = panels - 1 - step
        place = (panel * BLOCK_N + offs).to(tl.int64)  # [BLOCK_N]
        mask_n = (place < size)[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=out_ptr.dtype.element_ty)
        for other in range(panel + 1, panels):
            known = (other * BLOCK_N + offs).to(tl.int64)
            inside = (known < size)[None, :]
            x = tl.load(out_ptrs + known[None, :] * stride_on, mask=mask_m & inside, other=0.0)
            block_ptrs = lower_ptr + known[:, None] * stride_lm + place[None, :] * stride_ln
            block = tl.load(block_ptrs, mask=(known < size)[:, None], other=0.0)
            total = tl.dot(x, block, total, input_precision="ieee", out_dtype=total.dtype)
        right = tl.load(out_ptrs + place[None, :] * stride_on, mask=mask_m & mask_n, other=0.0)
        triangle = _load_diagonal(lower_ptr, panel * BLOCK_N, size, stride_lm, stride_ln, BLOCK_N)
        solved = _substitute(right - total, tl.trans(triangle), True, BLOCK_N)
        tl.store(out_ptrs + place[None, :] * stride_on, solved, mask=mask_m & mask_n)
        tl.debug_barrier()


def launch_solve(lower: torch.Tensor, right: torch.Tensor, out: torch.Tensor, *, config: CholeskyConfig) -> None:
    """Solve (B, n, m) right-hand sides with factors (B, n, n), any strides, into `out`. Nothing is empty."""
    batch, size, columns = right.shape
    column_blocks = triton.cdiv(columns, config.block_m)
    _solve_kernel[(batch * column_blocks,)](
        lower,
        right,
        out,
        size,
        columns,
        column_blocks,
        *lower.stride(),
        *right.stride(),
        *out.stride(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **launch_options(config),
    )
