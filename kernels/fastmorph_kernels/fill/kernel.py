"""Triton kernel that writes many grown tensors in one launch, each entry once.

An entry of an output is an entry of its source, noise, negated noise or a constant, then divided by shares and moved by noise
that sums to zero over copies: `table.Dimension` says by which rules. All of them are maps of coordinates that change a
coordinate along a grown dimension alone. So an offset in the source, and the number of a value in a stream of noise, is a sum
over all coordinates as they are, and a correction for each grown dimension.

A network has hundreds of tensors, most of them small: a launch for each would cost more than its writes. So one launch takes
a table with a row for each tensor, and the words of all indices after those rows. A program owns BLOCK entries of one output
in the order in which they lie in memory, whichever tensor they belong to; it finds its row by bisection over the rows' first
tiles. Writes are contiguous, and so are reads wherever an index runs along its source.

Offsets are 32 bits wide, unless a tensor of the launch is so large that they must be WIDE.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..configs import launch_options, lookup
from ..groups import row_of
from ..words import mix_key, noise_at
from .table import BITS, CONSTANT, DRAWN, FIELDS, HEAD, MIRRORED, OLD, Table

_HEAD, _FIELDS, _BITS = tl.constexpr(HEAD), tl.constexpr(FIELDS), tl.constexpr(BITS)
_OLD, _DRAWN, _MIRRORED, _CONSTANT = tl.constexpr(OLD), tl.constexpr(DRAWN), tl.constexpr(MIRRORED), tl.constexpr(CONSTANT)


@dataclass(frozen=True)
class FillConfig:
    """Tile size, a power of two, and launch settings."""

    block: int  # entries of an output
    num_warps: int
    num_stages: int


def config_for(like: torch.Tensor) -> FillConfig:
    """The configuration for tensors like this one."""
    return FillConfig(**lookup("fill", like.dtype, "tile", like.device))


@triton.jit
def _coordinates(offs, sizes_ptr, DIMS: tl.constexpr):
    """Of entries in the order of memory, their coordinates."""
    places = (offs,)
    for back in tl.static_range(1, DIMS):
        size = tl.load(sizes_ptr + DIMS - back).to(offs.dtype)
        places = (places[0] // size, places[0] % size) + places[1:]  # noqa: RUF005  Triton has no stars
    return places


@triton.jit
def _sum(strides_ptr, places):
    """Of coordinates times their strides."""
    total = places[0] * tl.load(strides_ptr).to(places[0].dtype)
    for d in tl.static_range(1, len(places)):
        total += places[d] * tl.load(strides_ptr + d).to(places[0].dtype)
    return total


@triton.jit
def _mixed(key_ptr, number, WIDE: tl.constexpr):
    """The key of a stream, mixed with the high half of a word's number."""
    high = (number >> 33).to(tl.uint64) if WIDE else tl.full((), 0, tl.uint64)
    return mix_key(tl.load(key_ptr).to(tl.uint64, bitcast=True), high)


@triton.jit
def _values(mixed, number, factor, TYPE: tl.constexpr):
    """The values of these numbers in a stream, as the tensor's dtype has them."""
    value = noise_at(mixed, (number >> 1).to(tl.uint32), number % 2 == 1).to(factor.dtype) * factor
    return value.to(TYPE).to(factor.dtype)


@triton.jit
def _quotient(value, divisor):
    """Rounded to nearest, as the quotient of float32 is not by itself."""
    if value.dtype == tl.float32:
        return tl.div_rn(value, divisor)
    else:
        return value / divisor


@triton.jit
def _number(bits_ptr, TYPE: tl.constexpr):
    """A number of the table that stands there as one of float64."""
    return tl.load(bits_ptr).to(tl.float64, bitcast=True).to(TYPE)


