"""On the device: which of the problems of a grouped launch a program works on, from a table on the device.

A network has hundreds of tensors of unlike sizes, most of them small: a launch for each would cost more than its work. So one
launch takes a table of int64, a row for each problem: its first program, addresses, sizes and strides. How many rows there
are differs from call to call, and must not be specialised: each variant would be compiled.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(first_ptr, pid, rows, steps, FIELDS: tl.constexpr):
    """By bisection, the last row whose first program is not behind `pid`.

    first_ptr: the first program of row 0, that of every other row FIELDS behind; ascending. steps: bits of the number of rows.
    """
    low = tl.full((), 0, tl.int32)
    high = low + rows
    for _ in range(0, steps):
        middle = (low + high) // 2
        before = tl.load(first_ptr + middle * FIELDS) <= pid
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def load_sizes(ptr):
    """Three sizes of a row, int32."""
    return tl.load(ptr).to(tl.int32), tl.load(ptr + 1).to(tl.int32), tl.load(ptr + 2).to(tl.int32)
