"""A widened tensor written once: old entries, noise, its negative, zeros or shares, by blocks that stay in a CPU's cache.

A block is a range of one dimension, the leading one; inside it one grown dimension is filled after the other. Where the indices
of a dimension come in runs, as they mostly do, entries are copied by slices, and no index is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastmorph.equation.randomness import Stream
from fastmorph.graph.record import Ints

_BLOCK = 2**19  # entries of a block on a CPU
_RUN = 16  # mean length from which on runs are copied one by one
Place = slice | Tensor


def _none() -> Ints:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Side:
    """One grown dimension of a tensor, and what its new indices get.

    Attributes:
        dim: which dimension.
        reads: whether the tensor sums over it, so that twins are to cancel; else they are to be equal.
        to: (old size,), where old entries go, and
        of: (old size,), their indices before.
        fresh: all other indices.
        noise: what noise is drawn from; an entry gets the same whatever the blocks are.
        source: (len(fresh),), the old indices whose entries they get; None: they get noise or `value`.
        drawn: those of `fresh` that get noise of their own.
        mirror: those that get the noise of `drawn`, from its first on, negated where the dimension is read.
        rest: those that get `value`.
        value: see `rest`.
        paired: whether `mirror` and `rest` hold for noise that comes with another dimension, too.
        divisor: (new size,), what entries are divided by; None: nothing.
        balanced: (copies + 1, n), indices that get noise on top that sums to zero over each column; None: none do.
        standard: whether `drawn` and `mirror` get mean + noise and mean - noise of each row's old entries, in their size.
    """

    dim: int
    reads: bool
    to: Ints
    of: Ints
    fresh: Ints
    noise: Stream
    source: Ints | None = None
    drawn: Ints = field(default_factory=_none)
    mirror: Ints = field(default_factory=_none)
    rest: Ints = field(default_factory=_none)
    value: float = 0.0
    paired: bool = False
    divisor: Ints | None = None
    balanced: Ints | None = None
    standard: bool = False

    @property
    def size(self) -> int:
        """The new size."""
        return len(self.to) + len(self.fresh)


def write(old: Tensor, sides: Sequence[Side], scale: float) -> Tensor:
    """The new tensor, contiguous, of the dtype and on the device of `old`.

    Args:
        old: the old one, any shape.
        sides: those that are read first. Where they meet, the last one decides.
        scale: root mean square of the noise.
    """
    new = old.new_empty([{side.dim: side.size for side in sides}.get(dim, size) for dim, size in enumerate(old.shape)])
    lead, first = leading(old, sides)
    before, after = (old[None], new[None]) if first < 0 else (old.movedim(first, 0), new.movedim(first, 0))
    inner = [_Inner(side, side.dim + (side.dim < first or first < 0), scale, old) for side in sides if side is not lead]
    step = max(1, _BLOCK // max(1, after[0].numel())) if old.device.type == "cpu" else max(1, len(after))
    if lead is None:
        for rows in _ranges(len(after), step):
            _spread(before[rows], after[rows], inner, rows.start)
    else:
        _write_kept(before, after, lead, inner, step)
        _write_fresh(after, lead, inner, step, scale)
    return new


def leading(old: Tensor, sides: Sequence[Side]) -> tuple[Side | None, int]:
    """The side whose rows are written by themselves, and the dimension that blocks are ranges of; -1 where all are in one."""
    if not sides[-1].reads:
        return sides[-1], sides[-1].dim
    return None, next((dim for dim in range(old.ndim) if all(side.dim != dim for side in sides)), -1)


def _write_kept(before: Tensor, after: Tensor, lead: Side, inner: Sequence[_Inner], step: int) -> None:
    for rows in _ranges(len(lead.to), step):
        to = _place(lead.to[rows], after)
        out = _target(after, to)
        _spread(_take(before, 0, _place(lead.of[rows], after)), out, inner, rows.start)
        if lead.divisor is not None:
            out.div_(_along(out, 0, lead.divisor[lead.to[rows]]))
        _put(after, to, out)


def _write_fresh(after: Tensor, lead: Side, inner: Sequence[_Inner], step: int, scale: float) -> None:
    if lead.source is not None:
        where = np.empty_like(lead.to)
        where[lead.of] = lead.to
        for rows in _ranges(len(lead.fresh), step):
            copied = _take(after, 0, _place(where[lead.source[rows]], after))
            _put(after, _place(lead.fresh[rows], after), copied)
    for rows in _ranges(len(lead.drawn), step):
        to = _place(lead.drawn[rows], after)
        out = lead.noise.fill(_target(after, to), scale, rows.start * math.prod(after.shape[1:]))
        for side in inner:
            side.cancel(out)
        _put(after, to, out)
        twins = lead.mirror[rows]
        _put(after, _place(twins, after), out[: len(twins)])
    for rows in _ranges(len(lead.rest), step):
        _fill(after, 0, _place(lead.rest[rows], after), lead.value)


def _spread(given: Tensor, out: Tensor, inner: Sequence[_Inner], row: int) -> None:
    """Fill a block of rows, from number `row` on, from what is there of them."""
    if not inner:
        out.copy_(given)
    for number, side in enumerate(inner, 1):
        shape = [side.side.size if dim == side.dim else size for dim, size in enumerate(given.shape)]
        into = out if number == len(inner) else given.new_empty(shape)
        side.spread(given, into, row)
        given = into


class _Inner:
    """A side inside blocks, with its moves on their device."""

    def __init__(self, side: Side, dim: int, scale: float, like: Tensor) -> None:
        self.side, self.dim, self._scale = side, dim, scale
        numbers = np.arange(side.size)
        self._kept = _moves(side.to, side.of, like)
        self._copied = [] if side.source is None else _moves(side.fresh, side.source, like)
        self._drawn, self._mirror, self._rest = (_moves(to, numbers, like) for to in (side.drawn, side.mirror, side.rest))
        self._divisor: Tensor | None = None
        self._balanced = [_moves(to, numbers, like) for to in ([] if side.balanced is None else side.balanced)]

    def spread(self, given: Tensor, out: Tensor, row: int) -> None:
        """Fill `out` from a block in which this dimension has its old size."""
        divisor = self._whole_divisor(out)
        _move(given, out, self.dim, self._kept, divisor)
        _move(given, out, self.dim, self._copied, divisor)
        if self._balanced:
            count = len(self._balanced)
            noise = self.side.noise.tensor((len(given), count, *given.shape[1:]), given, self._scale / count, row)
            wide = noise.double() if noise.dtype == torch.float64 else noise.float()
            total = torch.zeros_like(wide[:, 0])
            for number in range(count):  # in this order everywhere
                total += wide[:, number]
            noise -= (total / count).to(noise.dtype)[:, None]
            for number, moves in enumerate(self._balanced):
                _add(noise[:, number], out, self.dim, moves)
        if self._drawn:
            self._finish(out, self._draw(out, row))
        for to, _ in self._rest:
            _fill(out, self.dim, to, self.side.value)

    def _draw(self, out: Tensor, row: int) -> Tensor:
        """Noise for a block of rows from number `row` on, put where it goes."""
        to, _ = self._drawn[0]
        shape = [len(self.side.drawn) if dim == self.dim else size for dim, size in enumerate(out.shape)]
        if len(self._drawn) == 1 and isinstance(to, slice):
            return self.side.noise.fill(_take(out, self.dim, to), self._scale, row * math.prod(shape[1:]))
        noise = self.side.noise.tensor(shape, out, self._scale, row)
        _move(noise, out, self.dim, self._drawn)
        return noise

    def _whole_divisor(self, out: Tensor) -> Tensor | None:
        """The divisor of a row, in one run of memory."""
        if self.side.divisor is not None and self._divisor is None:
            self._divisor = _along(out, self.dim, self.side.divisor)[:1].expand(1, *out.shape[1:]).contiguous()
        return self._divisor

    def cancel(self, out: Tensor) -> None:
        """Let what stands in a block of fresh rows cancel, where twins are to."""
        if self.side.paired:
            if self._drawn:
                self._finish(out, torch.cat([_take(out, self.dim, to) for to, _ in self._drawn], self.dim))
            for to, _ in self._rest:
                _fill(out, self.dim, to, self.side.value)

    def _finish(self, out: Tensor, noise: Tensor) -> None:
        """The other twins, from noise that stands in its places."""
        if self.side.standard:
            mean, noise = self._standard(out, noise)
            _move(mean + noise, out, self.dim, self._drawn)
            _move(mean - noise, out, self.dim, self._mirror)
        else:
            _move(noise, out, self.dim, self._mirror, sign=-1 if self.side.reads else 1)

    def _standard(self, out: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's mean, and noise of the row's variance: with mean + noise and mean - noise, a row keeps both."""
        old = torch.cat([_take(out, self.dim, to) for to, _ in self._kept], self.dim)
        rest = tuple(range(1, out.ndim))
        mean = old.mean(rest, keepdim=True)
        size = (old - mean).square().mean(rest, keepdim=True).sqrt()
        return mean, noise * (size / noise.square().mean(rest, keepdim=True).sqrt())


