"""Triton kernel for the Gram matrix of a half-step's rows, each lag computed once and written to all its places.

    out[b, (v, h), (v', h')] = sum over i, w of first[b, h, i, w] * first[b, h', i, w + v - v']      v, v' in [0, K2)

    first (B, Ch, Ci, K1x, K1y, K1z) -> out (B, |K2| * Ch, |K2| * Ch), rows and columns tap by tap

Block Toeplitz: the block (v, v') depends on the lag d = v - v' alone, and is the transpose of the block of -d. A program
owns a tile of channels h', h of one lag of the lexicographically non-negative half, 13 of 25 for K2 = 3x3. That tile is
one of the correlation of `first` with itself at offset d, which is a window of a full convolution (see `tile`). It is
written to every (v', v' + d), and turned over to every (v' + d, v'): both triangles are filled, in as many writes as
zeroing the upper one would take. Of lag 0, which is symmetric, the tiles below the diagonal are images of those above it.

Operations, K1 = K2 = 3: 82 C^3 at most, against 162 C^3 with every block of one triangle computed where it stands.
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
def _row_gram_kernel(
    first_ptr,
    out_ptr,
    out_channels,
    hidden_channels,
    first_channels,
    k1_x,
    k1_y,
    k1_z,
    k2_x,
    k2_y,
    k2_z,
    stride_fb,
    stride_fh,
    stride_fi,
    stride_fx,
    stride_fy,
    stride_fz,
    stride_ob,
    stride_or,
    PRECISION: tl.constexpr,
    ALONG_I: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    lags_y, lags_z = 2 * k2_y - 1, 2 * k2_z - 1
    zero = (2 * k2_x - 1) * lags_y * lags_z // 2  # the lag 0, half way through
    blocks = tl.cdiv(out_channels, BLOCK)
    pid = tl.program_id(0)
    pid_u = zero + pid % (zero + 1)
    pid_m = pid // (zero + 1) % blocks
    pid_n = pid // ((zero + 1) * blocks) % blocks
    pid_b = (pid // ((zero + 1) * blocks * blocks)).to(tl.int64)
    image = (pid_u == zero) & (pid_m > pid_n)

    second_ptr = first_ptr + pid_b * stride_fb
    last = tl.cast(k1_x - 1, tl.int64) * stride_fx
    last += tl.cast(k1_y - 1, tl.int64) * stride_fy + tl.cast(k1_z - 1, tl.int64) * stride_fz
    acc = product_tile(
        second_ptr + last,  # the first kernel of this product is transposed and turned around
        second_ptr,
        pid_u,
        pid_m,
        pid_n,
        (first_channels, tl.where(image, 0, hidden_channels), first_channels),
        (k1_x, k1_y, k1_z),
        (k1_x, k1_y, k1_z),
        (k1_x - k2_x, k1_y - k2_y, k1_z - k2_z),
        (2 * k2_x - 1, lags_y, lags_z),
        (stride_fi, stride_fh, -stride_fx, -stride_fy, -stride_fz),
        (stride_fh, stride_fi, stride_fx, stride_fy, stride_fz),
        ACC,
        PRECISION,
        ALONG_I,
        not ALONG_I,
        WIDE,
        BLOCK,
        BLOCK,
        1,
        BLOCK_K,
    )  # [BLOCK, BLOCK], h' by h

    d_x = pid_u // (lags_y * lags_z) - k2_x + 1
    d_y = pid_u // lags_z % lags_y - k2_y + 1
    d_z = pid_u % lags_z - k2_z + 1
    count_y, count_z = k2_y - tl.abs(d_y), k2_z - tl.abs(d_z)
    places = tl.where(image, 0, (k2_x - d_x) * count_y * count_z)
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    offs_m, offs_n = pid_m * BLOCK + tl.arange(0, BLOCK), pid_n * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_m < out_channels)[:, None] & (offs_n < out_channels)[None, :]
    out_ptr += pid_b * stride_ob
    offs = offs_m.to(INDEX)[:, None] * stride_or + offs_n[None, :]
    for place in range(0, places):
        v, w = _places(place, (d_x, d_y, d_z), (count_y, count_z), k2_y, k2_z)
        corner = tl.cast(v * out_channels, INDEX) * stride_or + w * out_channels
        tl.store(out_ptr + corner + offs, acc, mask=mask)
    # Apart from the first ones, so that the tile need not be held in two layouts at a time.
    mask &= (pid_u > zero) | (pid_m < pid_n)
    offs = offs_n.to(INDEX)[None, :] * stride_or + offs_m[:, None]
    for place in range(0, places):
        v, w = _places(place, (d_x, d_y, d_z), (count_y, count_z), k2_y, k2_z)
        corner = tl.cast(w * out_channels, INDEX) * stride_or + v * out_channels
        tl.store(out_ptr + corner + offs, acc, mask=mask)


@triton.jit
def _places(place, lag, counts, k2_y, k2_z):
    """The taps v and v + lag, counted row by row, of one of the pairs that lie a lag apart."""
    d_x, d_y, d_z = lag
    count_y, count_z = counts
    v_x = place // (count_y * count_z)
    v_y = place // count_z % count_y + tl.maximum(-d_y, 0)
    v_z = place % count_z + tl.maximum(-d_z, 0)
    return (v_x * k2_y + v_y) * k2_z + v_z, ((v_x + d_x) * k2_y + v_y + d_y) * k2_z + v_z + d_z


def launch_row_gram(first: torch.Tensor, k2: Sequence[int], out: torch.Tensor, *, precision: str, config: TileConfig) -> None:
    """Fill `out` (B, |K2| * Ch, |K2| * Ch), contiguous and not empty, of the type that sums are taken in.

    `first` (B, Ch, Ci, *K1) has three spatial dimensions and any strides, and may have more channels, of zeros. Tiles are
    square: `config.block_m` counts for both sides. Nothing is checked here.
    """
    channels = out.shape[1] // (k2[0] * k2[1] * k2[2])
    lags = ((2 * k2[0] - 1) * (2 * k2[1] - 1) * (2 * k2[2] - 1) + 1) // 2
    _row_gram_kernel[(out.shape[0] * lags * triton.cdiv(channels, config.block_m) ** 2,)](
        first,
        out,
        channels,
        first.shape[2],
        first.shape[1],
        *first.shape[3:],
        *k2,
        *first.stride(),
        *out.stride()[:2],
        PRECISION=precision,
        ALONG_I=closer(first, 2, 1),
        WIDE=is_wide(out, first=first, offsets=[one + two - 2 for one, two in zip(first.shape[3:], k2, strict=True)]),
        BLOCK=config.block_m,
        BLOCK_K=config.block_k,
        **launch_options(config),
    )
