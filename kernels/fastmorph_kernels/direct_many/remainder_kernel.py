"""Triton kernels for what pairs of kernels of unlike sizes leave of their weights, estimated from random sums of channels.

    residual = |S (G - F2 * F1) T| / |G|        S and T add up output and input channels, with random signs

To compose costs C_out * C_in * C_hid products, more than a closed form does. Sums of channels, a few on each side, leave the
square of what is left right on average (the count sketch of Charikar, Chen and Farach-Colton 2002). Channel c of a side goes to
sum c % 8 with a sign that is bit c % 8 of word c // 8 of a stream (`noise.signs`); a side of few channels stays as it is.

`sketch_kernel` adds up weights and factors in one pass over each, and squares and the largest magnitude of the weights.
`product_kernel` composes the sketches of the factors, which are small, by parts of their hidden channels. `end_kernel` adds up
the parts and takes them from the weight's. All in float64, in an order that the sizes of a problem alone decide.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..groups import load_sizes, row_of
from ..tile import product_tile, program_tile, tile_columns
from ..words import mix_key, word_at
from .table import END_FIELDS, PRODUCT_FIELDS, SKETCH_FIELDS

_SKETCH_FIELDS, _PRODUCT_FIELDS = tl.constexpr(SKETCH_FIELDS), tl.constexpr(PRODUCT_FIELDS)
_END_FIELDS = tl.constexpr(END_FIELDS)


@triton.jit(do_not_specialize=["begin", "rows", "steps"])
def sketch_kernel(
    like_ptr,  # says of which dtype the addresses are
    table_ptr,
    scratch_ptr,
    begin,
    rows,
    steps,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Some entries (row, column, tap) of a sketch, from a part of the terms."""
    pid = tl.program_id(0)
    row_ptr = table_ptr + begin
    row_ptr += row_of(row_ptr, pid, rows, steps, _SKETCH_FIELDS) * _SKETCH_FIELDS
    local = pid - tl.load(row_ptr).to(tl.int32)
    stat_place = tl.load(row_ptr + 3)
    height, sums_h, width = load_sizes(row_ptr + 4)
    sums_w, parts, part_terms = load_sizes(row_ptr + 7)
    taps_x, taps_y, taps_z = load_sizes(row_ptr + 10)
    taps = taps_x * taps_y * taps_z
    entries = sums_h * sums_w * taps
    blocks = tl.cdiv(entries, BLOCK_E)
    part, pid_b = local // blocks % parts, (local // (blocks * parts)).to(tl.int64)

    offs_e = local % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    row, column, tap = offs_e // (sums_w * taps), offs_e // taps % sums_w, offs_e % taps  # [BLOCK_E]
    places = row.to(tl.int64) * tl.load(row_ptr + 14) + column.to(tl.int64) * tl.load(row_ptr + 15)
    places += (tap // (taps_y * taps_z)).to(tl.int64) * tl.load(row_ptr + 16)
    places += (tap // taps_z % taps_y).to(tl.int64) * tl.load(row_ptr + 17) + (tap % taps_z).to(tl.int64) * tl.load(
        row_ptr + 18
    )
    source_ptr = tl.load(row_ptr + 1).to(like_ptr.dtype) + pid_b * tl.load(row_ptr + 13)
    step_h, step_w = sums_h * tl.load(row_ptr + 14), sums_w * tl.load(row_ptr + 15)

    terms_w = tl.cdiv(width, sums_w)
    end = tl.minimum((part + 1) * part_terms, tl.cdiv(height, sums_h)) * terms_w
    total = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float64)
    squares = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float64)
    largest = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float64)
    for at in range(part * part_terms * terms_w, end, BLOCK_N):
        term = at + tl.arange(0, BLOCK_N)
        term_h, term_w = term // terms_w, term % terms_w  # [BLOCK_N]
        mask = (term_h[:, None] * sums_h + row[None, :] < height) & (term_w[:, None] * sums_w + column[None, :] < width)
        mask &= (term < end)[:, None] & (offs_e < entries)[None, :]
        ahead = term_h.to(tl.int64) * step_h + term_w.to(tl.int64) * step_w
        value = tl.load(source_ptr + (ahead[:, None] + places[None, :]), mask=mask, other=0.0).to(tl.float64)
        bit = _signs(term_h, sums_h, height)[:, None] >> (row % 8).to(tl.uint32)[None, :]
        bit ^= _signs(term_w, sums_w, width)[:, None] >> (column % 8).to(tl.uint32)[None, :]
        total += tl.where(bit % 2 == 1, -value, value)
        squares += value * value
        largest = tl.maximum(largest, tl.abs(value))
    out_ptr = scratch_ptr + tl.load(row_ptr + 2) + (pid_b * parts + part) * entries
    tl.store(out_ptr + offs_e, tl.sum(total, 0), mask=offs_e < entries)
    if stat_place >= 0:
        stat_ptr = scratch_ptr + stat_place + 2 * local
        tl.store(stat_ptr, tl.sum(squares))
        tl.store(stat_ptr + 1, tl.max(largest))


