"""Launches for closed forms of many weights, of one dtype on one device: a table for all, then one launch a step and class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configs import launch_options
from ..direct.launch import SCALES_BLOCK, aligned, blocks_of, settings_of, sums_settings_of
from ..direct.mixing import dealing_table, groups_of, mixing_table
from ..direct.op import Factor, factors_of, sample_of
from ..support import accumulator, six_dimensional, three
from .kernel import direct_many_kernel, scales_many_kernel, sums_many_kernel
from .remainder_kernel import end_kernel, product_kernel, sketch_kernel
from .table import AnyRow, EndRow, FactorRow, Part, ProductRow, ScaleRow, SketchRow, Table, bits

# A program adds up so many terms of a weight's sketch, and composes so many hidden channels, or a few more.
TERMS, HIDDEN = 1024, 256
SKETCH = {"BLOCK_N": 4, "BLOCK_E": 256}
PRODUCT = {"BLOCK_M": 16, "BLOCK_I": 8, "BLOCK_U": 4, "BLOCK_K": 16}
END_BLOCK = 1024
_EVEN = 16


class One(NamedTuple):
    """One weight to split, and where its kernels go."""

    weight: Tensor  # (B, Co, Ci, *K), not empty
    first: Tensor
    second: Tensor
    before: Sequence[int]
    into_first: bool


class Estimate(NamedTuple):
    """How what is left is estimated."""

    sums: int  # of channels on a side; the streams of signs count by 8
    few: int  # channels of a side that are not added up
    limit: float  # what counts as exact


class _Class:
    """Rows of one launch: of what agrees in all that is known when compiling."""

    def __init__(self) -> None:
        self.rows: list[AnyRow] = []
        self.programs: list[int] = []

    def add(self, row: AnyRow, programs: int) -> None:
        self.rows.append(row)
        self.programs.append(programs)


class _Room:
    """Places in memory that is allocated once they are all known."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, count: int) -> int:
        place = self.size
        self.size += -(-count // _EVEN) * _EVEN
        return place


def launch_direct_many(
    ones: Sequence[One], seeds: Sequence[int], told: Tensor, exact: Tensor, density: float, precision: str, estimate: Estimate
) -> None:
    """Fill the kernels of each weight, and what is told of each item; see `direct_many`. Nothing is checked."""
    like = ones[0].weight
    dtype, items = accumulator(like.dtype), len(seeds)
    if dtype == torch.float64 or torch.version.hip is not None:
        precision = "ieee"
    factors = [factors_of((one.first, one.second), one.weight, one.before, density, one.into_first) for one in ones]
    shared = _Room()
    places = [
        shared.take(_sums_of(of_weight, one.first.shape[1])) for one, ((of_weight, _), _) in zip(ones, factors, strict=True)
    ]
    sums = like.new_empty(max(1, shared.size), dtype=dtype)
    scales = like.new_empty((2, items, 2), dtype=dtype)

    table, scale_class, item = Table(), _Class(), 0
    table.numbers.extend(seeds)
    sum_classes: dict[Any, _Class] = {}
    factor_classes: dict[Any, _Class] = {}
    for one, place, (pair, balance) in zip(ones, places, factors, strict=True):
        batch, hidden, held = len(one.weight), one.first.shape[1], one.weight.shape[1 if one.into_first else 2]
        sample = sample_of(six_dimensional(one.weight))
        numbers = bits(1.0 / max(1, sample[0].numel()), *balance)
        scale_class.add(ScaleRow(0, sample.data_ptr(), tuple(sample.shape[1:]), sample.stride(), numbers), batch)
        dealing = dealing_table(hidden, held, like.device).data_ptr()
        address = sums.data_ptr() + place * sums.element_size()
        groups = groups_of(hidden, held)
        for number, factor in enumerate(pair):
            if factor.given is not None and groups:
                _add_sums(sum_classes, factor, sums, dealing, address, groups)
            where = (item, 2 * (number * items + item))
            _add_factor(factor_classes, factor, hidden, held, dealing, address, where)
        item += batch
    scratch_room = _Room()
    sketches, products, ends = _Class(), _Class(), _Class()
    for one in ones:
        _add_remainder(one, estimate, scratch_room, sketches, products, ends)
    scratch = like.new_empty(scratch_room.size, dtype=torch.float64)

    def part_of(rows: _Class) -> Part:
        return table.add(rows.rows, rows.programs)

    scale_part, sum_parts = part_of(scale_class), {key: part_of(rows) for key, rows in sum_classes.items()}
    factor_parts = {key: part_of(rows) for key, rows in factor_classes.items()}
    sketch_part, product_part, end_part = part_of(sketches), part_of(products), part_of(ends)
    on_device = table.upload(like.device)
    mixing, options = mixing_table(dtype, like.device), {"num_warps": 4, "enable_fp_fusion": True}

    scales_many_kernel[(items,)](like, on_device, scales, *_place(scale_part), items, BLOCK=SCALES_BLOCK, **options)
    for (constants, config), part in sum_parts.items():
        sums_many_kernel[(part.programs,)](like, sums, on_device, *_place(part), **dict(constants), **launch_options(config))
    for (constants, config), part in factor_parts.items():
        direct_many_kernel[(part.programs,)](
            like,
            mixing,
            on_device,
            scales,
            *_place(part),
            PRECISION=precision,
            **dict(constants),
            **launch_options(config),
        )
    sketch_kernel[(sketch_part.programs,)](like, on_device, scratch, *_place(sketch_part), **SKETCH, **options)
    product_kernel[(product_part.programs,)](on_device, scratch, *_place(product_part), **PRODUCT, **options)
    end_kernel[(items,)](on_device, scratch, told, exact, *_place(end_part), items, BLOCK=END_BLOCK, **options)


def _place(part: Part) -> tuple[int, int, int]:
    return part.begin, part.rows, part.rows.bit_length()


def _sums_of(factor: Factor, hidden: int) -> int:
    """Numbers in the sums of a weight whose blocks share pairs."""
    assert factor.given is not None
    return len(factor.out) * groups_of(hidden, factor.given.shape[1]) * 2 * math.prod(factor.out.shape[2:])


def _known(address: int, batch: int, strides: Sequence[int], *, run: bool) -> tuple[int, bool]:
    """Which stride is 1 (see the kernel), and whether an address and the other strides that matter are even."""
    item, row, channel, *_, z = strides
    one = 1 if z == 1 else 2 if row == 1 else 0
    other = channel if run else row if one == 1 else z if one == 2 else _EVEN
    return one, address % _EVEN == 0 and other % _EVEN == 0 and (batch == 1 or item % _EVEN == 0)


def _add_sums(classes: dict[Any, _Class], factor: Factor, like: Tensor, dealing: int, address: int, groups: int) -> None:
    weight, out = factor.given, factor.out
    assert weight is not None
    size, columns = out.shape[3:], math.prod(out.shape[2:])
    source, constants, programs, config = sums_settings_of(weight, len(weight), groups, columns, size)
    strides = (*weight.stride()[:2], *source.strides)
    one, even = _known(weight.data_ptr(), len(weight), strides, run=False)
    constants |= {"ONE_W": one, "EVEN": even and columns % _EVEN == 0}
    row = FactorRow(
        first=0,
        addresses=(weight.data_ptr(), dealing, address, 0),
        items=(0, 0),
        counts=(columns, 0, groups, 0, 0),
        start=tuple(factor.start),
        extent=tuple(weight.shape[3:]),
        strides_w=strides,
        strides_o=(0,) * 6,
    )
    classes.setdefault((tuple(constants.items()), config), _Class()).add(row, programs)


def _add_factor(
    classes: dict[Any, _Class],
    factor: Factor,
    hidden: int,
    held: int,
    dealing: int,
    address: int,
    items: tuple[int, int],
) -> None:
    settings = settings_of(factor.given, factor.out, held)
    given = factor.out if factor.given is None else factor.given  # of a unit matrix no memory is read
    strides_w, strides_o = (*given.stride()[:2], *settings.source.strides), (*factor.out.stride()[:2], *settings.into.strides)
    batch = len(factor.out)
    one_w, even_w = _known(given.data_ptr(), batch, strides_w, run=False)
    one_o, even_o = _known(factor.out.data_ptr(), batch, strides_o, run=settings.constants["RUN_O"])
    if factor.given is None:
        one_w, even_w = 0, True
    even = even_w and even_o and settings.columns % _EVEN == 0 and aligned(hidden, held)
    constants = settings.constants | {"ONE_W": one_w, "ONE_O": one_o, "EVEN": even}
    row = FactorRow(
        first=0,
        addresses=(given.data_ptr(), dealing, address, factor.out.data_ptr()),
        items=items,
        counts=(settings.columns, settings.blocks, groups_of(hidden, held), (hidden - held) // 2, settings.tiles),
        start=tuple(factor.start),
        extent=settings.extent,
        strides_w=strides_w,
        strides_o=strides_o,
    )
    classes.setdefault((tuple(constants.items()), settings.config), _Class()).add(row, settings.programs)


def _add_remainder(one: One, estimate: Estimate, room: _Room, sketches: _Class, products: _Class, ends: _Class) -> None:
    """Rows for what one weight's kernels leave of it, and their places in the scratch memory."""
    weight, first, second = (six_dimensional(x) for x in (one.weight, one.first, one.second.transpose(1, 2)))
    batch, co, ci = weight.shape[:3]
    hidden = first.shape[1]
    out, into = (estimate.sums if n > estimate.few else n for n in (co, ci))

    def sketch(kernel: Tensor, rows: int, columns: int, *, measured: bool) -> tuple[int, int, int, int]:
        """Place and parts of the sketch of a kernel; place and number of an item's sums of squares."""
        terms = blocks_of(kernel.shape[1], rows)
        part_terms = max(1, TERMS // blocks_of(kernel.shape[2], columns))
        parts, entries = blocks_of(terms, part_terms), rows * columns * math.prod(kernel.shape[3:])
        programs = parts * blocks_of(entries, SKETCH["BLOCK_E"])
        place, stats = room.take(batch * parts * entries), room.take(2 * batch * programs) if measured else -1
        sizes = (kernel.shape[1], rows, kernel.shape[2], columns, parts, part_terms)
        row = SketchRow(0, kernel.data_ptr(), (place, stats), sizes, tuple(kernel.shape[3:]), kernel.stride())
        sketches.add(row, batch * programs)
        return place, parts, stats, programs

    weight_place, weight_parts, stats, programs = sketch(weight, out, into, measured=True)
    first_place, second_place = (sketch(x, hidden, n, measured=False)[0] for x, n in ((first, into), (second, out)))
    k1, k2 = tuple(first.shape[3:]), tuple(second.shape[3:])
    frame = tuple(a + b - 1 for a, b in zip(k1, k2, strict=True))
    parts, offsets = blocks_of(hidden, HIDDEN), math.prod(frame)
    place = room.take(batch * parts * out * into * offsets)
    tiles = blocks_of(out, PRODUCT["BLOCK_M"]) * blocks_of(into, PRODUCT["BLOCK_I"])
    products.add(
        ProductRow(0, (first_place, second_place, place), (out, hidden, into), k1, k2, (parts, HIDDEN)),
        batch * parts * tiles * blocks_of(offsets, PRODUCT["BLOCK_U"]),
    )
    ends.add(
        EndRow(
            first=0,
            places=(place, weight_place, stats),
            counts=(parts, weight_parts, programs),
            channels=(out, into),
            frame=frame,
            extent=tuple(weight.shape[3:]),
            before=tuple(three(one.before)),
            limit=bits(estimate.limit)[0],
        ),
        batch,
    )
