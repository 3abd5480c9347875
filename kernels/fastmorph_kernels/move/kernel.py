"""Triton kernel that moves the entries of many weights in one launch, as wider layers and larger kernels need it.

    out_k[o, i, t] = scale_o[o] * scale_i[i] * source_k[index_o[o], index_i[i], index_t[t]]      0 where an index is -1

    source_k (O, I, T), index_o (O'), index_i (I'), index_t (T'), scale_o (O'), scale_i (I') -> out_k (O', I', T'), for each k

A network has hundreds of weights, most of them small: a launch for each would cost more than the moves. So one launch takes
a table with a row for each weight, and all indices after those rows. A program owns BLOCK entries of one output in the order
in which they lie in memory, whichever weight they belong to; it finds its row by bisection over the rows' first tiles.
Writes are contiguous, and so are reads wherever an index runs along its source.

A place in an output is the place of its first output channel, in 64 bits, and in 32 bits one within the entries that follow:
divisions of 64 bits would cost more than the memory does. Hence one output channel must have fewer than 2^31 entries.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..configs import launch_options, lookup

# A row of the table: addresses of source and output; first tile; O', I', T'; the source's strides; where the three indices and
# the two scales begin, -1 where there is none.
COLUMNS = 14


@dataclass(frozen=True)
class MoveConfig:
    """Tile size, a power of two, and launch settings."""

    block: int  # entries of an output
    num_warps: int
    num_stages: int


def config_for(like: torch.Tensor) -> MoveConfig:
    """The configuration for tensors like this one."""
    return MoveConfig(**lookup("move", like.dtype, "tile", like.device))


@triton.jit
def _indexed(table_ptr, begin, place, mask):
    """Where in the source a place of the output comes from: entry `place` of the index, or the place itself without one."""
    return tl.where(begin >= 0, tl.load(table_ptr + begin + place, mask=mask & (begin >= 0), other=0), place)


@triton.jit
def _move_kernel(
    like_ptr,  # says of which dtype the addresses are
    table_ptr,
    scales_ptr,
    rows,
    steps,
    SCALED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    low = tl.full((), 0, tl.int32)
    high = low + rows
    for _ in range(0, steps):  # the last row whose first tile is not after this one
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle * COLUMNS + 2) <= pid
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    row_ptr = table_ptr + low * COLUMNS
    source_ptr = tl.load(row_ptr).to(like_ptr.dtype)
    out_ptr = tl.load(row_ptr + 1).to(like_ptr.dtype)
    outputs = tl.load(row_ptr + 3)
    taps = tl.load(row_ptr + 5).to(tl.int32)
    channel = tl.load(row_ptr + 4).to(tl.int32) * taps  # entries of one output channel

    start = (pid - tl.load(row_ptr + 2)) * BLOCK
    first_o = start // channel
    local = (start - first_o * channel).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
    o = first_o + local // channel
    i = (local % channel // taps).to(tl.int64)
    t = (local % channel % taps).to(tl.int64)
    mask = o < outputs
    source_o = _indexed(table_ptr, tl.load(row_ptr + 9), o, mask)
    source_i = _indexed(table_ptr, tl.load(row_ptr + 10), i, mask)
    source_t = _indexed(table_ptr, tl.load(row_ptr + 11), t, mask)
    present = mask & (source_o >= 0) & (source_i >= 0) & (source_t >= 0)
    source_ptr += tl.load(row_ptr + 6) * source_o + tl.load(row_ptr + 7) * source_i + tl.load(row_ptr + 8) * source_t
    value = tl.load(source_ptr, mask=present, other=0.0)
    if SCALED:
        begin_o = tl.load(row_ptr + 12)
        begin_i = tl.load(row_ptr + 13)
        scale_o = tl.load(scales_ptr + begin_o + o, mask=present & (begin_o >= 0), other=1.0)
        scale_i = tl.load(scales_ptr + begin_i + i, mask=present & (begin_i >= 0), other=1.0)
        value = (value.to(scale_o.dtype) * scale_o * scale_i).to(value.dtype)
    tl.store(out_ptr + start + tl.arange(0, BLOCK), value, mask=mask)


def launch_move(
    like: torch.Tensor, table: torch.Tensor, scales: torch.Tensor | None, *, rows: int, tiles: int, config: MoveConfig
) -> None:
    """Fill the outputs that `table` names, which have the dtype of `like`, with `tiles` tiles of `config.block` in all.

    The table, int64, is rows of COLUMNS and the indices; `scales` is float64 for float64 tensors, else float32. Both are
    contiguous, on the device of the tensors. No output is empty.
    """
    _move_kernel[(tiles,)](
        like,
        table,
        like if scales is None else scales,
        rows,
        rows.bit_length(),
        SCALED=scales is not None,
        COLUMNS=COLUMNS,
        BLOCK=config.block,
        **launch_options(config),
    )