@triton.jit
def _signs(term, sums, channels):
    """Words whose bit c % 8 says whether channel c is subtracted; zeros where channels stay as they are."""
    stream = mix_key(channels.to(tl.uint64), tl.full((), 0, tl.uint64))
    return tl.where(sums < channels, word_at(stream, term.to(tl.uint32)), tl.full((), 0, tl.uint32))


@triton.jit(do_not_specialize=["begin", "rows", "steps"])
def product_kernel(
    table_ptr,
    scratch_ptr,
    begin,
    rows,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the composition of two sketches, (B, hidden, in, *K1) and (B, hidden, out, *K2), of some hidden channels."""
    pid = tl.program_id(0)
    row_ptr = table_ptr + begin
    row_ptr += row_of(row_ptr, pid, rows, steps, _PRODUCT_FIELDS) * _PRODUCT_FIELDS
    channels_o, hidden, channels_i = load_sizes(row_ptr + 4)
    k1, k2 = load_sizes(row_ptr + 7), load_sizes(row_ptr + 10)
    parts, part_hidden = tl.load(row_ptr + 13).to(tl.int32), tl.load(row_ptr + 14).to(tl.int32)
    size = (k1[0] + k2[0] - 1, k1[1] + k2[1] - 1, k1[2] + k2[2] - 1)
    offsets = size[0] * size[1] * size[2]
    blocks_m, blocks_i = tl.cdiv(channels_o, BLOCK_M), tl.cdiv(channels_i, BLOCK_I)
    local = pid - tl.load(row_ptr).to(tl.int32)
    pid_u, pid_m, pid_i, pid_part = program_tile(local, tl.cdiv(offsets, BLOCK_U), blocks_m, blocks_i)
    taps1, taps2 = k1[0] * k1[1] * k1[2], k2[0] * k2[1] * k2[2]
    part = (pid_part % parts).to(tl.int32)
    before = pid_part // parts * hidden + part * part_hidden  # hidden channels, of all items
    acc = product_tile(
        scratch_ptr + tl.load(row_ptr + 1) + before * channels_i * taps1,
        scratch_ptr + tl.load(row_ptr + 2) + before * channels_o * taps2,
        pid_u,
        pid_m,
        pid_i,
        (channels_o, tl.minimum(part_hidden, hidden - part * part_hidden), channels_i),
        k1,
        k2,
        (0, 0, 0),
        size,
        (channels_i * taps1, taps1, k1[1] * k1[2], k1[2], 1),
        (taps2, channels_o * taps2, k2[1] * k2[2], k2[2], 1),
        tl.float64,
        "ieee",
        False,
        False,
        False,
        BLOCK_M,
        BLOCK_I,
        BLOCK_U,
        BLOCK_K,
    )
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i, n_x, n_y, n_z = tile_columns(pid_i, pid_u, size, BLOCK_I, BLOCK_U)
    columns = offs_i * offsets + (n_x * size[1] + n_y) * size[2] + n_z
    out_ptr = scratch_ptr + tl.load(row_ptr + 3) + pid_part * channels_o * channels_i * offsets
    mask = (offs_m < channels_o)[:, None] & ((offs_i < channels_i) & (n_x < size[0]))[None, :]
    tl.store(out_ptr + (offs_m * channels_i * offsets)[:, None] + columns[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["begin", "rows", "steps", "items"])
def end_kernel(table_ptr, scratch_ptr, told_ptr, exact_ptr, begin, rows, steps, items, BLOCK: tl.constexpr):
    """Of an item what is left, relative to the weight; zero; its weight's largest magnitude; and whether it is exact."""
    pid = tl.program_id(0)
    row_ptr = table_ptr + begin
    row_ptr += row_of(row_ptr, pid, rows, steps, _END_FIELDS) * _END_FIELDS
    pid_b = pid - tl.load(row_ptr)
    parts, weight_parts, programs = load_sizes(row_ptr + 4)
    channels_o, channels_i = tl.load(row_ptr + 7).to(tl.int32), tl.load(row_ptr + 8).to(tl.int32)
    n_x, n_y, n_z = load_sizes(row_ptr + 9)
    k_x, k_y, k_z = load_sizes(row_ptr + 12)
    before_x, before_y, before_z = load_sizes(row_ptr + 15)
    offsets, taps = n_x * n_y * n_z, k_x * k_y * k_z
    entries, weight_entries = channels_o * channels_i * offsets, channels_o * channels_i * taps
    composed_ptr = scratch_ptr + tl.load(row_ptr + 1) + pid_b * parts * entries
    weight_ptr = scratch_ptr + tl.load(row_ptr + 2) + pid_b * weight_parts * weight_entries
    stat_ptr = scratch_ptr + tl.load(row_ptr + 3) + pid_b * programs * 2

    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    largest = tl.zeros((BLOCK,), dtype=tl.float64)
    for at in range(0, entries, BLOCK):
        entry = at + offs
        x, y, z = entry // (n_y * n_z) % n_x - before_x, entry // n_z % n_y - before_y, entry % n_z - before_z
        inside = (entry < entries) & (x >= 0) & (x < k_x) & (y >= 0) & (y < k_y) & (z >= 0) & (z < k_z)
        place = entry // offsets * taps + (x * k_y + y) * k_z + z
        error = tl.zeros((BLOCK,), dtype=tl.float64)
        part_ptr = weight_ptr
        for _ in range(0, weight_parts):
            error += tl.load(part_ptr + place, mask=inside, other=0.0)
            part_ptr += weight_entries
        part_ptr = composed_ptr
        for _ in range(0, parts):
            error -= tl.load(part_ptr + entry, mask=entry < entries, other=0.0)
            part_ptr += entries
        total += error * error
    for at in range(0, programs, BLOCK):
        mask = at + offs < programs
        squares += tl.load(stat_ptr + 2 * (at + offs), mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.load(stat_ptr + 2 * (at + offs) + 1, mask=mask, other=0.0))
    square, most = tl.sum(squares, 0), tl.max(largest, 0)
    residual = tl.sqrt(tl.sum(total, 0)) / tl.where(square == 0.0, 1.0, tl.sqrt(square))
    told_ptr += pid
    tl.store(told_ptr, residual)
    tl.store(told_ptr + items, tl.full((), 0.0, tl.float64))
    tl.store(told_ptr + 2 * items, tl.where(square == square, most, square))  # a maximum overlooks what is no number
    tl.store(exact_ptr + pid, residual <= tl.load(row_ptr + 18).to(tl.float64, bitcast=True))
