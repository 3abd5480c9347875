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

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmorph.elsewhere import values_of
from fastmorph.equation.randomness import Stream
from fastmorph.graph.coupling import Coupling
from fastmorph.graph.growth import Growth, Layout
from fastmorph.graph.record import Axis, Ints, Kind, Record
from fastmorph.morphs.widen_launch import Writing, write_all
from fastmorph.morphs.widen_write import Side
from fastmorph.plan.lineage import Map

FILLS = ("pair", "zero", "duplicate")
_SAMPLE, _LINES = 2**15, 64  # entries, and indices of a dimension, from which the size of a tensor's entries is taken


class Marks:
    """What operators do with the parameters of a record: found once for all that grows on it."""

    def __init__(self, record: Record) -> None:
        kinds: tuple[Kind, ...] = ("reads", "shifts", "standardised")
        self._counts = {kind: np.append(0, np.cumsum(record.mask(kind))) for kind in kinds}
        self.makes_of_zero = record.mask("makes_of_zero")
        self.reading = {axis.name for axis in record.axes if axis.parameter and self.has("reads", axis)}

    def has(self, kind: Kind, axis: Axis) -> bool:
        """Whether some of an axis is marked so."""
        counts = self._counts[kind]
        return bool(counts[axis.start + axis.size] > counts[axis.start])


class Filled(NamedTuple):
    """A tensor that has grown, and the maps that take its first and its squared moments to the new shape."""

    new: Tensor
    linear: Map
    square: Map


class Filling:
    """The weights that make a growth exact.

    Args:
        growth: what grows.
        fill: "pair", "zero" or "duplicate".
        noise: what noise is drawn from; each dimension of each tensor has a stream of its own under it.
        marks: of the growth's record.
        share: whether, with "pair", a copy that has no twin takes the rows of what it copies, W / 2 + R of its columns and
            leaves it W / 2 - R; without, its columns are zeros.
    """

    def __init__(self, growth: Growth, fill: str, noise: Stream, marks: Marks, *, share: bool = False) -> None:
        self.growth, self._share = growth, share
        self._fill, self._noise, self._marks, self._record = fill, noise, marks, growth.coupling.record
        self._copied = growth.even or fill == "duplicate"  # whether columns are shared out among copies
        self._donors = _Donors(growth, noise.of("donors")) if growth.given is None and not growth.even else None
        self._zero_rows = fill == "zero" and not growth.even and self._rows_are_fewer() and self._rows_may_be_zero()

    def sides(self, name: str) -> list[Side]:
        """How each dimension of a parameter or buffer that grows is filled."""
        return [self._side(axis) for axis in self._grown(name)]

    def moment_sides(self, name: str, moment: Tensor, power: int) -> list[Side]:
        """The same for its first or second moments: gradients as they are at birth.

        Old entries keep theirs, equal copies share the gradient of what they copy.
        """
        # A squared moment of zero would make the first steps too long.
        value = 0.0 if self._copied or power == 1 else float(moment.float().mean())
        return [self._moment_side(axis, power, value) for axis in self._grown(name)]

    def _grown(self, name: str) -> list[Axis]:
        return [axis for axis in self._record.parameter(name) if axis in self.growth.layouts]

    def _side(self, axis: Axis) -> Side:
        layout, reads = self.growth.layouts[axis], self._marks.has("reads", axis)
        makes = axis.name in self._record.outputs and (
            axis.name in self._marks.reading or len(self._record.parameter(axis.name)) == 2
        )
        noisy = (reads or makes) and not self._copied
        zero = self._fill == "zero" and (
            ((not reads and makes) or self._marks.has("shifts", axis)) if self._zero_rows else reads
        )
        given = self._given(axis, reads)
        if zero:
            return Side(**given, rest=given["fresh"])
        if noisy and self._fill == "pair":
            first, second, alone = layout.twins
            if self._share and len(alone):
                places = np.empty(len(given["to"]), np.int64)
                places[given["of"]] = given["to"]
                old, source = places[layout.origin[alone]], layout.origin[given["fresh"]]
                if not reads:
                    return Side(**given, drawn=first, mirror=second, source=source, paired=True)
                shares = np.ones(len(layout.origin), np.int64)
                shares[old] = shares[alone] = 2
                both = np.stack([old, alone])
                return Side(**given, drawn=first, mirror=second, source=source, divisor=shares, balanced=both, paired=True)
            standard = reads and self._marks.has("standardised", axis)
            if reads and not standard:
                return Side(**given, drawn=first, mirror=second, rest=alone, paired=True)
            return Side(**given, drawn=np.append(first, alone), mirror=second, paired=True, standard=standard)
        if noisy:
            return Side(**given, drawn=given["fresh"])
        source, shares = self._source(axis, layout)
        shared = reads and self._copied and self._fill != "zero"
        balanced = _places_of_copies(layout) if reads and self.growth.even and self._fill == "pair" else None
        return Side(**given, source=source[given["fresh"]], divisor=shares if shared else None, balanced=balanced)

    def _given(self, axis: Axis, reads: bool) -> dict[str, Any]:
        layout = self.growth.layouts[axis]
        to, fresh = layout.kept, layout.fresh
        noise = self._noise.of(axis.name, axis.dim)
        return {"dim": axis.dim, "reads": reads, "to": to, "of": layout.origin[to], "fresh": fresh, "noise": noise}

    def _source(self, axis: Axis, layout: Layout) -> tuple[Ints, Ints]:
        """Of each new index the old one whose entries it takes, and how many take the same."""
        source = layout.origin.copy() if self._donors is None else self._donors.of(axis, layout)
        if self._fill == "pair" and not self.growth.even:
            first, second, alone = layout.twins
            source[second] = source[first]
            if self._share:
                source[alone] = layout.origin[alone]
        return source, np.bincount(source)[source]

    def _rows_may_be_zero(self) -> bool:
        return not self._marks.makes_of_zero[self.growth.atoms].any()

    def _rows_are_fewer(self) -> bool:
        rows = columns = 0
        for axis, layout in self.growth.layouts.items():
            if axis.parameter and axis.name in self._marks.reading:
                sizes = [other.size for other in self._record.parameter(axis.name)]
                entries = int((layout.copy > 0).sum()) * math.prod(sizes) // axis.size
                if self._marks.has("reads", axis):
                    columns += entries
                else:
                    rows += entries
        return rows < columns

    def _moment_side(self, axis: Axis, power: int, value: float) -> Side:
        reads = self._marks.has("reads", axis)
        given = self._given(axis, reads)
        if not self._copied:
            return Side(**given, rest=given["fresh"], value=value)
        source, shares = self._source(axis, self.growth.layouts[axis])
        return Side(**given, source=source[given["fresh"]], divisor=None if reads else shares**power)


