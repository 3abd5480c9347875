"""The rows of the tables that tell kernels of unlike problems, all in one tensor of int64.

Every row begins with its first program. What is an address is one in memory; what is a place counts float64 numbers of the
launches' common scratch memory. Shares and limits are float64, bit by bit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Row = tuple[int, ...]


class ScaleRow(NamedTuple):
    """An item a program: the sample of a weight from which its noise has its spread."""

    first: int
    sample: int  # address
    sizes: Row  # rows, columns, x, y, z
    strides: Row  # b, rows, columns, x, y, z
    balance: Row  # 1 / entries of the sample, and a `Balance`


class FactorRow(NamedTuple):
    """A factor of the closed form, or the sums over rows of a weight that its blocks share."""

    first: int
    addresses: Row  # of the weight, the dealing table, the sums and the factor
    items: Row  # where the seeds are in the table, and where the scales of this factor are in theirs
    counts: Row  # columns, blocks, groups, pairs, tiles of a program
    start: Row
    extent: Row
    strides_w: Row  # b, o, i, x, y, z
    strides_o: Row  # b, h, i, x, y, z


class SketchRow(NamedTuple):
    """A kernel (B, rows, columns, x, y, z) of which rows, columns or both are added up, with random signs.

    A program has some of the entries of the result, and a part of the rows' terms.
    """

    first: int
    source: int  # address
    places: Row  # of the parts of the result, and of a sum of squares and a largest magnitude for each program; -1: not wanted
    sizes: Row  # rows, rows of the result, columns, columns of the result, parts, terms of the rows in a part
    taps: Row
    strides: Row  # b, rows, columns, x, y, z


class ProductRow(NamedTuple):
    """The composition of two sketches, in parts by hidden channels."""

    first: int
    places: Row  # of the sketches of both factors, hidden channels in front, and of the parts
    channels: Row  # out, hidden and in
    k1: Row
    k2: Row
    parts: Row  # how many, and hidden channels of one


class EndRow(NamedTuple):
    """An item a program: what is left of it."""

    first: int
    places: Row  # of the parts of the composition, of those of the weight, of the sums of squares
    counts: Row  # of each of these
    channels: Row  # out and in
    frame: Row
    extent: Row
    before: Row
    limit: int  # residual that counts as exact


SCALE_FIELDS, FACTOR_FIELDS, SKETCH_FIELDS = 1 + 1 + 5 + 6 + 4, 1 + 4 + 2 + 5 + 3 + 3 + 6 + 6, 1 + 1 + 2 + 6 + 3 + 6
PRODUCT_FIELDS, END_FIELDS = 1 + 3 + 3 + 3 + 3 + 2, 1 + 3 + 3 + 2 + 3 + 3 + 3 + 1
AnyRow = ScaleRow | FactorRow | SketchRow | ProductRow | EndRow


class Part(NamedTuple):
    """The rows of one launch, in the table."""

    begin: int
    rows: int
    programs: int


class Table:
    """Numbers for the device, which `upload` brings there by one copy."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def add(self, rows: Sequence[AnyRow], programs: Sequence[int]) -> Part:
        """Append rows, each with its number of programs; `first` is written here."""
        begin, first = len(self.numbers), 0
        for row, count in zip(rows, programs, strict=True):
            self.numbers.append(first)
            for value in row[1:]:
                self.numbers.extend(value) if isinstance(value, tuple) else self.numbers.append(value)
            first += count
        return Part(begin, len(rows), first)

    def upload(self, device: torch.device) -> Tensor:
        """The numbers as int64 on a device; the host does not wait."""
        table = torch.tensor(self.numbers, dtype=torch.int64, device="cpu")
        return (
            table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device, non_blocking=True)
        )


def bits(*values: float) -> Row:
    """Float64 numbers as int64."""
    return struct.unpack(f"={len(values)}q", struct.pack(f"={len(values)}d", *values))
