"""How tensors grow, as an operator takes it and as its kernel reads it: a table of numbers on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..noise import SCALE

OLD, DRAWN, MIRRORED, CONSTANT = range(4)
"""What an index of a grown dimension holds."""

BITS = 30  # of a place, or a row, in the word of an index; its kind stands above both
HEAD = 4  # numbers before sizes and strides in a row: addresses of source and output, first tile, entries
FIELDS = 12  # numbers of a dimension before its strides

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Dimension:
    """One dimension of a tensor that grows from n to m indices. Grown dimensions are filled one after the other.

    Noise is that of `noise`. It is counted through what the tensor is at that time: dimensions filled before have their new
    sizes, those that come later their old ones, and the one that is being filled has as many indices as draw noise.

    Attributes:
        dim: which dimension.
        kind: (m,), OLD, DRAWN, MIRRORED or CONSTANT, for each new index.
        place: (m,), of an OLD index the one whose entries it has; of a DRAWN or MIRRORED one its number among those that draw.
        row: (m,), of an OLD index the number by which dimensions filled before count their noise along this one; of a MIRRORED
            one the index that it mirrors.
        drawn: how many indices draw noise.
        key: of its stream.
        scale: what its noise is multiplied by.
        sign: 1 or -1, what MIRRORED entries are multiplied by.
        value: of CONSTANT entries.
        leads: whether it is the last one, and mirrors and constants of the others are to hold in the noise that it draws.
        follows: whether those of this one do, in what another one draws.
        divisor: (m,), what OLD entries are divided by; None: nothing.
        balance: (m,), c * 2^30 + j where an OLD index gets noise on top, as copy c of `copies` with place j in the stream: that
            less its mean over the copies; else -1. None: none do.
        copies: how many there are.
    """

    dim: int
    kind: Ints
    place: Ints
    row: Ints
    drawn: int = 0
    key: int = 0
    scale: float = 0.0
    sign: int = 1
    value: float = 0.0
    leads: bool = False
    follows: bool = False
    divisor: Ints | None = None
    balance: Ints | None = None
    copies: int = 0


class Numbers(NamedTuple):
    """What an operator takes of a dimension, besides words."""

    dim: int
    size: int  # m
    drawn: int
    key: int  # as a signed number
    sign: int
    leads: int
    follows: int
    copies: int
    words: int  # where the words of its indices begin
    shares: int  # where pairs of its divisors and balance begin; -1: it has neither


class Growth(NamedTuple):
    """The same of a tensor: which dimension noise is counted through first, -1 for their order, and those that grow."""

    first: int
    dimensions: tuple[Numbers, ...]


def flat(grown: Iterable[tuple[int, Sequence[Dimension]]]) -> tuple[Tensor, list[int], list[float]]:
    """Words (int64), numbers, and scales and values of tensors, each with what is first and its dimensions."""
    words: list[Ints] = []
    numbers: list[int] = []
    factors: list[float] = []
    end = 0
    for first, dimensions in grown:
        numbers += (first, len(dimensions))
        for given in dimensions:
            size = len(given.kind)
            words.append((given.kind << 2 * BITS) | (given.row << BITS) | given.place)
            begin, end, shares = end, end + size, -1
            if given.divisor is not None or given.balance is not None:
                divisor = np.ones(size, np.int64) if given.divisor is None else given.divisor
                balance = np.full(size, -1, np.int64) if given.balance is None else given.balance
                words.append(np.stack([divisor, balance], 1).ravel())
                shares, end = end, end + 2 * size
            key = given.key - 2**64 if given.key >= 2**63 else given.key
            flags = (given.sign, int(given.leads), int(given.follows), given.copies)
            numbers += Numbers(given.dim, size, given.drawn, key, *flags, begin, shares)
            factors += (given.scale, given.value)
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *words])), numbers, factors


def growths(numbers: Sequence[int]) -> list[Growth]:
    """What `flat` has made numbers of."""
    found, at, width = [], 0, len(Numbers._fields)
    while at < len(numbers):
        first, count = numbers[at : at + 2]
        at += 2
        found.append(Growth(first, tuple(Numbers(*numbers[at + k * width : at + (k + 1) * width]) for k in range(count))))
        at += count * width
    return found


def shape_of(source: Tensor, growth: Growth) -> list[int]:
    """The new shape."""
    sizes = list(source.shape)
    for dimension in growth.dimensions:
        sizes[dimension.dim] = dimension.size
    return sizes


class Places(NamedTuple):
    """Of one output: its dimensions, those merged along which every map goes on evenly, and the strides of the maps."""

    sizes: list[int]
    source: list[int]  # strides
    grown: list[int]  # which dimension each of the grown ones is
    noise: list[list[int]]  # strides of each one's noise
    balance: list[list[int]]
    steps: list[int]  # from a copy to the next in each one's balancing noise
    reach: int  # no offset is as large


def places_of(source: Tensor, growth: Growth) -> Places:
    """How entries of an output are counted in memory and in noise."""
    new, noise, balance, steps = shape_of(source, growth), [], [], []
    reach = max(math.prod(new), 1 + sum((n - 1) * stride for n, stride in zip(source.shape, source.stride(), strict=True)))
    now = list(source.shape)
    for given in growth.dimensions:
        rest = [*now[: given.dim], given.drawn, *now[given.dim + 1 :]]
        strides, total = _counted(rest, growth.first)
        noise.append(strides if given.drawn else [0] * len(now))
        others, whole = _counted(now, growth.first)
        step = whole if growth.first < 0 else others[growth.first]
        if growth.first >= 0:
            others[growth.first] *= given.copies
        balance.append(others if given.copies else [0] * len(now))
        steps.append(step)
        reach = max(reach, total, whole * given.copies)
        now[given.dim] = given.size
    maps = [list(source.stride()), *noise, *balance]
    grown = {given.dim for given in growth.dimensions}
    kept: list[int] = []  # the last dimension of each run that is merged, the last run first
    sizes: list[int] = []
    for dim in reversed(range(len(new))):
        if kept and not {dim, kept[-1]} & grown and all(m[dim] == m[kept[-1]] * sizes[-1] for m in maps):
            sizes[-1] *= new[dim]
        else:
            kept.append(dim)
            sizes.append(new[dim])
    kept.reverse()
    merged = [[strides[dim] for dim in kept] for strides in maps]
    count = len(growth.dimensions)
    where = [kept.index(given.dim) for given in growth.dimensions]
    return Places(sizes[::-1], merged[0], where, merged[1 : 1 + count], merged[1 + count :], steps, reach)


def _counted(sizes: Sequence[int], first: int) -> tuple[list[int], int]:
    """Strides of a count through all entries, one dimension first, and how many there are."""
    strides, step = [0] * len(sizes), 1
    for dim in sorted(range(len(sizes)), key=lambda dim: dim if dim != first else -1, reverse=True):
        strides[dim] = step
        step *= sizes[dim]
    return strides, step


def factor_of(scale: float, dtype: torch.dtype) -> float:
    """What a value is multiplied by, as a number of the dtype that products are taken in."""
    return SCALE * scale if dtype == torch.float64 else float(np.float32(SCALE * scale))


class Table(NamedTuple):
    """What a launch takes."""

    numbers: Tensor  # rows, then words; int64
    rows: int
    tiles: int
    dims: int  # of a row
    grown: int  # dimensions of a row
    shared: bool  # whether any entry is divided or balanced
    wide: bool  # whether offsets need more than 32 bits


def table_of(
    sources: Sequence[Tensor],
    out: Sequence[Tensor],
    words: Tensor,
    numbers: Sequence[int],
    factors: Sequence[float],
    block: int,
) -> Table:
    """The table for outputs, none of them empty, in tiles of `block` entries."""
    every = growths(numbers)
    places = [places_of(source, growth) for source, growth in zip(sources, every, strict=True)]
    kept = [k for k, tensor in enumerate(out) if tensor.numel()]
    dims = max(len(places[k].sizes) for k in kept)
    grown = max(len(places[k].grown) for k in kept)
    width = HEAD + 2 * dims + grown * (FIELDS + 2 * dims)
    starts = np.cumsum([0, *(len(growth.dimensions) for growth in every)])
    rows: list[int] = []
    tiles, shared = 0, False
    for k in kept:
        at, growth = places[k], every[k]
        front = [0] * (dims - len(at.sizes))
        rows += (sources[k].data_ptr(), out[k].data_ptr(), tiles, out[k].numel())
        rows += [1] * len(front) + at.sizes + front + at.source
        # Those that a row does not have come first: they are as large as before, and so leave an index as it is.
        rows += [0, -1, -1, 1, *[0] * (FIELDS - 4 + 2 * dims)] * (grown - len(growth.dimensions))
        for n, given in enumerate(growth.dimensions):
            scale, value = factors[2 * (starts[k] + n) : 2 * (starts[k] + n) + 2]
            balance = factor_of(scale / max(1, given.copies), out[k].dtype)
            bits = np.array([factor_of(scale, out[k].dtype), balance, value]).view(np.int64).tolist()
            shares = given.shares + width * len(kept) if given.shares >= 0 else -1
            rows += (len(front) + at.grown[n], given.words + width * len(kept), shares, given.sign)
            rows += (given.leads, given.follows, given.copies, at.steps[n], given.key, *bits)
            rows += front + at.noise[n] + front + at.balance[n]
            shared |= given.shares >= 0
        tiles += math.ceil(out[k].numel() / block)
    both = torch.cat([torch.tensor(rows, dtype=torch.int64, device=words.device), words])
    wide = max(places[k].reach for k in kept) + block > 2**31
    return Table(both, len(kept), tiles, dims, grown, shared, wide)
