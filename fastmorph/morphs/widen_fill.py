"""The weights of new channels: noise that cancels, zeros, or copies of old channels.

What makes channels (rows of weights, biases, norms, scales) and what sums over them (columns of weights) get:

- pair: copies come in twins. Their rows are equal, S and S, so that their activations are, whatever is elementwise; their
  columns are R and -R, so that the twins cancel. Both sides are full and trainable. The last one of an odd number has columns
  of zeros.
- zero (Wei et al. 2016): the side with fewer entries is zero, the other noise; the columns are zero wherever an activation
  makes something of zero.
- duplicate (Net2Wider: Chen et al., "Net2Net", 2016): new rows are those of old channels, drawn at random, and a channel and
  its copies share its columns, each divided by how many they are (exact up to that division's rounding).

Where a norm over channels allows whole multiples only, rows are copies in all three; columns become W / m + R_j with noise R_j
that sums to zero (pair), W and zeros (zero), or W / m (duplicate).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmorph.graph.growth import Growth, Layout
from fastmorph.graph.record import Axis, Ints

FILLS = ("pair", "zero", "duplicate")
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Side:
    """One grown dimension of a tensor.

    Attributes:
        dim: which.
        layout: where its indices come from.
        source: (new size,), the old index whose entries an index takes unless it gets others.
        shares: (new size,), how many indices have the same source.
        reads: whether the tensor sums over the channels here.
        noisy: whether new entries are noise.
        zero: whether new entries are zero.
        standard: whether the tensor's rows are standardised over these entries.
    """

    dim: int
    layout: Layout
    source: Ints
    shares: Ints
    reads: bool
    noisy: bool
    zero: bool
    standard: bool


class Filling:
    """The weights that make a growth exact.

    Args:
        growth: what grows.
        fill: "pair", "zero" or "duplicate".
        random: a generator on the CPU.
    """

    def __init__(self, growth: Growth, fill: str, random: torch.Generator) -> None:
        self._growth, self._fill, self._random = growth, fill, random
        self._record, self._coupling = growth.coupling.record, growth.coupling
        self._reads, self._shifts = self._record.mask("reads"), self._record.mask("shifts")
        self._standardised = self._record.mask("standardised")
        self._reading = {axis.name for axis in self._record.axes if axis.parameter and self._marked(self._reads, axis)}
        self._donors = self._draw_donors() if growth.given is None and not growth.even else {}
        self._zero_rows = fill == "zero" and not growth.even and self._rows_are_fewer() and self._rows_may_be_zero()

    def tensor(self, name: str, old: Tensor) -> tuple[Tensor, Map, Map]:
        """The new parameter or buffer, and the maps that take its first and its squared moments to the new shape."""
        axes = [axis for axis in self._growth.layouts if axis.parameter and axis.name == name]
        sides = sorted((self._side(axis, old.ndim) for axis in axes), key=lambda side: not side.reads)
        new, scale = old, _root_mean_square(old)
        for side in sides:  # columns first: copies of a row have the same noise among them
            new = self._grown(new, side, scale)
        for side in sides:
            self._cancel(new, side)
        return new, lambda moment: self._moment(moment, sides, 1), lambda moment: self._moment(moment, sides, 2)

    def _side(self, axis: Axis, ndim: int) -> Side:
        layout, reads = self._growth.layouts[axis], self._marked(self._reads, axis)
        makes = axis.name in self._record.outputs and (axis.name in self._reading or ndim == 2)
        noisy = (reads or makes) and not self._growth.even and self._fill != "duplicate"
        zero = self._fill == "zero" and (
            ((not reads and makes) or self._marked(self._shifts, axis)) if self._zero_rows else reads
        )
        source = self._source(axis, layout)
        standard = reads and self._marked(self._standardised, axis)
        return Side(axis.dim, layout, source, np.bincount(source)[source], reads, noisy, zero, standard)

    def _marked(self, mask: np.ndarray, axis: Axis) -> bool:
        return bool(mask[axis.start : axis.start + axis.size].any())

    def _source(self, axis: Axis, layout: Layout) -> Ints:
        source = layout.origin.copy()
        classes = self._coupling.classes[axis.start : axis.start + axis.size]
        for template, donors in self._donors.items():
            own = np.flatnonzero(classes == template)
            for number, donor in enumerate(donors, 1):
                here = np.isin(layout.origin, own) & (layout.copy == number)
                source[here] = np.flatnonzero(classes == donor)[np.searchsorted(own, layout.origin[here])]
        return source

    def _draw_donors(self) -> dict[int, list[int]]:
        """For each class with copies, the class whose entries each copy takes: one of its kind at random, twins the same."""
        drawn: dict[int, list[int]] = {}
        for template in np.unique(self._coupling.classes[self._growth.copies > 0]).tolist():
            kin = self._coupling.kin(template).tolist()
            count = int(self._growth.copies[template])
            picks = torch.randint(len(kin), (count,), generator=self._random).tolist()
            if self._fill == "pair":
                picks = [picks[place - place % 2] for place in range(count)]
            drawn[template] = [kin[pick] for pick in picks]
        return drawn

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

    def _grown(self, tensor: Tensor, side: Side, scale: float) -> Tensor:
        new = tensor.index_select(side.dim, _on(tensor, side.source))
        if side.reads and self._fill != "zero" and (self._growth.even or self._fill == "duplicate"):
            new = new / _along(new, side.dim, side.shares)
        fresh = _on(tensor, np.flatnonzero(side.layout.copy))
        shape = [len(fresh) if dim == side.dim else size for dim, size in enumerate(new.shape)]
        if side.noisy and not side.zero:
            new.index_copy_(side.dim, fresh, self._noise(shape, new, scale))
        elif side.zero:
            new.index_fill_(side.dim, fresh, 0)
        elif side.reads and self._growth.even and self._fill == "pair":
            self._add_balanced_noise(new, side, scale)
        return new

    def _add_balanced_noise(self, new: Tensor, side: Side, scale: float) -> None:
        """Noise on every column, such that what the columns of one channel get sums to zero."""
        count = int(side.layout.copy.max()) + 1
        noise = self._noise([count, *new.narrow(side.dim, 0, new.shape[side.dim] // count).shape], new, scale / count)
        noise -= noise.mean(0)
        order = np.argsort(side.layout.origin, kind="stable")
        for number in range(count):
            here = order[side.layout.copy[order] == number]
            new.index_add_(side.dim, _on(new, here), noise[number])

    def _cancel(self, new: Tensor, side: Side) -> None:
        """Make twins of neighbouring copies: equal where they are made, opposite where they are summed over."""
        if self._fill != "pair" or self._growth.even:
            return
        order = np.lexsort((side.layout.copy, side.layout.key))
        copies = side.layout.copy[order]
        odd = np.flatnonzero(copies % 2 == 1)
        keys = np.append(side.layout.key[order], -1)
        twins = odd[(keys[odd + 1] == keys[odd]) & (np.append(copies, 0)[odd + 1] == copies[odd] + 1)]
        first, second, alone = order[twins], order[twins + 1], order[np.setdiff1d(odd, twins)]
        entries = new.index_select(side.dim, _on(new, first))
        if side.standard:
            mean, entries = self._standard_entries(new, side, entries)
            new.index_copy_(side.dim, _on(new, first), mean + entries)
            new.index_copy_(side.dim, _on(new, second), mean - entries)
            return
        new.index_copy_(side.dim, _on(new, second), -entries if side.reads else entries)
        if side.reads:
            new.index_fill_(side.dim, _on(new, alone), 0)

    def _standard_entries(self, new: Tensor, side: Side, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's mean, and noise of the row's variance: with mean + noise and mean - noise, a row keeps both."""
        old = new.index_select(side.dim, _on(new, np.flatnonzero(side.layout.copy == 0)))
        rest = tuple(range(1, new.ndim))
        mean = old.mean(rest, keepdim=True)
        size = (old - mean).square().mean(rest, keepdim=True).sqrt()
        return mean, entries * (size / entries.square().mean(rest, keepdim=True).sqrt())

    def _noise(self, shape: list[int], like: Tensor, scale: float) -> Tensor:
        """Drawn in float32 on the CPU, so that a seed gives the same everywhere."""
        return (torch.randn(shape, generator=self._random) * scale).to(like)

    def _moment(self, moment: Tensor, sides: list[Side], power: int) -> Tensor:
        """Gradients as they are at birth: old entries keep theirs, equal copies share the gradient of what they copy."""
        copied = self._growth.even or self._fill == "duplicate"
        new = moment
        for side in sides:
            new = new.index_select(side.dim, _on(moment, side.source if copied else side.layout.origin))
            if copied and not side.reads:
                new = new / _along(new, side.dim, side.shares) ** power
            elif not copied:
                # A squared moment of zero would make the first steps too long.
                fresh = float(moment.float().mean()) if power == 2 else 0.0
                new.index_fill_(side.dim, _on(moment, np.flatnonzero(side.layout.copy)), fresh)
        return new


def _root_mean_square(tensor: Tensor) -> float:
    """Of its entries; for a tensor of zeros, of the noise that keeps the size of activations."""
    size = float(tensor.float().square().mean().sqrt()) if tensor.is_floating_point() else 0.0
    return size or (tensor[0].numel() if tensor.ndim else 1) ** -0.5


def _on(tensor: Tensor, indices: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(indices)).to(tensor.device)


def _along(tensor: Tensor, dim: int, values: Ints) -> Tensor:
    return torch.from_numpy(values).to(tensor).view([-1 if other == dim else 1 for other in range(tensor.ndim)])
