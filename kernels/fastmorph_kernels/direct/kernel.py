"""Triton kernels for the closed form of the morphism equation: both factors in one pass over the weight.

    first = P [S; S; s; G],   second^T = P [R; -R; 0; D],   second * first = G

G (Co, Ci, *K) stands in the frame of K1; D is the unit matrix at one tap of K2; S, s and R are noise, made where they are
used. P = B W is that of `mixing`: W, the identity unless blocks share pairs, then blocks of at most 32 channels.

`direct_kernel` makes either factor, (B, Ch, columns), a column being an input channel and a tap of `first`, or an output
channel and a tap of `second`. A program owns a block of P and a run of tiles of BLOCK_M columns. It keeps the block on the
chip, and for each tile reads the block's rows of G, makes its noise, and writes its rows of the factor: everything once.
- The tile is transposed, columns by hidden channels: what varies is then the left operand of a matrix instruction, which
  Hopper takes from registers, and what stays is the right one, which it takes from shared memory.
- Twins are two rows of one noise, so that their columns of P are added up (for `second`, subtracted) beforehand: a block of
  32 channels with 8 pairs is a product over 16 rows of G and one over 8 rows of noise.
- D takes no product: each of its columns takes one row of P, and few tiles have any.
- Shared pairs: W takes multiples of the sums U^T G from the rows of a group. `sums_kernel` makes these in one more pass over
  G; to a block they are two more rows, along what P makes of u_t and u_d.
- Loads and stores follow memory (`tile`): along columns, along rows, or along runs of rows and taps.

Noise comes from the logical place of its element (`noise_rows`): tiles do not change it, nor what else is in the batch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..words import NOISE_SCALE, mix_key
from .mixing import SIDE, MixingBlock
from .tile import directions_of, load_tile, locate, noise_row, noise_rows, run_of, store_run, store_tile

_SIDE = tl.constexpr(SIDE)
_FIELDS = tl.constexpr(len(MixingBlock._fields))
_HALF = tl.constexpr(0.5**0.5)
_TURN = tl.constexpr(2**0.5)


@triton.jit(do_not_specialize=["blocks", "groups", "pairs", "tiles"])
def direct_kernel(
    weight_ptr,
    mixing_ptr,
    dealing_ptr,
    sums_ptr,
    seed_ptr,
    scale_ptr,
    out_ptr,
    columns,
    blocks,
    groups,
    pairs,
    tiles,
    start_x,
    start_y,
    start_z,
    k_x,
    k_y,
    k_z,
    stride_wb,
    stride_wo,
    stride_wi,
    stride_wx,
    stride_wy,
    stride_wz,
    stride_ob,
    stride_oh,
    stride_oi,
    stride_ox,
    stride_oy,
    stride_oz,
    SIZE_X: tl.constexpr,
    SIZE_Y: tl.constexpr,
    SIZE_Z: tl.constexpr,
    DELTA: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIFORM_W: tl.constexpr,
    UNIFORM_O: tl.constexpr,
    ROWS_CLOSER_W: tl.constexpr,
    ROWS_CLOSER_O: tl.constexpr,
    RUN_O: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One block of P and a run of tiles of one factor: that of the weight, or the DELTA's."""
    fill_span(
        tl.program_id(0),
        weight_ptr,
        mixing_ptr,
        dealing_ptr,
        sums_ptr,
        seed_ptr,
        scale_ptr,
        out_ptr,
        columns,
        blocks,
        groups,
        pairs,
        tiles,
        (start_x, start_y, start_z),
        (k_x, k_y, k_z),
        (stride_wb, stride_wo, stride_wi, stride_wx, stride_wy, stride_wz),
        (stride_ob, stride_oh, stride_oi, stride_ox, stride_oy, stride_oz),
        (SIZE_X, SIZE_Y, SIZE_Z),
        DELTA,
        SHARED,
        PRECISION,
        UNIFORM_W,
        UNIFORM_O,
        ROWS_CLOSER_W,
        ROWS_CLOSER_O,
        RUN_O,
        ALIGNED,
        WIDE,
        BLOCK_M,
        BLOCK_H,
        BLOCK_G,
        BLOCK_S,
    )