@triton.jit(do_not_specialize=["rows", "steps"])
def _fill_kernel(
    like_ptr,  # says of which dtype the addresses are
    table_ptr,
    rows,
    steps,
    DIMS: tl.constexpr,
    GROWN: tl.constexpr,
    SHARED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TYPE: tl.constexpr = like_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if like_ptr.dtype.element_ty == tl.float64 else tl.float32
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    EACH: tl.constexpr = _FIELDS + 2 * DIMS
    COLUMNS: tl.constexpr = _HEAD + 2 * DIMS + GROWN * EACH
    MASK: tl.constexpr = 2**_BITS - 1
    pid = tl.program_id(0)
    row_ptr = table_ptr + row_of(table_ptr + 2, pid, rows, steps, COLUMNS) * COLUMNS
    source_ptr = tl.load(row_ptr).to(like_ptr.dtype)
    out_ptr = tl.load(row_ptr + 1).to(like_ptr.dtype)
    offs = ((pid - tl.load(row_ptr + 2)) * BLOCK).to(INDEX) + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < tl.load(row_ptr + 3)
    places = _coordinates(offs, row_ptr + _HEAD, DIMS)
    strides_ptr = row_ptr + _HEAD + DIMS
    grown_ptr = strides_ptr + DIMS

    # Of each grown dimension the index, and what its word says: how far an old index is from it, in the source and in noise
    # that was counted before, and the same of a twin.
    index, kind, moved, counted = (), (), (), ()
    for s in tl.static_range(GROWN):
        dim = tl.load(grown_ptr + s * EACH).to(tl.int32)
        begin = tl.load(grown_ptr + s * EACH + 1)
        i = places[0]
        for d in tl.static_range(1, DIMS):
            i = tl.where(dim == d, places[d], i)
        word = tl.load(table_ptr + begin + i, mask=mask & (begin >= 0), other=0)
        index += (i,)
        kind += ((word >> 2 * _BITS).to(tl.int32),)
        moved += (tl.where(begin >= 0, (word & MASK).to(INDEX) - i, 0),)
        counted += (tl.where(begin >= 0, ((word >> _BITS) & MASK).to(INDEX) - i, 0),)

    # From the last dimension on: where an entry is no old one, it is known what it is.
    end = tl.full((BLOCK,), -1, tl.int32)  # the dimension that says so
    offset = _sum(strides_ptr, places)
    number = tl.zeros((BLOCK,), INDEX)
    stream = tl.full((BLOCK,), 0, tl.uint64)
    scale, sign, value = tl.zeros((BLOCK,), ACC), tl.full((BLOCK,), 1, ACC), tl.zeros((BLOCK,), ACC)
    noisy = tl.full((BLOCK,), 0, tl.int1)
    for s in tl.static_range(GROWN - 1, -1, -1):
        own_ptr = grown_ptr + s * EACH
        noise_ptr = own_ptr + _FIELDS
        dim = tl.load(own_ptr)
        here = (end < 0) & (kind[s] != _OLD)
        end = tl.where(here, s, end)
        offset += moved[s] * tl.load(strides_ptr + dim).to(INDEX)
        draws = here & (kind[s] != _CONSTANT)
        noisy |= draws
        value = tl.where(here, _number(own_ptr + 11, ACC), value)
        sign = tl.where(here & (kind[s] == _MIRRORED), tl.load(own_ptr + 3).to(ACC), sign)
        place = _sum(noise_ptr, places) + moved[s] * tl.load(noise_ptr + dim).to(INDEX)
        for later in tl.static_range(s + 1, GROWN):
            place += counted[later] * tl.load(noise_ptr + tl.load(grown_ptr + later * EACH)).to(INDEX)
        if s == GROWN - 1:  # what leads heeds the twins of the others
            led = draws & (tl.load(own_ptr + 4) != 0)
            for t in tl.static_range(GROWN - 2, -1, -1):
                other_ptr = grown_ptr + t * EACH
                heeded = led & noisy & (tl.load(other_ptr + 5) != 0)
                twin, constant = heeded & (kind[t] == _MIRRORED), heeded & (kind[t] == _CONSTANT)
                place += tl.where(twin, counted[t], 0) * tl.load(noise_ptr + tl.load(other_ptr)).to(INDEX)
                sign = tl.where(twin, sign * tl.load(other_ptr + 3).to(ACC), sign)
                value = tl.where(constant, _number(other_ptr + 11, ACC), value)
                noisy &= ~constant
        number = tl.where(draws, place, number)
        stream = tl.where(draws, _mixed(own_ptr + 8, place, WIDE), stream)
        scale = tl.where(draws, _number(own_ptr + 9, ACC), scale)
    drawn = _values(stream, number, scale, TYPE)
    value = tl.where(noisy, drawn, value.to(TYPE).to(ACC)) * sign
    old = tl.load(source_ptr + offset, mask=mask & (end < 0), other=0.0).to(ACC)
    value = tl.where(end < 0, old, value)

    if SHARED:
        for s in tl.static_range(GROWN):
            own_ptr = grown_ptr + s * EACH
            balance_ptr = own_ptr + _FIELDS + DIMS
            dim, begin, copies = tl.load(own_ptr), tl.load(own_ptr + 2), tl.load(own_ptr + 6).to(tl.int32)
            passed = mask & (end < s) & (begin >= 0)
            divisor = tl.load(table_ptr + begin + 2 * index[s], mask=passed, other=1).to(ACC).to(TYPE).to(ACC)
            quotient = _quotient(value, divisor)
            value = tl.where(passed, quotient.to(TYPE).to(ACC), value)
            word = tl.load(table_ptr + begin + 2 * index[s] + 1, mask=passed, other=-1)
            number = _sum(balance_ptr, places) + ((word & MASK).to(INDEX) - index[s]) * tl.load(balance_ptr + dim).to(INDEX)
            for later in tl.static_range(s + 1, GROWN):
                number += counted[later] * tl.load(balance_ptr + tl.load(grown_ptr + later * EACH)).to(INDEX)
            total, own = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
            for copy in range(0, copies):
                one = _values(_mixed(own_ptr + 8, number, WIDE), number, _number(own_ptr + 10, ACC), TYPE)
                total += one
                own = tl.where(copy == (word >> _BITS).to(tl.int32), one, own)
                number += tl.load(own_ptr + 7).to(INDEX)
            count = tl.maximum(copies, 1).to(ACC)
            mean = _quotient(total, count)
            added = (own - mean.to(TYPE).to(ACC)).to(TYPE).to(ACC)
            value = tl.where(word >= 0, (value + added).to(TYPE).to(ACC), value)

    tl.store(out_ptr + offs, value.to(TYPE), mask=mask)


def launch_fill(like: torch.Tensor, table: Table, config: FillConfig) -> None:
    """Fill the outputs of a table, which have the dtype of `like`, in tiles of `config.block`; the table is on their device."""
    _fill_kernel[(table.tiles,)](
        like,
        table.numbers,
        table.rows,
        table.rows.bit_length(),
        DIMS=table.dims,
        GROWN=table.grown,
        SHARED=table.shared,
        WIDE=table.wide,
        BLOCK=config.block,
        **launch_options(config, fused=False),  # noise is rounded before it is added up, as everywhere else
    )