# --- moves along one dimension ------------------------------------------------------------------------------------------------


def _ranges(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _place(indices: Ints, like: Tensor) -> Place:
    """As a slice where they are a run."""
    if len(indices) and (np.diff(indices) == 1).all():
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return torch.from_numpy(np.ascontiguousarray(indices)).to(like.device, non_blocking=True)


def _moves(to: Ints, of: Ints, like: Tensor) -> list[tuple[Place, Place]]:
    """Pairs of places: runs where they are long enough, else all in one. `of` may be longer."""
    of = of[: len(to)]
    cuts = np.flatnonzero((np.diff(to) != 1) | (np.diff(of) != 1)) + 1
    if (len(cuts) + 1) * _RUN > len(to):
        return [(_place(to, like), _place(of, like))] if len(to) else []
    return [(_place(a, like), _place(b, like)) for a, b in zip(np.split(to, cuts), np.split(of, cuts), strict=True)]


def _move(
    value: Tensor, out: Tensor, dim: int, moves: Sequence[tuple[Place, Place]], divisor: Tensor | None = None, sign: int = 1
) -> None:
    """Copy entries of `value` to their places, over those of `divisor` there, or negated, in one pass where places are runs."""
    for to, of in moves:
        part = _take(value, dim, of)
        if not isinstance(to, slice):
            part = part if divisor is None else part / _take(divisor, dim, to)
            out.index_copy_(dim, to, part if sign > 0 else -part)
        elif divisor is not None:
            torch.div(part, _take(divisor, dim, to), out=_take(out, dim, to))
        elif sign < 0:
            torch.neg(part, out=_take(out, dim, to))
        else:
            _take(out, dim, to).copy_(part)


def _add(value: Tensor, out: Tensor, dim: int, moves: Sequence[tuple[Place, Place]]) -> None:
    for to, of in moves:
        part = _take(value, dim, of)
        _ = _take(out, dim, to).add_(part) if isinstance(to, slice) else out.index_add_(dim, to, part)


def _take(tensor: Tensor, dim: int, place: Place) -> Tensor:
    if isinstance(place, slice):
        return tensor.narrow(dim, place.start, place.stop - place.start)
    return tensor.index_select(dim, place)


def _fill(out: Tensor, dim: int, place: Place, value: float) -> None:
    if isinstance(place, slice):
        _take(out, dim, place).fill_(value)
    else:
        out.index_fill_(dim, place, value)


def _target(after: Tensor, place: Place) -> Tensor:
    """Rows themselves, or a block that `_put` brings to their places."""
    return _take(after, 0, place) if isinstance(place, slice) else after.new_empty(len(place), *after.shape[1:])


def _put(after: Tensor, place: Place, rows: Tensor) -> None:
    if not isinstance(place, slice):
        after.index_copy_(0, place, rows)
    elif (into := _take(after, 0, place)).data_ptr() != rows.data_ptr():
        into.copy_(rows)


def _along(tensor: Tensor, dim: int, values: Ints) -> Tensor:
    return torch.from_numpy(values).to(tensor).view([-1 if other == dim else 1 for other in range(tensor.ndim)])
