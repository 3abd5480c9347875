"""Triton kernels for the closed forms of many weights of unlike sizes in one launch: those of `direct`, fed by a table.

What one program does is written in `direct`; here it finds the weight that it works on, by bisection, and reads from the
table what `direct_kernel` gets as arguments. Weights share a launch where they agree in what must be known when compiling.
Strides that are ONE, and whether sizes and the other strides are EVEN, multiples of 16, are known too: loads and stores are
then as wide as where they are arguments.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from ..direct.kernel import add_rows, fill_span
from ..direct.scales_kernel import store_scales, sum_of_squares
from ..groups import load_sizes, row_of
from .table import FACTOR_FIELDS, SCALE_FIELDS

_SCALE_FIELDS, _FACTOR_FIELDS = tl.constexpr(SCALE_FIELDS), tl.constexpr(FACTOR_FIELDS)


@triton.jit(do_not_specialize=["begin", "rows", "steps", "items"])
def scales_many_kernel(
    like_ptr,  # says of which dtype the addresses are
    table_ptr,
    scales_ptr,
    begin,
    rows,
    steps,
    items,
    BLOCK: tl.constexpr,
):
    """For all items (2, items, 2) the root mean square of each factor's noise, and its gain."""
    ACC: tl.constexpr = scales_ptr.dtype.element_ty
    pid = tl.program_id(0)
    table_ptr += begin
    row_ptr = table_ptr + row_of(table_ptr, pid, rows, steps, _SCALE_FIELDS) * _SCALE_FIELDS
    pid_b = pid - tl.load(row_ptr)
    height, width, k_x = load_sizes(row_ptr + 2)
    sizes = (height, width, k_x, tl.load(row_ptr + 5).to(tl.int32), tl.load(row_ptr + 6).to(tl.int32))
    strides = (
        tl.load(row_ptr + 8),
        tl.load(row_ptr + 9),
        tl.load(row_ptr + 10),
        tl.load(row_ptr + 11),
        tl.load(row_ptr + 12),
    )
    sample_ptr = tl.load(row_ptr + 1).to(like_ptr.dtype) + pid_b * tl.load(row_ptr + 7)
    total = sum_of_squares(sample_ptr, sizes, strides, ACC, BLOCK)
    share, least = _number(row_ptr + 13, ACC), _number(row_ptr + 14, ACC)
    ratio, noise = _number(row_ptr + 15, ACC), _number(row_ptr + 16, ACC)
    store_scales(scales_ptr + 2 * pid, 2 * items, tl.sqrt(total * share), least, ratio, noise)