@triton.jit
def fill_span(
    pid,  # among the programs of this weight
    weight_ptr,
    mixing_ptr,
    dealing_ptr,
    sums_ptr,
    seed_ptr,
    scale_ptr,
    out_ptr,
    columns,
    blocks,
    groups,
    pairs,
    tiles,
    start,
    extent,
    strides_w,  # b, o, i, x, y, z
    strides_o,  # b, h, i, x, y, z
    SIZE: tl.constexpr,
    DELTA: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIFORM_W: tl.constexpr,
    UNIFORM_O: tl.constexpr,
    ROWS_CLOSER_W: tl.constexpr,
    ROWS_CLOSER_O: tl.constexpr,
    RUN_O: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """What one program does: a block of P and a run of tiles of one factor, that of the weight or the DELTA's."""
    ACC: tl.constexpr = mixing_ptr.dtype.element_ty
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    STREAM: tl.constexpr = 1 if DELTA else 0
    TAPS: tl.constexpr = SIZE[0] * SIZE[1] * SIZE[2]
    stride_wb, stride_wo, stride_wi, stride_wx, stride_wy, stride_wz = strides_w
    stride_ob, stride_oh, stride_oi, stride_ox, stride_oy, stride_oz = strides_o
    weight_strides, out_strides = (stride_wi, stride_wx, stride_wy, stride_wz), (stride_oi, stride_ox, stride_oy, stride_oz)
    # Columns of a tile: all, or those of whole channels.
    STEP: tl.constexpr = BLOCK_M // TAPS * TAPS if RUN_O else BLOCK_M
    tiles_m = tl.cdiv(columns, STEP)
    spans = tl.cdiv(tiles_m, tiles)
    # Neighbouring programs write neighbouring memory.
    span = pid // blocks % spans if RUN_O or ROWS_CLOSER_O else pid % spans
    k = pid % blocks if RUN_O or ROWS_CLOSER_O else pid // spans % blocks
    pid_b = (pid // (spans * blocks)).to(tl.int64)

    block_ptr = dealing_ptr + k * _FIELDS
    channel, channels = tl.load(block_ptr), tl.load(block_ptr + 1)
    own, row, held = tl.load(block_ptr + 2), tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    pair = tl.load(block_ptr + 10)
    if ALIGNED:
        channel, channels = tl.multiple_of(channel, 16), tl.multiple_of(channels, 16)
        row, held = tl.multiple_of(row, 16), tl.multiple_of(held, 16)
    single = channels > 2 * own + held
    key = mix_key(tl.load(seed_ptr + pid_b).to(tl.uint64, bitcast=True), tl.full((), STREAM, tl.uint64))
    noise, gain = tl.load(scale_ptr + 2 * pid_b) * NOISE_SCALE, tl.load(scale_ptr + 2 * pid_b + 1)
    weight_ptr += pid_b * stride_wb + row.to(tl.int64) * stride_wo
    out_ptr += pid_b * stride_ob + channel.to(tl.int64) * stride_oh

    offs_h = tl.arange(0, BLOCK_H)
    offs_g = tl.arange(0, BLOCK_G)
    offs_s = tl.arange(0, BLOCK_S)
    mask_h = offs_h < channels
    mixing_ptr += (channels - 1) * _SIDE * _SIDE + offs_h  # [BLOCK_H], row 0
    held_ptr = mixing_ptr + 2 * own * _SIDE
    if SHARED or not DELTA:
        mixing_g = tl.load(held_ptr[None, :] + offs_g[:, None] * _SIDE, mask=(offs_g < held)[:, None], other=0.0) * gain
    one_ptrs = mixing_ptr[None, :] + offs_s[:, None] * _SIDE  # [BLOCK_S, BLOCK_H]
    if SHARED:
        group = tl.load(block_ptr + 5)
        low, high = tl.load(block_ptr + 6), tl.load(block_ptr + 7)
        own_low, own_high = tl.load(block_ptr + 8), tl.load(block_ptr + 9)
        u_t, u_d = directions_of(row + offs_g, low, high, ACC)
        along_t, along_d = tl.sum(mixing_g * u_t[:, None], 0), tl.sum(mixing_g * u_d[:, None], 0)  # [BLOCK_H]
        one = tl.load(mixing_ptr, mask=mask_h & (own > 0), other=0.0) * gain
        two = tl.load(mixing_ptr + _SIDE, mask=mask_h & (own > 0), other=0.0) * gain
        odd = mask_h & single & (not DELTA)  # the odd extra channel meets zeros in second
        last = tl.load(mixing_ptr + (channels - 1) * _SIDE, mask=odd, other=0.0) * gain * noise
        twin_t, twin_d = (one + two) * -_HALF, (one - two) * -_HALF
        mixing_s = _stack(offs_s[:, None], along_t[None, :], along_d[None, :], twin_t[None, :], twin_d[None, :], last[None, :])
        twin_noise = tl.where(pairs > 0, noise * _TURN, 0.0)
        taken = tl.where(pairs > 0, 1.0, 2.0)
    else:
        one = tl.load(one_ptrs, mask=(offs_s < own)[:, None], other=0.0)
        two = tl.load(one_ptrs + own * _SIDE, mask=(offs_s < own)[:, None], other=0.0)
        if DELTA:
            mixing_s = (one - two) * gain * noise
        else:
            odd = single & (offs_s == own)
            last = tl.load(one_ptrs + (channels - 1 - own) * _SIDE, mask=odd[:, None], other=0.0)
            mixing_s = (one + two + last) * gain * noise

    rows = offs_g.to(INDEX) * stride_wo
    out_rows = offs_h.to(INDEX) * stride_oh
    if RUN_O:
        run_channel, run_row, run_place, run_index = run_of(BLOCK_M, BLOCK_H, TAPS)
        run_offsets = run_channel.to(INDEX) * stride_oi + run_place.to(INDEX) * stride_oz
        run_columns = tl.where((run_row < channels) & (run_channel < STEP // TAPS), run_channel * TAPS, 2147483647)
    for step in range(0, tl.minimum(tiles, tiles_m - span * tiles)):
        first = (span * tiles + step) * STEP
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < tl.minimum(columns, first + STEP)
        base, places, inside = locate(offs_m, first, mask_m, SIZE, start, extent, weight_strides, UNIFORM_W, INDEX)
        if DELTA:
            acc = tl.zeros((BLOCK_M, BLOCK_H), dtype=ACC)
            if (first // TAPS < row + held) & ((first + STEP - 1) // TAPS >= row):
                at = offs_m // TAPS - row  # row of G in this block
                unit_ptrs = held_ptr[None, :] + at[:, None] * _SIDE
                acc = tl.load(unit_ptrs, mask=(inside & (at >= 0) & (at < held))[:, None], other=0.0) * gain
        else:
            tile_g = load_tile(weight_ptr + base, places, inside, rows, offs_g < held, ROWS_CLOSER_W)  # [BLOCK_M, BLOCK_G]
            acc = tl.dot(tile_g.to(ACC), mixing_g, input_precision=PRECISION, out_dtype=ACC)
        if SHARED:
            if DELTA:
                channel_out = tl.where(inside, offs_m // TAPS, -1)
                sum_t, sum_d = directions_of(channel_out, low, high, ACC)
                own_t, own_d = directions_of(channel_out, own_low, own_high, ACC)
            else:
                sum_ptrs = sums_ptr + (pid_b * groups + group) * 2 * columns + offs_m
                own_ptrs = sums_ptr + (pid_b * groups + k) * 2 * columns + offs_m
                has_pair = inside & (own > 0)
                sum_t = tl.load(sum_ptrs, mask=inside, other=0.0)
                sum_d = tl.load(sum_ptrs + columns, mask=inside, other=0.0)
                own_t = tl.load(own_ptrs, mask=has_pair, other=0.0)
                own_d = tl.load(own_ptrs + columns, mask=has_pair, other=0.0)
            twins = noise_row(key, offs_m, group).to(ACC) * twin_noise
            t = -taken * sum_t if DELTA else twins - taken * sum_t  # the twins' sum in first, their difference in second
            d = twins - taken * sum_d if DELTA else -taken * sum_d
            odd_one = noise_row(key, offs_m, pairs).to(ACC)
            tile_s = _stack(offs_s[None, :], t[:, None], d[:, None], own_t[:, None], own_d[:, None], odd_one[:, None])
        else:
            tile_s = noise_rows(key, offs_m, pair + offs_s).to(ACC)  # [BLOCK_M, BLOCK_S]
        acc = tl.dot(tile_s, mixing_s, acc, input_precision=PRECISION, out_dtype=ACC)
        if RUN_O:
            run_ptr = out_ptr + (first // TAPS).to(tl.int64) * stride_oi
            store_run(run_ptr, acc, run_index, run_offsets, run_columns < columns - first)
        else:
            base, places, _ = locate(offs_m, first, mask_m, SIZE, (0, 0, 0), SIZE, out_strides, UNIFORM_O, INDEX)
            store_tile(out_ptr + base, acc, places, mask_m, out_rows, mask_h, ROWS_CLOSER_O)


@triton.jit
def _stack(index, a, b, c, d, e):
    """a to e where `index` is 0 to 4, and zero."""
    lower = tl.where(index == 0, a, tl.where(index == 1, b, tl.where(index == 2, c, 0.0)))
    return tl.where(index == 3, d, tl.where(index == 4, e, lower))


@triton.jit(do_not_specialize=["groups"])
def sums_kernel(
    weight_ptr,
    dealing_ptr,
    sums_ptr,
    columns,
    groups,
    start_x,
    start_y,
    start_z,
    k_x,
    k_y,
    k_z,
    stride_wb,
    stride_wo,
    stride_wi,
    stride_wx,
    stride_wy,
    stride_wz,
    SIZE_X: tl.constexpr,
    SIZE_Y: tl.constexpr,
    SIZE_Z: tl.constexpr,
    UNIFORM_W: tl.constexpr,
    ROWS_CLOSER_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The two sums u_t^T G and u_d^T G of each group, (B, groups, 2, columns)."""
    add_rows(
        tl.program_id(0),
        weight_ptr,
        dealing_ptr,
        sums_ptr,
        columns,
        groups,
        (start_x, start_y, start_z),
        (k_x, k_y, k_z),
        (stride_wb, stride_wo, stride_wi, stride_wx, stride_wy, stride_wz),
        (SIZE_X, SIZE_Y, SIZE_Z),
        UNIFORM_W,
        ROWS_CLOSER_W,
        WIDE,
        BLOCK_M,
        BLOCK_R,
    )


@triton.jit
def add_rows(
    pid,  # among the programs of this weight
    weight_ptr,
    dealing_ptr,
    sums_ptr,
    columns,
    groups,
    start,
    extent,
    strides_w,  # b, o, i, x, y, z
    SIZE: tl.constexpr,
    UNIFORM_W: tl.constexpr,
    ROWS_CLOSER_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What one program does: a tile of columns of the two sums of a group."""
    stride_wb, stride_wo, stride_wi, stride_wx, stride_wy, stride_wz = strides_w
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles_m = tl.cdiv(columns, BLOCK_M)
    group = pid // tiles_m % groups
    pid_b = (pid // (tiles_m * groups)).to(tl.int64)
    low, high = tl.load(dealing_ptr + group * _FIELDS + 8), tl.load(dealing_ptr + group * _FIELDS + 9)
    weight_ptr += pid_b * stride_wb

    first = pid % tiles_m * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    strides = (stride_wi, stride_wx, stride_wy, stride_wz)
    base, places, inside = locate(offs_m, first, offs_m < columns, SIZE, start, extent, strides, UNIFORM_W, INDEX)
    rows = offs_r.to(INDEX) * stride_wo
    weight_ptr += base
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    for step in range(0, tl.cdiv(high - low, BLOCK_R)):
        row = low + step * BLOCK_R
        row_ptr = weight_ptr + row.to(tl.int64) * stride_wo
        total += load_tile(row_ptr, places, inside, rows, row + offs_r < high, ROWS_CLOSER_W).to(ACC)
    even = offs_r % 2 == 0  # as counted from `low` too: BLOCK_R is even
    u_t, u_even = directions_of(low, low, high, ACC)
    _, u_odd = directions_of(low + 1, low, high, ACC)
    sum_t = tl.sum(total, 1) * u_t
    sum_d = tl.sum(total * tl.where(even, u_even, u_odd)[None, :], 1)
    sums_ptr += (pid_b * groups + group) * 2 * columns
    tl.store(sums_ptr + offs_m, sum_t, mask=offs_m < columns)
    tl.store(sums_ptr + columns + offs_m, sum_d, mask=offs_m < columns)
