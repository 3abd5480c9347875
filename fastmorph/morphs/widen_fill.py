"""The weights of new channels: noise that cancels, zeros, or copies of old channels.

What makes channels (rows of weights, biases, norms, scales) and what sums over them (columns of weights) get:

- pair: copies come in twins, each of the first half with one of the second. Their rows are equal, [S; S], so that their
  activations are, whatever is elementwise; their columns are [R | -R], so that the twins cancel. Both sides are full and
  trainable. The last one of an odd number has columns of zeros.
- zero (Wei et al. 2016): the side with fewer entries is zero, the other noise; the columns are zero wherever an activation
  makes something of zero.
- duplicate (Net2Wider: Chen et al., "Net2Net", 2016): new rows are those of old channels, drawn at random, and a channel and
  its copies share its columns, each divided by how many they are (exact up to that division's rounding).

Where a norm over channels allows whole multiples only, rows are copies in all three; columns become W / m + R_j with noise R_j
that sums to zero (pair), W and zeros (zero), or W / m (duplicate).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from fastmorph.equation.randomness import Stream
from fastmorph.graph.coupling import Coupling
from fastmorph.graph.growth import Growth, Layout
from fastmorph.graph.record import Axis, Ints
from fastmorph.morphs.widen_write import Side, write

FILLS = ("pair", "zero", "duplicate")
Map = Callable[[Tensor], Tensor]
_SAMPLE, _LINES = 2**15, 64  # entries, and indices of a dimension, from which the size of a tensor's entries is taken


class Filling:
    """The weights that make a growth exact.

    Args:
        growth: what grows.
        fill: "pair", "zero" or "duplicate".
        noise: what noise is drawn from; each tensor has a stream of its own under it.
    """

    def __init__(self, growth: Growth, fill: str, noise: Stream) -> None:
        self._growth, self._fill, self._noise = growth, fill, noise
        self._record, self._coupling = growth.coupling.record, growth.coupling
        self._reads, self._shifts = self._record.mask("reads"), self._record.mask("shifts")
        self._standardised = self._record.mask("standardised")
        self._reading = {axis.name for axis in self._record.axes if axis.parameter and self._marked(self._reads, axis)}
        self._copied = growth.even or fill == "duplicate"  # whether columns are shared out among copies
        self._donors = _Donors(growth, noise.of("donors")) if growth.given is None and not growth.even else None
        self._zero_rows = fill == "zero" and not growth.even and self._rows_are_fewer() and self._rows_may_be_zero()

    def tensor(self, name: str, old: Tensor) -> tuple[Tensor, Map, Map]:
        """The new parameter or buffer, and the maps that take its first and its squared moments to the new shape."""
        axes = [axis for axis in self._growth.layouts if axis.parameter and axis.name == name]
        axes.sort(key=lambda axis: not self._marked(self._reads, axis))  # columns first: copies of a row have the same noise
        sides = [self._side(axis, old.ndim) for axis in axes]
        noise = self._noise.of(name)
        drawn = any(len(side.drawn) or side.balanced is not None for side in sides)
        new = write(old, sides, noise, _root_mean_square(old) if drawn else 0.0)
        return new, lambda moment: self._moment(moment, axes, noise, 1), lambda moment: self._moment(moment, axes, noise, 2)

    def _side(self, axis: Axis, ndim: int) -> Side:
        layout, reads = self._growth.layouts[axis], self._marked(self._reads, axis)
        makes = axis.name in self._record.outputs and (axis.name in self._reading or ndim == 2)
        noisy = (reads or makes) and not self._copied
        zero = self._fill == "zero" and (
            ((not reads and makes) or self._marked(self._shifts, axis)) if self._zero_rows else reads
        )
        given = self._given(axis, reads)
        if zero:
            return Side(**given, rest=given["fresh"])
        if noisy and self._fill == "pair":
            first, second, alone = _twins(layout)
            standard = reads and self._marked(self._standardised, axis)
            if reads and not standard:
                return Side(**given, drawn=first, mirror=second, rest=alone, paired=True)
            return Side(**given, drawn=np.append(first, alone), mirror=second, paired=True, standard=standard)
        if noisy:
            return Side(**given, drawn=given["fresh"])
        source, shares = self._source(axis, layout)
        shared = reads and self._copied and self._fill != "zero"
        balanced = _places_of_copies(layout) if reads and self._growth.even and self._fill == "pair" else None
        return Side(**given, source=source[given["fresh"]], divisor=shares if shared else None, balanced=balanced)

    def _given(self, axis: Axis, reads: bool) -> dict[str, Any]:
        layout = self._growth.layouts[axis]
        to = np.flatnonzero(layout.copy == 0)
        return {"dim": axis.dim, "reads": reads, "to": to, "of": layout.origin[to], "fresh": np.flatnonzero(layout.copy)}

    def _marked(self, mask: np.ndarray, axis: Axis) -> bool:
        return bool(mask[axis.start : axis.start + axis.size].any())

    def _source(self, axis: Axis, layout: Layout) -> tuple[Ints, Ints]:
        """Of each new index the old one whose entries it takes, and how many take the same."""
        source = layout.origin.copy() if self._donors is None else self._donors.of(axis, layout)
        if self._fill == "pair" and not self._growth.even:
            first, second, _ = _twins(layout)
            source[second] = source[first]
        return source, np.bincount(source)[source]

    def _rows_may_be_zero(self) -> bool:
        return not (self._record.mask("makes_of_zero") & (self._growth.copies > 0)).any()

    def _rows_are_fewer(self) -> bool:
        rows = columns = 0
        for axis, layout in self._growth.layouts.items():
            if axis.parameter and axis.name in self._reading:
                sizes = [other.size for other in self._record.axes if other.name == axis.name and other.parameter]
                entries = int((layout.copy > 0).sum()) * int(np.prod(sizes)) // axis.size
                if self._marked(self._reads, axis):
                    columns += entries
                else:
                    rows += entries
        return rows < columns

    def _moment(self, moment: Tensor, axes: list[Axis], noise: Stream, power: int) -> Tensor:
        """Gradients as they are at birth: old entries keep theirs, equal copies share the gradient of what they copy."""
        # A squared moment of zero would make the first steps too long.
        value = 0.0 if self._copied or power == 1 else float(moment.float().mean())
        return write(moment, [self._moment_side(axis, power, value) for axis in axes], noise, 0.0)

    def _moment_side(self, axis: Axis, power: int, value: float) -> Side:
        reads = self._marked(self._reads, axis)
        given = self._given(axis, reads)
        if not self._copied:
            return Side(**given, rest=given["fresh"], value=value)
        source, shares = self._source(axis, self._growth.layouts[axis])
        return Side(**given, source=source[given["fresh"]], divisor=None if reads else shares**power)


class _Donors:
    """For each copy of a class the class whose entries it takes: one of its kind, at random."""

    def __init__(self, growth: Growth, noise: Stream) -> None:
        coupling = growth.coupling
        self._classes = coupling.classes
        grown = np.unique(coupling.classes[growth.copies > 0])
        counts = growth.copies[grown].astype(np.int64)
        self._starts = np.zeros(len(coupling.classes), np.int64)
        self._starts[grown] = np.cumsum(counts) - counts
        kin, first, size = _kin(coupling, grown)
        self._drawn = kin[np.repeat(first, counts) + noise.below(np.repeat(size, counts))]

    def of(self, axis: Axis, layout: Layout) -> Ints:
        """(new size,): the old index of an axis whose entries each new index takes."""
        classes = self._classes[axis.start : axis.start + axis.size]
        order = np.argsort(classes, kind="stable")
        of_class = np.searchsorted(classes[order], classes)  # where an index's class begins in `order`
        rank = np.empty_like(order)
        rank[order] = np.arange(axis.size)
        rank -= of_class
        source, fresh = layout.origin.copy(), np.flatnonzero(layout.copy)
        origin = layout.origin[fresh]
        donors = self._drawn[self._starts[classes[origin]] + layout.copy[fresh] - 1]
        source[fresh] = order[np.searchsorted(classes[order], donors) + rank[origin]]
        return source


def _kin(coupling: Coupling, classes: Ints) -> tuple[Ints, Ints, Ints]:
    """The classes of the kinds of these, kind by kind, and for each of these where its kind begins and its size."""
    found, first, size, begin = [], np.zeros_like(classes), np.zeros_like(classes), 0
    open_ones = np.ones(len(classes), np.bool_)
    while open_ones.any():
        kin = np.asarray(coupling.kin(int(classes[open_ones.argmax()])))
        same = np.isin(classes, kin)
        first[same], size[same] = begin, len(kin)
        found.append(kin)
        begin += len(kin)
        open_ones &= ~same
    return np.concatenate(found), first, size


def _twins(layout: Layout) -> tuple[Ints, Ints, Ints]:
    """Of the copies of each index the first half, the second half in the same order, and those that are left over."""
    fresh = np.flatnonzero(layout.copy)
    order = fresh[np.lexsort((layout.copy[fresh], layout.key[fresh]))]
    _, starts, counts = np.unique(layout.key[order], return_index=True, return_counts=True)
    rank, half = np.arange(len(order)) - np.repeat(starts, counts), np.repeat(counts // 2, counts)
    first = np.flatnonzero(rank < half)
    first = first[np.argsort(order[first])]
    return order[first], order[first + half[first]], order[rank >= 2 * half]


def _places_of_copies(layout: Layout) -> Ints:
    """(copies + 1, n): where each old index that has copies is, and where these are; all have equally many."""
    held = np.flatnonzero(np.isin(layout.origin, layout.origin[layout.copy > 0]))
    order = held[np.lexsort((layout.copy[held], layout.origin[held]))]
    return order.reshape(-1, int(layout.copy.max()) + 1).T


def _root_mean_square(tensor: Tensor) -> float:
    """Of a sample of its entries; for a tensor of zeros, of the noise that keeps the size of activations.

    Taken on the CPU, in one order, so that it is the same for a tensor on every device.
    """
    sample = tensor
    for dim, count in enumerate(tensor.shape):
        if sample.numel() > _SAMPLE:
            sample = sample[(slice(None),) * dim + (slice(None, None, max(1, count // _LINES)),)]
    size = float(np.sqrt(np.square(sample.double().cpu().numpy()).mean())) if tensor.numel() else 0.0
    return size or (tensor[0].numel() if tensor.ndim else 1) ** -0.5
