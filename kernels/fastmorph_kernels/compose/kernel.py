"""Triton kernel for the composition of two convolution kernels, and for its adjoint.

    compose     out[b, o, i, u] = sum over h, v of second[b, o, h, v] * first[b, h, i, u - v]          u in [0, K1 + K2 - 1)
    correlate   out[b, o, h, v] = sum over i, w of target[b, o, i, v + w - before] * first[b, h, i, w]     v in [0, K2)

    first (B, Ch, Ci, *K1), second (B, Co, Ch, *K2), target (B, Co, Ci, *K), each with three spatial dimensions; kernels of
    fewer come as views with sizes of 1, and a Linear layer, with (1, 1, 1), is then a plain batched matrix product.

One kernel serves both: it writes a window of a full convolution (see `tile`). With t = v + w - before, the second sum is
that of target[o, i, t] * first[h, i, t + before - v]: the full convolution of the target with `first` transposed and turned
around, from offset K1 - 1 - before on. Its loop runs over the taps t of the target, so that products with the zeros that
stand around the target in the frame are never taken.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..configs import launch_options
from ..tile import product_tile, program_tile, tile_columns
from ..tiling import TileConfig, closer, is_wide


@triton.jit
def _compose_kernel(
    first_ptr,
    second_ptr,
    out_ptr,
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
    start_x,
    start_y,
    start_z,
    size_x,
    size_y,
    size_z,
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
    stride_ob,
    stride_oo,
    stride_oi,
    stride_ox,
    stride_oy,
    stride_oz,
    PRECISION: tl.constexpr,
    FIRST_T: tl.constexpr,
    SECOND_T: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    size = (size_x, size_y, size_z)
    blocks_u = tl.cdiv(size_x * size_y * size_z, BLOCK_U)
    blocks_m, blocks_i = tl.cdiv(out_channels, BLOCK_M), tl.cdiv(in_channels, BLOCK_I)
    pid_u, pid_m, pid_i, pid_b = program_tile(tl.program_id(0), blocks_u, blocks_m, blocks_i)
    acc = product_tile(
        first_ptr + pid_b * stride_fb,
        second_ptr + pid_b * stride_sb,
        pid_u,
        pid_m,
        pid_i,
        (second_channels, hidden_channels, first_channels),
        (k1_x, k1_y, k1_z),
        (k2_x, k2_y, k2_z),
        (start_x, start_y, start_z),
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
    mask = (offs_m < out_channels)[:, None] & ((offs_i < in_channels) & (n_x < size_x))[None, :]
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    rows = offs_m.to(INDEX) * stride_oo
    columns = offs_i.to(INDEX) * stride_oi
    columns += n_x.to(INDEX) * stride_ox + n_y.to(INDEX) * stride_oy + n_z.to(INDEX) * stride_oz
    out_ptrs = out_ptr + pid_b * stride_ob + rows[:, None] + columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def launch_compose(first: torch.Tensor, second: torch.Tensor, out: torch.Tensor, *, precision: str, config: TileConfig) -> None:
    """Fill `out` with the composition of `first` and `second`.

    (B, Ch, Ci, *K1), (B, Co, Ch, *K2) and (B, Co, Ci, *(K1 + K2 - 1)), each with three spatial dimensions and any
    strides, of one dtype, on one device, `out` not empty; the inputs may have more channels, of zeros. Nothing is checked.
    """
    _launch(first, first.stride(), second, out, (0, 0, 0), precision, config)


def launch_correlate(
    target: torch.Tensor,
    before: Sequence[int],
    first: torch.Tensor,
    out: torch.Tensor,
    *,
    precision: str,
    config: TileConfig,
) -> None:
    """Fill `out` with the correlation of `target`, which stands behind `before` zeros, with `first`.

    (B, Co, Ci, *K), (B, Ch, Ci, *K1) and (B, Co, Ch, *K2), under the same conditions.
    """
    start = [k - 1 - zeros for k, zeros in zip(first.shape[3:], before, strict=True)]
    transposed = first.transpose(1, 2)
    _launch(transposed, turned_strides(transposed), target, out, start, precision, config)


def turned_strides(first: torch.Tensor) -> tuple[int, ...]:
    """The strides of `first` turned around in its spatial dimensions, to be used from its last tap on."""
    strides = first.stride()
    return *strides[:3], *(-stride for stride in strides[3:])


def _launch(
    first: torch.Tensor,
    first_strides: Sequence[int],
    second: torch.Tensor,
    out: torch.Tensor,
    start: Sequence[int],
    precision: str,
    config: TileConfig,
) -> None:
    """The kernel from offset `start` on; negative strides of `first` lead back from its last tap."""
    k1, k2, size = first.shape[3:], second.shape[3:], out.shape[3:]
    origin = first[..., -1:, -1:, -1:] if min(first_strides[3:]) < 0 else first
    channels = first.shape[1], second.shape[1], first.shape[2]
    block_i, block_u = config.blocks(out.shape[2])
    blocks_u = triton.cdiv(size[0] * size[1] * size[2], block_u)
    blocks_m, blocks_i = triton.cdiv(out.shape[1], config.block_m), triton.cdiv(out.shape[2], block_i)
    _compose_kernel[(out.shape[0] * blocks_i * blocks_m * blocks_u,)](
        origin,
        second,
        out,
        *out.shape[1:3],
        *channels,
        *k1,
        *k2,
        *start,
        *size,
        *first_strides,
        *second.stride(),
        *out.stride(),
        PRECISION=precision,
        FIRST_T=closer(first, 1, 2),
        SECOND_T=closer(second, 1, 2),
        WIDE=is_wide(second, out, first=first, offsets=[max(abs(a), abs(a + n - 1)) for a, n in zip(start, size, strict=True)]),
        BLOCK_M=config.block_m,
        BLOCK_I=block_i,
        BLOCK_U=block_u,
        BLOCK_K=config.block_k,
        **launch_options(config),
    )
