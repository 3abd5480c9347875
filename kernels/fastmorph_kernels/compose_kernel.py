"""Triton kernel for the composition of two convolution kernels: their full convolution over the hidden channels.

    out[b, o, i, u] = sum over h, v of second[b, o, h, v] * first[b, h, i, u - v]      u in [0, K1 + K2 - 1)

    first (B, Ch, Ci, K1x, K1y, K1z), second (B, Co, Ch, K2x, K2y, K2z) -> out (B, Co, Ci, Ux, Uy, Uz), U = K1 + K2 - 1

Kernels of fewer than three spatial dimensions come as views with sizes of 1; a Linear layer has (1, 1, 1), and this is
then a plain batched matrix product.

Tiling. An implicit matrix product: a program owns BLOCK_M output channels o and BLOCK_N = BLOCK_I x BLOCK_U pairs of an
input channel i and an offset u, and reduces over (h, v) with one `tl.dot` per tap v and block of hidden channels.
- The input channel, not the offset, fills the tile first. Few taps reach an offset near the border (of 3x3 into 3x3,
  81 of the 25 x 9 pairs (u, v) have u - v inside the first kernel), and a tile that holds one offset loops over exactly
  those: 162 C^3 operations, against 450 C^3 where every tile loops over every tap. Only when Ci < BLOCK_N does a tile
  hold several offsets; it loops over the taps that any of them needs, and masks.
- Taps are the inner part of the reduction, hidden channels the outer one: in contiguous inputs the taps of a block of
  hidden channels share cache lines, which the first of them brings in.
- Both parts are one loop, so that the software pipeline does not drain once per tap.
- Offsets are the fastest part of the program id: neighbouring programs read the same blocks of both inputs.
- Strides are free, but 16-bit loads are vectorised and pipelined only where they run along channels: stride 1 in h for
  `second` and in i for `first`. Contiguous weights of more than one tap are not laid out so.

Sums run in a fixed order, without atomics: equal inputs give equal bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Fixed when the kernel is decorated below; an interpreted kernel takes CPU tensors, a compiled one does not.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class ComposeConfig:
    """Tile sizes and launch settings of one `_compose_kernel`; block sizes are powers of two, `block_k` at least 16."""

    block_m: int  # output channels
    block_n: int  # pairs of input channel and offset
    block_k: int  # hidden channels
    num_warps: int
    num_stages: int


# For a layer with few channels, and for the rest. Chosen without a GPU, so that nothing spills on sm_90; not timed yet.
CONFIGS: dict[torch.dtype, tuple[ComposeConfig, ComposeConfig]] = {
    torch.float64: (ComposeConfig(16, 32, 16, 4, 2), ComposeConfig(64, 64, 16, 4, 3)),
    torch.float32: (ComposeConfig(16, 32, 16, 4, 2), ComposeConfig(64, 64, 16, 4, 3)),
    torch.bfloat16: (ComposeConfig(16, 32, 32, 2, 3), ComposeConfig(128, 128, 32, 8, 3)),
    torch.float16: (ComposeConfig(16, 32, 32, 2, 3), ComposeConfig(128, 128, 32, 8, 3)),
}


def config_for(dtype: torch.dtype, out_channels: int, in_channels: int) -> ComposeConfig:
    """The default configuration: large tiles, or small ones where half of a large tile would lie outside the output."""
    small, large = CONFIGS[dtype]
    fits = 2 * out_channels > large.block_m and 2 * in_channels > large.block_n
    return large if fits else small


@triton.jit
def _compose_kernel(
    first_ptr,
    second_ptr,
    out_ptr,
    out_channels,
    hidden_channels,
    in_channels,
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
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    BLOCK_N: tl.constexpr = BLOCK_I * BLOCK_U
    u_yz = (k1_y + k2_y - 1) * (k1_z + k2_z - 1)
    u_size_y = k1_y + k2_y - 1
    u_size_z = k1_z + k2_z - 1
    u_size = (k1_x + k2_x - 1) * u_yz

    blocks_u = tl.cdiv(u_size, BLOCK_U)
    blocks_m = tl.cdiv(out_channels, BLOCK_M)
    blocks_i = tl.cdiv(in_channels, BLOCK_I)
    pid = tl.program_id(0)
    pid_u = pid % blocks_u
    pid_m = (pid // blocks_u % blocks_m).to(tl.int64)
    pid_i = (pid // (blocks_u * blocks_m) % blocks_i).to(tl.int64)
    pid_b = (pid // (blocks_u * blocks_m * blocks_i)).to(tl.int64)

    offs_n = tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_i = pid_i * BLOCK_I + offs_n % BLOCK_I  # [BLOCK_N]
    offs_u = pid_u * BLOCK_U + offs_n // BLOCK_I  # [BLOCK_N]
    u_x = offs_u // u_yz
    u_y = offs_u // u_size_z % u_size_y
    u_z = offs_u % u_size_z
    mask_m = offs_m < out_channels
    mask_n = (offs_i < in_channels) & (offs_u < u_size)

    # The box of taps that any offset of this tile needs: exact for one offset, and along every axis the offsets share.
    u_lo = pid_u * BLOCK_U
    u_hi = tl.minimum(u_lo + BLOCK_U, u_size) - 1
    same_x = u_lo // u_yz == u_hi // u_yz
    same_y = u_lo // u_size_z == u_hi // u_size_z
    v_x_lo = tl.maximum(u_lo // u_yz - k1_x + 1, 0)
    v_x_hi = tl.minimum(u_hi // u_yz, k2_x - 1)
    v_y_lo = tl.where(same_x, tl.maximum(u_lo // u_size_z % u_size_y - k1_y + 1, 0), 0)
    v_y_hi = tl.where(same_x, tl.minimum(u_hi // u_size_z % u_size_y, k2_y - 1), k2_y - 1)
    v_z_lo = tl.where(same_y, tl.maximum(u_lo % u_size_z - k1_z + 1, 0), 0)
    v_z_hi = tl.where(same_y, tl.minimum(u_hi % u_size_z, k2_z - 1), k2_z - 1)
    taps_y = v_y_hi - v_y_lo + 1
    taps_z = v_z_hi - v_z_lo + 1
    taps = (v_x_hi - v_x_lo + 1) * taps_y * taps_z

    first_ptr += pid_b * stride_fb
    second_ptr += pid_b * stride_sb
    second_rows = offs_m * stride_so  # [BLOCK_M]
    u_x_64, u_y_64, u_z_64 = u_x.to(tl.int64), u_y.to(tl.int64), u_z.to(tl.int64)
    first_columns = offs_i * stride_fi + u_x_64 * stride_fx + u_y_64 * stride_fy + u_z_64 * stride_fz  # [BLOCK_N], at tap 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for step in range(0, taps * tl.cdiv(hidden_channels, BLOCK_K)):
        offs_h = (step // taps).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        mask_h = offs_h < hidden_channels
        tap = step % taps
        v_x = v_x_lo + tap // (taps_y * taps_z)
        v_y = v_y_lo + tap // taps_z % taps_y
        v_z = v_z_lo + tap % taps_z
        v_x_64, v_y_64, v_z_64 = v_x.to(tl.int64), v_y.to(tl.int64), v_z.to(tl.int64)
        second_tap = second_ptr + v_x_64 * stride_sx + v_y_64 * stride_sy + v_z_64 * stride_sz
        a = tl.load(
            second_tap + second_rows[:, None] + offs_h[None, :] * stride_sh,
            mask=mask_m[:, None] & mask_h[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        t_x = u_x - v_x  # [BLOCK_N], the offset in the first kernel
        t_y = u_y - v_y
        t_z = u_z - v_z
        inside = (t_x >= 0) & (t_x < k1_x) & (t_y >= 0) & (t_y < k1_y) & (t_z >= 0) & (t_z < k1_z)
        first_tap = first_ptr - (v_x_64 * stride_fx + v_y_64 * stride_fy + v_z_64 * stride_fz)
        b = tl.load(
            first_tap + offs_h[:, None] * stride_fh + first_columns[None, :],
            mask=mask_h[:, None] & (mask_n & inside)[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_M, BLOCK_N]

    out_ptr += pid_b * stride_ob
    out_columns = offs_i * stride_oi + u_x_64 * stride_ox + u_y_64 * stride_oy + u_z_64 * stride_oz  # [BLOCK_N]
    out_ptrs = out_ptr + offs_m[:, None] * stride_oo + out_columns[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def launch_compose(
    first: torch.Tensor, second: torch.Tensor, out: torch.Tensor, *, precision: str, config: ComposeConfig
) -> None:
    """Fill `out` with the composition of `first` and `second`.

    (B, Ch, Ci, *K1), (B, Co, Ch, *K2) and (B, Co, Ci, *(K1 + K2 - 1)), each with three spatial dimensions and any
    strides, of one dtype, on one device, `out` not empty. Nothing is checked here.
    """
    batch, hidden_channels, in_channels, *k1 = first.shape
    out_channels, k2 = second.shape[1], second.shape[3:]
    block_i = min(config.block_n, triton.next_power_of_2(in_channels))
    block_u = config.block_n // block_i
    blocks_u = triton.cdiv(out.shape[3] * out.shape[4] * out.shape[5], block_u)
    blocks_m = triton.cdiv(out_channels, config.block_m)
    blocks_i = triton.cdiv(in_channels, block_i)
    _compose_kernel[(batch * blocks_i * blocks_m * blocks_u,)](
        first,
        second,
        out,
        out_channels,
        hidden_channels,
        in_channels,
        *k1,
        *k2,
        *first.stride(),
        *second.stride(),
        *out.stride(),
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_I=block_i,
        BLOCK_U=block_u,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # A product and its sum rounded once: the more accurate choice, and what `ieee` compiles to anyway.
        enable_fp_fusion=True,
    )
