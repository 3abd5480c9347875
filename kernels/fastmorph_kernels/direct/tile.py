"""What the kernels of the closed form share: noise by logical index, places in memory, loads and stores along memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..words import mix_key, noise_at


@triton.jit
def noise_rows(key, columns, rows):
    """Noise under a draw's key in some rows [R] and columns [M], below 2^32: [M, R] float32, yet to be multiplied by its scale.

    Each row is a stream, counted through columns; a value is half of a word, so that two neighbours make the same one.
    """
    streams = mix_key(mix_key(key, rows.to(tl.uint64)), tl.full((), 0, tl.uint64))  # [R]
    return noise_at(streams[None, :], (columns.to(tl.uint32) // 2)[:, None], (columns % 2 == 1)[:, None])


@triton.jit
def noise_row(key, columns, row):
    """One row of such noise, [M] float32."""
    return tl.sum(noise_rows(key, columns, row + tl.arange(0, 1)), 1)


@triton.jit
def locate(columns, first, mask, size, start, extent, strides, UNIFORM: tl.constexpr, INDEX: tl.constexpr):
    """Where columns (channel, x, y, z) from `first` on, counted through taps of `size`, lie in a tensor.

    It has taps of `extent` from `start` on. UNIFORM: these are all, and each column is strides[3] behind the last.

    Returns the offset of the first column's channel, offsets from there [BLOCK_M], and the mask, less what is outside.
    """
    if UNIFORM:
        base = first.to(tl.int64) * strides[3]
        offsets = (columns - first).to(INDEX) * strides[3]
    else:
        taps: tl.constexpr = size[0] * size[1] * size[2]
        z = columns % size[2] - start[2]
        y = columns // size[2] % size[1] - start[1]
        x = columns // (size[2] * size[1]) % size[0] - start[0]
        channel = first // taps
        base = channel.to(tl.int64) * strides[0]
        mask &= (x >= 0) & (x < extent[0]) & (y >= 0) & (y < extent[1]) & (z >= 0) & (z < extent[2])
        offsets = (columns // taps - channel).to(INDEX) * strides[0] + x.to(INDEX) * strides[1]
        offsets += y.to(INDEX) * strides[2] + z.to(INDEX) * strides[3]
    return base, offsets, mask


@triton.jit
def directions_of(row, low, high, TYPE: tl.constexpr):
    """u_t and u_d at rows of G, zero outside the group [low, high), which is empty or has two rows or more."""
    size = tl.maximum(high - low, 2).to(TYPE)
    odds = tl.maximum((high - low) // 2, 1).to(TYPE)
    evens = size - odds
    inside = (row >= low) & (row < high)
    value = tl.where((row - low) % 2 == 0, tl.sqrt(odds / (evens * size)), -tl.sqrt(evens / (odds * size)))
    return tl.where(inside, 1.0 / tl.sqrt(size), 0.0), tl.where(inside, value, 0.0)


@triton.jit
def load_tile(ptr, columns, mask_m, rows, mask_r, ROWS_CLOSER: tl.constexpr):
    """A tile [BLOCK_M, BLOCK_R] from `ptr` + offsets of columns + offsets of rows; zeros outside."""
    if ROWS_CLOSER:
        tile = tl.load(ptr + (columns[:, None] + rows[None, :]), mask=mask_m[:, None] & mask_r[None, :], other=0.0)
    else:
        tile = tl.load(ptr + (rows[:, None] + columns[None, :]), mask=mask_r[:, None] & mask_m[None, :], other=0.0)
        tile = tl.trans(tile)
    return tile


@triton.jit
def store_tile(ptr, tile, columns, mask_m, rows, mask_r, ROWS_CLOSER: tl.constexpr):
    """Store a tile [BLOCK_M, BLOCK_R], rounded, at `ptr` + offsets of columns + offsets of rows."""
    tile = tile.to(ptr.dtype.element_ty)
    if ROWS_CLOSER:
        tl.store(ptr + (columns[:, None] + rows[None, :]), tile, mask=mask_m[:, None] & mask_r[None, :])
    else:
        tl.store(ptr + (rows[:, None] + columns[None, :]), tl.trans(tile), mask=mask_r[:, None] & mask_m[None, :])


# Where rows and taps are one run of memory for each channel, (row, tap), as hidden channels are in a second kernel, no power
# of two divides the 9 taps of a row evenly among threads, and stores would fill a half of each sector that they touch. There a
# tile has whole channels, passes through shared memory as a list, and is stored in the order of memory.


@triton.jit
def run_of(M: tl.constexpr, R: tl.constexpr, TAPS: tl.constexpr):
    """For elements of a tile in the order of memory: their channel, row, (row, tap), and place in the list of `store_run`."""
    element = tl.arange(0, M * R)
    channel, rest = element // (R * TAPS), element % (R * TAPS)
    row, tap = rest // TAPS, rest % TAPS
    # Four rows of a column lie together: the banks of shared memory are then used evenly.
    return channel, row, rest, row // 4 * (4 * M) + (channel * TAPS + tap) * 4 + row % 4


@triton.jit
def store_run(ptr, tile, index, offsets, mask):
    """Store a tile [BLOCK_M, BLOCK_R], rounded, in the order that `run_of` gives."""
    M: tl.constexpr = tile.shape[0]
    R: tl.constexpr = tile.shape[1]
    tile = tile.to(ptr.dtype.element_ty)
    line = tl.reshape(tl.permute(tl.reshape(tile, (M, R // 4, 4)), (1, 0, 2)), (M * R,))
    tl.store(ptr + offsets, tl.gather(line, index, 0), mask=mask)
