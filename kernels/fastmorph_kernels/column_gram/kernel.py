"""Triton kernels for the Gram matrix of a half-step's columns: shifted copies of one small product, added up.

    product[b, (w, i), (w', i')] = sum over h of first[b, h, i, w] * first[b, h, i', w']                w, w' in [0, K1)
    out[b, (u, i), (u', i')] = sum over v of product[b, (u - v, i), (u' - v, i')]        v in [0, K2), u, u' in [0, K1 + K2 - 1)

    first (B, Ch, Ci, K1x, K1y, K1z) -> out (B, |N| * Ci, |N| * Ci), N = K1 + K2 - 1, rows and columns tap by tap

Two kernels, because the product is needed again for every shift. For K1 = K2 = 3 it takes 90 C^3 operations of its 162 C^3:
only blocks with w >= w' lexicographically are made, which are all that blocks of `out` with u >= u' need, and the other
ones are their transposes. Summing over h where each entry of `out` stands would take 729 C^3. The second kernel reads at
most 405 C^2 entries, mostly from cache, and writes each of the 625 C^2 once, where adding copy after copy onto `out` would
read and write 729 C^2. The product is 81 / 625 of `out` in size. A program owns one tile of i, i' of a pair of taps; pairs
change fastest, so that all shifts of a tile of the product are read while it is in cache.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..configs import launch_options
from ..tile import product_tile
from ..tiling import TileConfig, closer, is_wide


@triton.jit
def _product_kernel(
    first_ptr,
    out_ptr,
    out_channels,
    hidden_channels,
    first_channels,
    k1_x,
    k1_y,
    k1_z,
    stride_fb,
    stride_fh,
    stride_fi,
    stride_fx,
    stride_fy,
    stride_fz,
    stride_ob,
    stride_or,
    PRECISION: tl.constexpr,
    ALONG_H: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    taps = k1_x * k1_y * k1_z
    blocks_m, blocks_n = tl.cdiv(out_channels, BLOCK_M), tl.cdiv(out_channels, BLOCK_N)
    pid = tl.program_id(0)
    here, there = pid // taps % taps, pid % taps
    pid_m = pid // (taps * taps) % blocks_m
    pid_n = pid // (taps * taps * blocks_m) % blocks_n
    pid_b = (pid // (taps * taps * blocks_m * blocks_n)).to(tl.int64)
    needed = here >= there

    first_ptr += pid_b * stride_fb
    here_x, here_y, here_z = (
        (here // (k1_y * k1_z)).to(tl.int64),
        (here // k1_z % k1_y).to(tl.int64),
        (here % k1_z).to(tl.int64),
    )
    there_x, there_y = (there // (k1_y * k1_z)).to(tl.int64), (there // k1_z % k1_y).to(tl.int64)
    there_z = (there % k1_z).to(tl.int64)
    acc = product_tile(
        first_ptr + there_x * stride_fx + there_y * stride_fy + there_z * stride_fz,
        first_ptr + here_x * stride_fx + here_y * stride_fy + here_z * stride_fz,
        0,
        pid_m,
        pid_n,
        (first_channels, tl.where(needed, hidden_channels, 0), first_channels),
        (1, 1, 1),
        (1, 1, 1),
        (0, 0, 0),
        (1, 1, 1),
        (stride_fh, stride_fi, 0, 0, 0),
        (stride_fi, stride_fh, 0, 0, 0),
        ACC,
        PRECISION,
        ALONG_H,
        not ALONG_H,
        WIDE,
        BLOCK_M,
        BLOCK_N,
        1,
        BLOCK_K,
    )  # [BLOCK_M, BLOCK_N]
    offs_m, offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < out_channels)[:, None] & (offs_n < out_channels)[None, :] & needed
    rows = (here * out_channels + offs_m).to(tl.int64)
    columns = (there * out_channels + offs_n).to(tl.int64)
    tl.store(out_ptr + pid_b * stride_ob + rows[:, None] * stride_or + columns[None, :], acc, mask=mask)


@triton.jit
def _shift_kernel(
    product_ptr,
    out_ptr,
    out_channels,
    k1_x,
    k1_y,
    k1_z,
    k2_x,
    k2_y,
    k2_z,
    stride_pb,
    stride_pr,
    stride_ob,
    stride_or,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_y, n_z = k1_y + k2_y - 1, k1_z + k2_z - 1
    taps = (k1_x + k2_x - 1) * n_y * n_z
    blocks_m, blocks_n = tl.cdiv(out_channels, BLOCK_M), tl.cdiv(out_channels, BLOCK_N)
    pid = tl.program_id(0)
    here, there = pid // taps % taps, pid % taps
    pid_m = pid // (taps * taps) % blocks_m
    pid_n = pid // (taps * taps * blocks_m) % blocks_n
    pid_b = (pid // (taps * taps * blocks_m * blocks_n)).to(tl.int64)
    here_x, here_y, here_z = here // (n_y * n_z), here // n_z % n_y, here % n_z
    there_x, there_y, there_z = there // (n_y * n_z), there // n_z % n_y, there % n_z

    # The box of shifts that bring both places inside the product.
    lo_x = tl.maximum(tl.maximum(here_x, there_x) - k1_x + 1, 0)
    lo_y = tl.maximum(tl.maximum(here_y, there_y) - k1_y + 1, 0)
    lo_z = tl.maximum(tl.maximum(here_z, there_z) - k1_z + 1, 0)
    count_x = tl.maximum(tl.minimum(tl.minimum(here_x, there_x), k2_x - 1) - lo_x + 1, 0)
    count_y = tl.maximum(tl.minimum(tl.minimum(here_y, there_y), k2_y - 1) - lo_y + 1, 0)
    count_z = tl.maximum(tl.minimum(tl.minimum(here_z, there_z), k2_z - 1) - lo_z + 1, 0)
    needed = here >= there
    shifts = tl.where(needed, count_x * count_y * count_z, 0)

    offs_m, offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < out_channels)[:, None] & (offs_n < out_channels)[None, :] & needed
    tile = offs_m.to(tl.int64)[:, None] * stride_pr + offs_n.to(tl.int64)[None, :]
    product_ptr += pid_b * stride_pb
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=out_ptr.dtype.element_ty)
    for shift in range(0, shifts):
        v_x = lo_x + shift // (count_y * count_z)
        v_y = lo_y + shift // count_z % count_y
        v_z = lo_z + shift % count_z
        row = ((here_x - v_x) * k1_y + here_y - v_y) * k1_z + here_z - v_z
        column = ((there_x - v_x) * k1_y + there_y - v_y) * k1_z + there_z - v_z
        block_ptr = product_ptr + (row * out_channels).to(tl.int64) * stride_pr + column * out_channels
        acc += tl.load(block_ptr + tile, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]

    rows = (here * out_channels + offs_m).to(tl.int64)
    columns = (there * out_channels + offs_n).to(tl.int64)
    out_ptr += pid_b * stride_ob
    tl.store(out_ptr + rows[:, None] * stride_or + columns[None, :], acc, mask=mask)
    tl.store(out_ptr + columns[None, :] * stride_or + rows[:, None], acc, mask=mask & (here > there))


def launch_product(first: torch.Tensor, product: torch.Tensor, *, precision: str, config: TileConfig) -> None:
    """Fill the blocks w >= w' of `product` (B, |K1| * Ci, |K1| * Ci), contiguous, of the type that sums are taken in.

    `first` (B, Ch, Ci, *K1) has three spatial dimensions and any strides, and may have more channels, of zeros.
    """
    taps = first.shape[3] * first.shape[4] * first.shape[5]
    channels = product.shape[1] // taps
    blocks = triton.cdiv(channels, config.block_m) * triton.cdiv(channels, config.block_n)
    _product_kernel[(product.shape[0] * taps * taps * blocks,)](
        first,
        product,
        channels,
        first.shape[1],
        first.shape[2],
        *first.shape[3:],
        *first.stride(),
        *product.stride()[:2],
        PRECISION=precision,
        ALONG_H=closer(first, 1, 2),
        WIDE=is_wide(first=first, offsets=(0, 0, 0)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        **launch_options(config),
    )


def launch_shifts(
    product: torch.Tensor,
    k1: Sequence[int],
    k2: Sequence[int],
    out: torch.Tensor,
    *,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
) -> None:
    """Add the shifted copies of `product` up into `out` (B, |N| * Ci, |N| * Ci), contiguous, not empty and of one dtype."""
    taps = (k1[0] + k2[0] - 1) * (k1[1] + k2[1] - 1) * (k1[2] + k2[2] - 1)
    channels = out.shape[1] // taps
    blocks = triton.cdiv(channels, block_m) * triton.cdiv(channels, block_n)
    _shift_kernel[(out.shape[0] * taps * taps * blocks,)](
        product,
        out,
        channels,
        *k1,
        *k2,
        *product.stride()[:2],
        *out.stride()[:2],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        enable_fp_fusion=True,
    )