Growing = tuple[Sequence[Filling], str, Tensor]
"""All fillings of a parameter or buffer, which are along other dimensions, its name, and its old values."""


def fill_tensors(tensors: Iterable[Growing], backend: str | None = None) -> list[Filled]:
    """Parameters and buffers as they have grown, each written once.

    Args:
        tensors: those that grow.
        backend: see `decompose`; on a GPU, and by "triton", all of one dtype are written by one launch.
    """
    grown = [(fillings, name, values_of(old)) for fillings, name, old in tensors]
    sides = [_sides_of(fillings, name) for fillings, name, _ in grown]
    scales = iter(root_mean_squares([old for (_, _, old), (_, drawn) in zip(grown, sides, strict=True) if drawn]))
    writings = [
        Writing(old, those, next(scales) if drawn else 0.0) for (_, _, old), (those, drawn) in zip(grown, sides, strict=True)
    ]

    def moment(fillings: Sequence[Filling], name: str, power: int, given: Tensor) -> Tensor:
        sides = _ordered(side for filling in fillings for side in filling.moment_sides(name, given, power))
        return write_all([Writing(given, sides, 0.0)], backend)[0]

    return [
        Filled(new, partial(moment, fillings, name, 1), partial(moment, fillings, name, 2))
        for new, (fillings, name, _) in zip(write_all(writings, backend), grown, strict=True)
    ]


def writing_of(fillings: Sequence[Filling], name: str) -> Callable[[Tensor], Writing]:
    """How the old values of a parameter or buffer become the new ones."""
    sides, drawn = _sides_of(fillings, name)
    return lambda old: Writing(old, sides, root_mean_square(old) if drawn else 0.0)


def _sides_of(fillings: Sequence[Filling], name: str) -> tuple[list[Side], bool]:
    """How its dimensions are filled, and whether any by noise."""
    sides = _ordered(side for filling in fillings for side in filling.sides(name))
    return sides, any(len(side.drawn) or side.balanced is not None for side in sides)


def _ordered(sides: Iterable[Side]) -> list[Side]:
    """Columns first: copies of a row have the same noise in new columns."""
    return sorted(sides, key=lambda side: not side.reads)


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
        source, fresh = layout.origin.copy(), layout.fresh
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


def _places_of_copies(layout: Layout) -> Ints:
    """(copies + 1, n): where each old index that has copies is, and where these are; all have equally many."""
    held = np.flatnonzero(np.isin(layout.origin, layout.origin[layout.copy > 0]))
    order = held[np.lexsort((layout.copy[held], layout.origin[held]))]
    return order.reshape(-1, int(layout.copy.max()) + 1).T


def root_mean_square(tensor: Tensor) -> float:
    """`root_mean_squares` of one tensor."""
    return root_mean_squares([tensor])[0]


def root_mean_squares(tensors: Sequence[Tensor]) -> list[float]:
    """Of a sample of the entries of each; for a tensor of zeros, of the noise that keeps the size of activations.

    Taken on the CPU, in one order, so that it is the same for a tensor on every device; all of one dtype and device
    are copied at once.
    """
    sizes: dict[int, float] = {}
    for kind in {(tensor.device, tensor.dtype) for tensor in tensors}:
        here = [k for k, tensor in enumerate(tensors) if (tensor.device, tensor.dtype) == kind]
        samples = [_sample(tensors[k]) for k in here]
        ends = np.cumsum([len(sample) for sample in samples])
        parts = np.split(torch.cat(samples).cpu().double().numpy(), ends[:-1])
        sizes.update((k, _root_mean_square(part, tensors[k])) for k, part in zip(here, parts, strict=True))
    return [sizes[k] for k in range(len(tensors))]


def _sample(tensor: Tensor) -> Tensor:
    """Some thousand entries at most, (n,)."""
    sample = tensor
    for dim, count in enumerate(tensor.shape):
        if sample.numel() > _SAMPLE:
            sample = sample[(slice(None),) * dim + (slice(None, None, max(1, count // _LINES)),)]
    return sample.flatten()


def _root_mean_square(values: np.ndarray, tensor: Tensor) -> float:
    largest = float(np.abs(values).max(initial=0.0))  # by which squares are numbers, whatever the weights' size is
    size = largest * float(np.sqrt(np.square(values / (largest or 1.0)).sum() / max(1, len(values))))
    return size or max(1, math.prod(tensor.shape[1:])) ** -0.5
