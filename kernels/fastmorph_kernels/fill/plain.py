"""The same in plain PyTorch, one dimension after the other, for CPUs without the interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import noise
from ..support import accumulator
from .table import BITS, CONSTANT, MIRRORED, OLD, Growth, Numbers

_MASK = 2**BITS - 1


def fill_torch(out: Tensor, source: Tensor, growth: Growth, words: Tensor, factors: Sequence[float]) -> None:
    """Fill `out` from a source; `factors` are the scale and the value of each dimension."""
    value = source
    for given in growth.dimensions:  # as noise counts them
        word = _words(given, words)
        old = word >> 2 * BITS == OLD
        order = torch.zeros(source.shape[given.dim], dtype=torch.int64)
        order[word[old] >> BITS & _MASK] = word[old] & _MASK
        value = value.index_select(given.dim, order)
    for n, given in enumerate(growth.dimensions):
        word = _words(given, words)
        kind, row = word >> 2 * BITS, word >> BITS & _MASK
        grown = _select(value, given.dim, torch.where(kind == OLD, row, 0))
        if given.shares >= 0:
            grown = _share(grown, value, given, growth.first, words, factors[2 * n])
        if given.drawn:
            sizes = list(value.shape)
            sizes[given.dim] = given.drawn
            drawn = _noise(sizes, growth.first, 1, given.key, factors[2 * n], value.dtype)[0]
            for before, constant in zip(growth.dimensions[:n] if given.leads else (), factors[1::2], strict=False):
                if before.follows:
                    other = _words(before, words)
                    twin = torch.where(other >> 2 * BITS == MIRRORED, other >> BITS & _MASK, torch.arange(before.size))
                    drawn = _finish(drawn.index_select(before.dim, twin), before, other >> 2 * BITS, constant)
            drawn = _select(drawn, given.dim, torch.where((kind == OLD) | (kind == CONSTANT), 0, word & _MASK))
            grown = torch.where(_along(kind == OLD, given.dim, grown), grown, drawn)
        value = _finish(grown, given, kind, factors[2 * n + 1])
    out.copy_(value)


def _words(given: Numbers, words: Tensor) -> Tensor:
    return words[given.words : given.words + given.size]


def _along(values: Tensor, dim: int, like: Tensor) -> Tensor:
    return values.view([-1 if other == dim else 1 for other in range(like.ndim)])


def _select(value: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries at some indices; zeros where there is none to select."""
    if value.shape[dim]:
        return value.index_select(dim, index)
    return value.new_zeros([len(index) if at == dim else size for at, size in enumerate(value.shape)])


def _finish(value: Tensor, given: Numbers, kind: Tensor, constant: float) -> Tensor:
    """With mirrored entries times their sign, and with constants."""
    if given.sign < 0:
        value = torch.where(_along(kind == MIRRORED, given.dim, value), -value, value)
    return value.masked_fill(_along(kind == CONSTANT, given.dim, value), constant)


def _share(value: Tensor, before: Tensor, given: Numbers, first: int, words: Tensor, scale: float) -> Tensor:
    """Divided, and with noise on top that sums to zero over copies."""
    wide, dtype = accumulator(value.dtype), value.dtype
    divisor, balance = words[given.shares : given.shares + 2 * given.size].view(-1, 2).T
    value = (value.to(wide) / _along(divisor.to(dtype), given.dim, value).to(wide)).to(dtype)
    if given.copies:
        drawn = _noise(list(before.shape), first, given.copies, given.key, scale / given.copies, dtype)
        total = torch.zeros_like(drawn[0], dtype=wide)
        for copy in drawn:
            total += copy.to(wide)
        mean = (total / given.copies).to(dtype)
        for number, copy in enumerate(drawn):
            added = value + (copy - mean).index_select(given.dim, balance.clamp_min(0) & _MASK)
            held = (balance >= 0) & (balance >> BITS == number)
            value = torch.where(_along(held, given.dim, value), added, value)
    return value


def _noise(sizes: Sequence[int], first: int, copies: int, key: int, scale: float, dtype: torch.dtype) -> Tensor:
    """(copies, *sizes): noise, counted through one dimension first, then through the copies."""
    order = ([] if first < 0 else [first]) + [dim for dim in range(len(sizes)) if dim != first]
    counted = [sizes[dim] for dim in order]
    behind = int(first >= 0)
    counted.insert(behind, copies)
    values = torch.empty(counted, dtype=dtype)
    noise.fill(values.view(-1), key % 2**64, 0, scale)
    return values.movedim(behind, 0).permute(0, *(1 + order.index(dim) for dim in range(len(sizes))))
