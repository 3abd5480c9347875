"""What the kernels of the closed form share: noise by logical index, places in memory, loads and stores along memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# Ten rounds are Philox's usual safety margin; from seven on it passes every known test.
_ROUNDS = tl.constexpr(7)
# 32 random bits as a signed number are uniform noise of this root mean square. It needs none of the transcendental functions
# that normal noise does, and mixing makes it nearly normal.
NOISE_RMS = tl.constexpr(2**31 / 3**0.5)


@triton.jit
def noise_rows(seed, columns, call, stream, ROWS: tl.constexpr):
    """Noise in ROWS rows (a multiple of 16) of some columns, [BLOCK_M] -> [BLOCK_M, ROWS] float32.

    Call q of Philox makes rows q, q + 4, q + 8 and q + 12 of a column, which one thread holds of the left operand of a matrix
    instruction: noise never moves between threads. The counter is the logical place (column, `call` + q, `stream`).
    """
    calls = call + tl.arange(0, ROWS // 4)
    a, b, c, d = tl.philox(seed, columns[:, None], 0, calls[None, :], stream, _ROUNDS)  # [BLOCK_M, ROWS / 4]
    words = tl.join(tl.join(_noise(a), _noise(b)), tl.join(_noise(c), _noise(d)))
    words = tl.permute(tl.reshape(words, (columns.shape[0], ROWS // 16, 4, 2, 2)), (0, 1, 3, 4, 2))
    return tl.reshape(words, (columns.shape[0], ROWS))


@triton.jit
def noise_row(seed, columns, call, stream):
    """One row of such noise, [BLOCK_M] float32."""
    word, _, _, _ = tl.philox(seed, columns, 0, call, stream, _ROUNDS)
    return _noise(word)


@triton.jit
def _noise(word):
    return word.to(tl.int32, bitcast=True).to(tl.float32)


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
