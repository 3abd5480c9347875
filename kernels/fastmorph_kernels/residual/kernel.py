"""Triton kernels for what a pair of kernels leaves of a weight, and for its squared norm, in the pass that composes them.

    error[b, o, i, u] = weight[b, o, i, u - before] - sum over h, v of second[b, o, h, v] * first[b, h, i, u - v]
    squared[b] = sum over o, i, u of error[b, o, i, u]^2

The weight (B, Co, Ci, Kx, Ky, Kz) is zero outside [0, K): the frame around it is never stored. Tiles are those of the
composition (see `tile`). Each leaves the sum of its squares, in float64, in its own place of a buffer, and a second kernel
adds these up: in a fixed order, so that equal inputs give equal bits, and without the overflow of float32 squares. The
errors are squared before they are rounded to the dtype of the inputs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..configs import launch_options
from ..tile import product_tile, program_tile, tile_columns
from ..tiling import TileConfig, closer, is_wide

_SUM_BLOCK = 1024


@triton.jit
def _residual_kernel(
    first_ptr,
    second_ptr,
    weight_ptr,
    error_ptr,
    partial_ptr,
    out_channels,
    in_channels,
    hidden_channels,
    second_channels,
    first_channels,
    k1_x,
    k1_y,
    k1_z,
    k2_x,
    k2_y,
    k2_z,
    k_x,
    k_y,
    k_z,
    before_x,
    before_y,
    before_z,
    stride_fb,
    stride_fh,
    stride_fi,
    stride_fx,
    stride_fy,
    stride_fz,
    stride_sb,
    stride_so,
    stride_sh,
    stride_sx,
    stride_sy,
    stride_sz,
    stride_wb,
    stride_wo,
    stride_wi,
    stride_wx,
    stride_wy,
    stride_wz,
    stride_eb,
    stride_eo,
    stride_ei,
    stride_ex,
    stride_ey,
    stride_ez,
    PRECISION: tl.constexpr,
    FIRST_T: tl.constexpr,
    SECOND_T: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    size = (k1_x + k2_x - 1, k1_y + k2_y - 1, k1_z + k2_z - 1)
    blocks_u = tl.cdiv(size[0] * size[1] * size[2], BLOCK_U)
    blocks_m, blocks_i = tl.cdiv(out_channels, BLOCK_M), tl.cdiv(in_channels, BLOCK_I)
    pid = tl.program_id(0)
    pid_u, pid_m, pid_i, pid_b = program_tile(pid, blocks_u, blocks_m, blocks_i)
    acc = product_tile(
        first_ptr + pid_b * stride_fb,
        second_ptr + pid_b * stride_sb,
        pid_u,
        pid_m,
        pid_i,
        (second_channels, hidden_channels, first_channels),
        (k1_x, k1_y, k1_z),
        (k2_x, k2_y, k2_z),
        (0, 0, 0),
        size,
        (stride_fh, stride_fi, stride_fx, stride_fy, stride_fz),
        (stride_so, stride_sh, stride_sx, stride_sy, stride_sz),
        ACC,
        PRECISION,
        FIRST_T,
        SECOND_T,
        WIDE,
        BLOCK_M,
        BLOCK_I,
        BLOCK_U,
        BLOCK_K,
    )
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i, n_x, n_y, n_z = tile_columns(pid_i, pid_u, size, BLOCK_I, BLOCK_U)
    mask_m = offs_m < out_channels
    mask_n = (offs_i < in_channels) & (n_x < size[0])
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    offs_m, offs_i = offs_m.to(INDEX), offs_i.to(INDEX)

    w_x, w_y, w_z = n_x - before_x, n_y - before_y, n_z - before_z  # [BLOCK_N], the offset in the weight
    inside = (w_x >= 0) & (w_x < k_x) & (w_y >= 0) & (w_y < k_y) & (w_z >= 0) & (w_z < k_z)
    columns = offs_i * stride_wi + w_x.to(INDEX) * stride_wx + w_y.to(INDEX) * stride_wy + w_z.to(INDEX) * stride_wz
    weight_ptrs = weight_ptr + pid_b * stride_wb + (offs_m * stride_wo)[:, None] + columns[None, :]
    weight = tl.load(weight_ptrs, mask=mask_m[:, None] & (mask_n & inside)[None, :], other=0.0)
    # An infinity in one input meets the zeros outside the other: that is no number, and no part of the norm.
    mask = mask_m[:, None] & mask_n[None, :]
    error = tl.where(mask, weight.to(ACC) - acc, 0.0)  # [BLOCK_M, BLOCK_N]
    columns = offs_i * stride_ei + n_x.to(INDEX) * stride_ex + n_y.to(INDEX) * stride_ey + n_z.to(INDEX) * stride_ez
    error_ptrs = error_ptr + pid_b * stride_eb + (offs_m * stride_eo)[:, None] + columns[None, :]
    tl.store(error_ptrs, error.to(error_ptr.dtype.element_ty), mask=mask)
    wide_error = error.to(tl.float64)
    tl.store(partial_ptr + pid, tl.sum(wide_error * wide_error))


@triton.jit
def _sum_kernel(partial_ptr, out_ptr, count, BLOCK: tl.constexpr):
    pid_b = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(partial_ptr + pid_b * count + start + offs, mask=start + offs < count, other=0.0)
    tl.store(out_ptr + pid_b, tl.sum(total, 0))


def tiles_of(error: torch.Tensor, config: TileConfig) -> int:
    """How many tiles one item of the error (B, Co, Ci, *N) has."""
    block_i, block_u = config.blocks(error.shape[2])
    return -(-math.prod(error.shape[3:]) // block_u) * -(-error.shape[1] // config.block_m) * -(-error.shape[2] // block_i)


def launch_residual(
    first: torch.Tensor,
    second: torch.Tensor,
    weight: torch.Tensor,
    before: Sequence[int],
    error: torch.Tensor,
    partial: torch.Tensor,
    *,
    precision: str,
    config: TileConfig,
) -> None:
    """Fill `error`, and `partial`, the sums of squares that `launch_sum` adds up.

    (B, Ch, Ci, *K1), (B, Co, Ch, *K2), (B, Co, Ci, *K), (B, Co, Ci, *(K1 + K2 - 1)), each with three spatial dimensions
    and any strides, of one dtype, on one device; the first two may have more channels, of zeros. partial (B, tiles),
    contiguous float64. Nothing is empty. Nothing is checked here.
    """
    block_i, block_u = config.blocks(weight.shape[2])
    _residual_kernel[(partial.numel(),)](
        first,
        second,
        weight,
        error,
        partial,
        *weight.shape[1:3],
        first.shape[1],
        second.shape[1],
        first.shape[2],
        *first.shape[3:],
        *second.shape[3:],
        *weight.shape[3:],
        *before,
        *first.stride(),
        *second.stride(),
        *weight.stride(),
        *error.stride(),
        PRECISION=precision,
        FIRST_T=closer(first, 1, 2),
        SECOND_T=closer(second, 1, 2),
        WIDE=is_wide(second, weight, error, first=first, offsets=[n - 1 for n in error.shape[3:]]),
        BLOCK_M=config.block_m,
        BLOCK_I=block_i,
        BLOCK_U=block_u,
        BLOCK_K=config.block_k,
        **launch_options(config),
    )


def launch_sum(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Sums of (B, count) into (B,); both contiguous float64 and not empty."""
    grid = (partial.shape[0],)
    _sum_kernel[grid](partial, out, partial.shape[1], BLOCK=_SUM_BLOCK, num_warps=4, enable_fp_fusion=True)