@triton.jit(do_not_specialize=["begin", "rows", "steps"])
def direct_many_kernel(
    like_ptr,
    mixing_ptr,
    table_ptr,
    scales_ptr,
    begin,
    rows,
    steps,
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
    ONE_W: tl.constexpr,
    ONE_O: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The factors of the weights, or the DELTA's."""
    pid = tl.program_id(0)
    row_ptr = table_ptr + begin
    row_ptr += row_of(row_ptr, pid, rows, steps, _FACTOR_FIELDS) * _FACTOR_FIELDS
    columns = tl.load(row_ptr + 7).to(tl.int32)
    if EVEN:
        columns = tl.multiple_of(columns, 16)
    fill_span(
        pid - tl.load(row_ptr).to(tl.int32),
        _address(row_ptr + 1, like_ptr.dtype, EVEN),
        mixing_ptr,
        _address(row_ptr + 2, tl.pointer_type(tl.int32), EVEN),
        _address(row_ptr + 3, mixing_ptr.dtype, EVEN),
        table_ptr + tl.load(row_ptr + 5),
        scales_ptr + tl.load(row_ptr + 6),
        _address(row_ptr + 4, like_ptr.dtype, EVEN),
        columns,
        tl.load(row_ptr + 8).to(tl.int32),
        tl.load(row_ptr + 9).to(tl.int32),
        tl.load(row_ptr + 10).to(tl.int32),
        tl.load(row_ptr + 11).to(tl.int32),
        load_sizes(row_ptr + 12),
        load_sizes(row_ptr + 15),
        _strides(row_ptr + 18, ONE_W, EVEN, False, WIDE),
        _strides(row_ptr + 24, ONE_O, EVEN, RUN_O, WIDE),
        (SIZE_X, SIZE_Y, SIZE_Z),
        DELTA,
        SHARED,
        PRECISION,
        UNIFORM_W,
        UNIFORM_O,
        ROWS_CLOSER_W,
        ROWS_CLOSER_O,
        RUN_O,
        EVEN,
        WIDE,
        BLOCK_M,
        BLOCK_H,
        BLOCK_G,
        BLOCK_S,
    )


@triton.jit(do_not_specialize=["begin", "rows", "steps"])
def sums_many_kernel(
    like_ptr,
    sums_ptr,  # says of which dtype the sums are
    table_ptr,
    begin,
    rows,
    steps,
    SIZE_X: tl.constexpr,
    SIZE_Y: tl.constexpr,
    SIZE_Z: tl.constexpr,
    UNIFORM_W: tl.constexpr,
    ROWS_CLOSER_W: tl.constexpr,
    ONE_W: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The sums over rows that blocks share, of many weights."""
    pid = tl.program_id(0)
    row_ptr = table_ptr + begin
    row_ptr += row_of(row_ptr, pid, rows, steps, _FACTOR_FIELDS) * _FACTOR_FIELDS
    columns = tl.load(row_ptr + 7).to(tl.int32)
    if EVEN:
        columns = tl.multiple_of(columns, 16)
    add_rows(
        pid - tl.load(row_ptr).to(tl.int32),
        _address(row_ptr + 1, like_ptr.dtype, EVEN),
        _address(row_ptr + 2, tl.pointer_type(tl.int32), EVEN),
        _address(row_ptr + 3, sums_ptr.dtype, EVEN),
        columns,
        tl.load(row_ptr + 9).to(tl.int32),
        load_sizes(row_ptr + 12),
        load_sizes(row_ptr + 15),
        _strides(row_ptr + 18, ONE_W, EVEN, False, WIDE),
        (SIZE_X, SIZE_Y, SIZE_Z),
        UNIFORM_W,
        ROWS_CLOSER_W,
        WIDE,
        BLOCK_M,
        BLOCK_R,
    )


@triton.jit
def _address(ptr, TYPE: tl.constexpr, EVEN: tl.constexpr):
    """A pointer that the table holds; EVEN: to 16 bytes."""
    pointer = tl.load(ptr).to(TYPE)
    if EVEN:  # to be said of the pointer: what is known of the number is lost
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _number(ptr, TYPE: tl.constexpr):
    """A float64 number that the table holds."""
    return tl.load(ptr).to(tl.float64, bitcast=True).to(TYPE)


@triton.jit
def _strides(ptr, ONE: tl.constexpr, EVEN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr):
    """Those of the item, rows, channels, x, y and z; ONE: the last (1) or that of rows (2) is 1; see `launch` for EVEN."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    item, row, channel = tl.load(ptr), tl.load(ptr + 1).to(INDEX), tl.load(ptr + 2).to(INDEX)
    x, y, z = tl.load(ptr + 3).to(INDEX), tl.load(ptr + 4).to(INDEX), tl.load(ptr + 5).to(INDEX)
    if EVEN:
        item = tl.multiple_of(item, 16)
        if RUN:
            channel = tl.multiple_of(channel, 16)
        elif ONE == 1:
            row = tl.multiple_of(row, 16)
        elif ONE == 2:
            z = tl.multiple_of(z, 16)
    if ONE == 2:
        row = tl.full((), 1, INDEX)
    elif ONE == 1:
        z = tl.full((), 1, INDEX)
    return item, row, channel, x, y, z
