"""Triton kernel for the scales of both factors: of the noise by its size, and the gains by which their sizes are one."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch", "rows", "columns"])
def scales_kernel(
    sample_ptr,
    spread_ptr,
    balance_ptr,
    scales_ptr,
    batch,
    rows,
    columns,
    k_x,
    k_y,
    k_z,
    stride_b,
    stride_o,
    stride_i,
    stride_x,
    stride_y,
    stride_z,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`Balance.scales`, (2, B, 2), of spreads (B,) that are GIVEN, or else of root mean squares of a sample of the weight.

    A program an item: scales_ptr + 2 * (2, B) entries; balance (4,) float64 holds 1 / entries of the sample and a `Balance`.
    """
    ACC: tl.constexpr = scales_ptr.dtype.element_ty
    pid_b = tl.program_id(0).to(tl.int64)
    if GIVEN:
        spread = tl.load(spread_ptr + pid_b).to(ACC)
    else:
        strides = (stride_o, stride_i, stride_x, stride_y, stride_z)
        total = sum_of_squares(sample_ptr + pid_b * stride_b, (rows, columns, k_x, k_y, k_z), strides, ACC, BLOCK)
        spread = tl.sqrt(total * tl.load(balance_ptr).to(ACC))
    least, ratio, noise = tl.load(balance_ptr + 1), tl.load(balance_ptr + 2), tl.load(balance_ptr + 3)
    store_scales(scales_ptr + 2 * pid_b, 2 * batch, spread, least.to(ACC), ratio.to(ACC), noise.to(ACC))


@triton.jit
def sum_of_squares(ptr, sizes, strides, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Of a tensor (rows, columns, x, y, z)."""
    rows, columns, k_x, k_y, k_z = sizes
    stride_o, stride_i, stride_x, stride_y, stride_z = strides
    total = tl.zeros((BLOCK,), dtype=ACC)
    count = rows * columns * k_x * k_y * k_z
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        z, y, x = place % k_z, place // k_z % k_y, place // (k_z * k_y) % k_x
        line = place // (k_z * k_y * k_x)
        offsets = (line // columns).to(tl.int64) * stride_o + (line % columns).to(tl.int64) * stride_i
        offsets += x.to(tl.int64) * stride_x + y.to(tl.int64) * stride_y + z.to(tl.int64) * stride_z
        value = tl.load(ptr + offsets, mask=place < count, other=0.0).to(ACC)
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def store_scales(ptr, behind, spread, least, ratio, noise):
    """An item's entries of the factor of the weight, and `behind` them those of the delta's."""
    spread = tl.where(spread > 0, spread, least)
    gain = tl.sqrt(ratio / spread)
    tl.store(ptr, spread)
    tl.store(ptr + 1, gain)
    tl.store(ptr + behind, noise)
    tl.store(ptr + behind + 1, 1.0 / gain)
