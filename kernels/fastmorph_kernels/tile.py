"""On the device: the main loop that the products of the morphism equation share: one tile of a window of a full convolution.

    out[o, i, n] = sum over h, v of second[o, h, v] * first[h, i, start + n - v]      n in [0, size)

    first (Ch, Ci, K1x, K1y, K1z), second (Co, Ch, K2x, K2y, K2z); `first` is zero outside [0, K1)

The composition is the window (0, K1 + K2 - 1). Its adjoint in `second`, the correlation of a target with `first`, is a
window too: of the full convolution of the target with `first` turned around in every dimension and transposed, which
strides alone express. So are the lags of a Gram matrix.

Tiling. An implicit matrix product: a program owns BLOCK_M output channels o and BLOCK_N = BLOCK_I x BLOCK_U pairs of an
input channel i and an offset n, and reduces over (h, v) with one `tl.dot` per tap v and block of hidden channels.
- The input channel, not the offset, fills the tile first. Few taps reach an offset near the border (of 3x3 into 3x3,
  81 of the 25 x 9 pairs (u, v) have u - v inside the first kernel), and a tile that holds one offset loops over exactly
  those: 162 C^3 operations, against 450 C^3 where every tile loops over every tap. Only when Ci < BLOCK_N does a tile
  hold several offsets; it loops over the taps that any of them needs, and masks.
- Taps are the inner part of the reduction, hidden channels the outer one: in contiguous inputs the taps of a block of
  hidden channels share cache lines, which the first of them brings in.
- Both parts are one loop, so that the software pipeline does not drain once per tap; counters step through it, because
  a division by a size that is not known when compiling costs as much as tens of products.
- Strides are free. Each input is loaded along whichever of its channel dimensions lies closer in memory (FIRST_T,
  SECOND_T). Loads are 128 bits wide, and 16-bit ones pipelined, only where that one has stride 1, which it has not in a
  contiguous weight of more than one tap: `tiling.packed` makes it so.
- Offsets inside one batch item are 32 bits wide, unless an item is so large that they must be WIDE.

Sums run in a fixed order, without atomics: equal inputs give equal bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_tile(pid, blocks_u, blocks_m, blocks_i):
    """Which offsets, output channels, input channels and batch item a program owns.

    Offsets change fastest: neighbouring programs read the same blocks of both inputs.
    """
    pid_m = pid // blocks_u % blocks_m
    pid_i = pid // (blocks_u * blocks_m) % blocks_i
    pid_b = (pid // (blocks_u * blocks_m * blocks_i)).to(tl.int64)
    return pid % blocks_u, pid_m, pid_i, pid_b


@triton.jit
def tile_columns(pid_i, pid_u, size, BLOCK_I: tl.constexpr, BLOCK_U: tl.constexpr):
    """Input channel and offset (n_x, n_y, n_z) in the window of each column of a tile, [BLOCK_N] each."""
    _, size_y, size_z = size
    offs_n = tl.arange(0, BLOCK_I * BLOCK_U)
    offs_u = pid_u * BLOCK_U + offs_n // BLOCK_I
    return pid_i * BLOCK_I + offs_n % BLOCK_I, offs_u // (size_y * size_z), offs_u // size_z % size_y, offs_u % size_z


@triton.jit
def taps_of(pid_u, start, size, k1, k2, BLOCK_U: tl.constexpr):
    """The box of taps v that any offset of a tile needs, exact for one offset and along every axis the offsets share."""
    size_x, size_y, size_z = size
    lo = pid_u * BLOCK_U
    hi = tl.minimum(lo + BLOCK_U, size_x * size_y * size_z) - 1
    x_lo, x_hi = lo // (size_y * size_z), hi // (size_y * size_z)
    y_lo, y_hi = lo // size_z % size_y, hi // size_z % size_y
    z_lo, z_hi = lo % size_z, hi % size_z
    same_x = x_lo == x_hi
    same_y = same_x & (y_lo == y_hi)
    y_lo, y_hi = tl.where(same_x, y_lo, 0), tl.where(same_x, y_hi, size_y - 1)
    z_lo, z_hi = tl.where(same_y, z_lo, 0), tl.where(same_y, z_hi, size_z - 1)
    v_lo = (
        tl.maximum(start[0] + x_lo - k1[0] + 1, 0),
        tl.maximum(start[1] + y_lo - k1[1] + 1, 0),
        tl.maximum(start[2] + z_lo - k1[2] + 1, 0),
    )
    v_hi = (
        tl.minimum(start[0] + x_hi, k2[0] - 1),
        tl.minimum(start[1] + y_hi, k2[1] - 1),
        tl.minimum(start[2] + z_hi, k2[2] - 1),
    )
    return v_lo, v_hi


@triton.jit
def product_tile(
    first_ptr,  # at the batch item, as is second_ptr
    second_ptr,
    pid_u,
    pid_m,
    pid_i,
    channels,  # Co, Ch and Ci; those of the inputs where these are padded with zeros
    k1,
    k2,
    start,
    size,
    strides_f,  # h, i, x, y, z
    strides_s,  # o, h, x, y, z
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST_T: tl.constexpr,
    SECOND_T: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of one tile, [BLOCK_M, BLOCK_I * BLOCK_U]; zero in the rows and columns that lie outside the output."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    out_channels, hidden_channels, in_channels = channels
    stride_fh, stride_fi, stride_fx, stride_fy, stride_fz = strides_f
    stride_so, stride_sh, stride_sx, stride_sy, stride_sz = strides_s

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i, n_x, n_y, n_z = tile_columns(pid_i, pid_u, size, BLOCK_I, BLOCK_U)
    u_x, u_y, u_z = start[0] + n_x, start[1] + n_y, start[2] + n_z  # [BLOCK_N]
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < out_channels
    mask_n = (offs_i < in_channels) & (n_x < size[0])

    rows = offs_m.to(INDEX) * stride_so  # [BLOCK_M]
    columns = offs_i.to(INDEX) * stride_fi  # [BLOCK_N]
    columns += u_x.to(INDEX) * stride_fx + u_y.to(INDEX) * stride_fy + u_z.to(INDEX) * stride_fz
    if SECOND_T:
        second_offs = offs_k.to(INDEX)[:, None] * stride_sh + rows[None, :]  # [BLOCK_K, BLOCK_M]
    else:
        second_offs = rows[:, None] + offs_k.to(INDEX)[None, :] * stride_sh  # [BLOCK_M, BLOCK_K]
    if FIRST_T:
        first_offs = columns[:, None] + offs_k.to(INDEX)[None, :] * stride_fh  # [BLOCK_N, BLOCK_K]
    else:
        first_offs = offs_k.to(INDEX)[:, None] * stride_fh + columns[None, :]  # [BLOCK_K, BLOCK_N]

    v_lo, v_hi = taps_of(pid_u, start, size, k1, k2, BLOCK_U)
    taps = 1
    for axis in tl.static_range(3):
        taps *= tl.maximum(v_hi[axis] - v_lo[axis] + 1, 0)

    v_x, v_y, v_z = v_lo
    h_lo = tl.full((), 0, tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_I * BLOCK_U), dtype=ACC)
    for _ in range(0, taps * tl.cdiv(hidden_channels, BLOCK_K)):
        mask_k = h_lo + offs_k < hidden_channels
        mask_f = mask_n
        if BLOCK_U > 1:  # one offset alone meets no tap outside the first kernel
            t_x, t_y, t_z = u_x - v_x, u_y - v_y, u_z - v_z
            mask_f &= (t_x >= 0) & (t_x < k1[0]) & (t_y >= 0) & (t_y < k1[1]) & (t_z >= 0) & (t_z < k1[2])
        h, x, y, z = h_lo.to(INDEX), v_x.to(INDEX), v_y.to(INDEX), v_z.to(INDEX)
        second_tap = second_ptr + (h * stride_sh + x * stride_sx + y * stride_sy + z * stride_sz)
        first_tap = first_ptr + (h * stride_fh - x * stride_fx - y * stride_fy - z * stride_fz)
        if SECOND_T:
            a = tl.trans(tl.load(second_tap + second_offs, mask=mask_k[:, None] & mask_m[None, :], other=0.0))
        else:
            a = tl.load(second_tap + second_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if FIRST_T:
            b = tl.trans(tl.load(first_tap + first_offs, mask=mask_f[:, None] & mask_k[None, :], other=0.0))
        else:
            b = tl.load(first_tap + first_offs, mask=mask_k[:, None] & mask_f[None, :], other=0.0)
        # [BLOCK_M, BLOCK_K] times [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

        v_z += 1
        over_z = v_z > v_hi[2]
        v_z = tl.where(over_z, v_lo[2], v_z)
        v_y = tl.where(over_z, v_y + 1, v_y)
        over_y = v_y > v_hi[1]
        v_y = tl.where(over_y, v_lo[1], v_y)
        v_x = tl.where(over_y, v_x + 1, v_x)
        over_x = v_x > v_hi[0]
        v_x = tl.where(over_x, v_lo[0], v_x)
        h_lo = tl.where(over_x, h_lo + BLOCK_K, h_lo)
    return acc
