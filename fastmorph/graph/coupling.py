"""From ties to classes: atoms that can only be copied together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from fastmorph.graph.edges import NO_EDGES, Edges, unique
from fastmorph.graph.ragged import first_alike, positions
from fastmorph.graph.record import Bools, Grouping, Ints, Record

Floats = np.ndarray[Any, np.dtype[np.float64]]


QUERIES = "queries"  # the attribute in whose name query heads that share keys and values are more in every group


class Coupling:
    """The classes of a record's atoms under one way to grow its groups.

    Attributes:
        record: the record.
        wider: attributes of those grouped operators whose groups get wider; there will be more of all others'.
        edges: all ties, each once.
        shared: those left out: of query heads with their keys and values, where every group of queries gets more of them.
        classes: (count,), the smallest atom of each atom's class, by which the class is called.
    """

    def __init__(self, record: Record, wider: frozenset[str]) -> None:
        self.record = record
        self.wider = wider
        self.shared: Edges = NO_EDGES
        found, alike = record.edges, NO_EDGES
        if QUERIES in wider:
            found, self.shared, alike = _queries_apart(record)
        chosen = [grouping.inside if self.is_wider(grouping) else grouping.more for grouping in record.groupings]
        self.edges: Edges = unique(np.concatenate([found, alike, *chosen]))
        self.classes = _components(record.count, self.edges)

    def is_wider(self, grouping: Grouping) -> bool:
        """Whether the grouping's groups get wider, or are no groups that could be more."""
        return grouping.attribute in self.wider or not grouping.attribute

    def of(self, atoms: Tensor) -> Ints:
        """The classes of atoms."""
        return self.classes[atoms.numpy()]

    def mask(self, atoms: Bools) -> Bools:
        """(count,): at a class's name, whether any of its atoms is in the mask."""
        found = np.zeros(self.record.count, np.bool_)
        found[self.classes[atoms]] = True
        return found

    # --- what cannot be copied ------------------------------------------------------------------------------------------------

    @cached_property
    def _causes(self) -> Ints:
        """(count,): at a class's name, what forbids copies: a block's number, then two ranges of axes' numbers; or -1."""
        record, axes, blocks = self.record, len(self.record.axes), len(self.record.blocks)
        found = np.full(record.count, -1)
        reads = record.mask("reads")
        for start, kind in ((blocks + axes, record.mask("bent")), (blocks, record.mask("writes"))):
            atoms = np.flatnonzero(reads & kind)[::-1]  # of several, the first one is to stand
            found[self.classes[atoms]] = start + self.axes[atoms]
        for number in reversed(range(blocks)):
            found[self.classes[record.blocks[number].atoms]] = number
        return found

    @cached_property
    def fixed(self) -> Bools:
        """(count,): at a class's name, whether it cannot be copied; see `cause`."""
        return self._causes >= 0

    def is_blocked(self, classes: Ints) -> bool:
        """Whether some operator forbids copies of some of the classes: not a tie alone, nor that they are an output."""
        axes = len(self.record.axes)
        forbid = np.array([not block.output for block in self.record.blocks] + [False] * axes + [True] * axes + [False])
        return bool(forbid[self._causes[classes]].any())

    def forbidden(self, classes: Ints) -> str | None:
        """Why some of the classes cannot be copied, a clause, besides that they are the model's output; None if they can."""
        for block in self.record.blocks:
            if not block.output and np.isin(self.classes[block.atoms], classes).any():
                return block.cause
        tied = classes[self._causes[classes] >= len(self.record.blocks)]
        return self.cause(int(tied[0])) if len(tied) else None

    def cause(self, cls: int) -> str:
        """Why a class cannot be copied, a clause."""
        blocks = self.record.blocks
        number = int(self._causes[cls])
        if number < len(blocks):
            return blocks[number].cause
        bent, axis = divmod(number - len(blocks), len(self.record.axes))
        name = self.record.axes[axis].name
        if bent:
            return f"{name!r} sums over them by a function of its entries that is not linear"
        return f"{name!r} both makes them and sums over them (a tied weight)"

    def causes(self, classes: Ints) -> list[str]:
        """Why some of the classes cannot be copied, each cause once, in the order of the classes."""
        numbers, places = np.unique(self._causes[classes], return_index=True)
        found = classes[np.sort(places[numbers >= 0])]
        return list(dict.fromkeys(self.cause(cls) for cls in found.tolist()))

    @cached_property
    def normalised(self) -> list[tuple[str, Ints]]:
        """Sets of classes that can only be copied all together, equally often, each with the module that normalises them."""
        lines = [grouping for grouping in self.record.groupings if len(grouping.lines) and self.is_wider(grouping)]
        return [(grouping.module, np.unique(self.classes[grouping.lines[:, 0]])) for grouping in lines]

    @cached_property
    def norms(self) -> Ints:
        """(count,): at a class's name, the number of the last set of `normalised` that holds it; or -1."""
        found = np.full(self.record.count, -1)
        for number, (_, together) in enumerate(self.normalised):
            found[together] = number
        return found

    @cached_property
    def standardised(self) -> Bools:
        """(count,): at a class's name, whether a weight's rows are standardised over some of its atoms."""
        return self.mask(self.record.mask("standardised"))

    # --- what is alike --------------------------------------------------------------------------------------------------------

    @cached_property
    def axes(self) -> Ints:
        """(count,): the number of each atom's axis."""
        return np.repeat(np.arange(len(self.record.axes)), [axis.size for axis in self.record.axes])

    @cached_property
    def order(self) -> Ints:
        """Atoms sorted by class."""
        return np.argsort(self.classes, kind="stable")

    @cached_property
    def names(self) -> Ints:
        """The classes, each once, sorted."""
        return np.flatnonzero(self.classes == np.arange(self.record.count))

    @cached_property
    def lengths(self) -> Ints:
        """How many atoms each of `names` has."""
        return np.bincount(self.classes, minlength=self.record.count)[self.names]

    @cached_property
    def starts(self) -> Ints:
        """(count,): at a class's name, where its atoms begin in `order`."""
        found = np.zeros(self.record.count, np.int64)
        found[self.names] = np.cumsum(self.lengths) - self.lengths
        return found

    @cached_property
    def ranks(self) -> Ints:
        """(count,): how many atoms of its class stand before an atom."""
        found = np.empty_like(self.order)
        found[self.order] = positions(self.lengths)
        return found

    @cached_property
    def places(self) -> Ints:
        """Of each atom the number of its axis (times 2**32) and how many atoms of its class stand before it there."""
        axes, classes = self.axes[self.order], self.classes[self.order]
        same = (np.diff(classes) == 0) & (np.diff(axes) == 0)
        indices = np.arange(len(axes))
        places = np.empty_like(indices)
        places[self.order] = indices - np.maximum.accumulate(np.where(np.append(False, same), 0, indices))
        return places + (self.axes << 32)

    @cached_property
    def signatures(self) -> Ints:
        """See `Record.signatures`."""
        found = self.record.signatures
        for grouping in self.record.groupings:
            for role in grouping.roles if self.is_wider(grouping) else ():
                role.add_to(found)
        return found

    @cached_property
    def kinds(self) -> Ints:
        """(count,): at a class's name, its kind. Classes of one kind differ only in their indices."""
        return kinds(self)[0]

    def members_of(self, classes: Ints) -> tuple[Ints, Ints]:
        """The atoms of classes, one class behind the other, and for each atom the place of its class in `classes`."""
        lengths = self.lengths[np.searchsorted(self.names, classes)]
        return self.order[np.repeat(self.starts[classes], lengths) + positions(lengths)], np.repeat(
            np.arange(len(classes)), lengths
        )

    def kin(self, cls: int) -> Ints:
        """All classes of the same kind as this one, that may be copied too, itself among them."""
        first = self.record.axis_of(cls)
        rivals = np.unique(self.classes[first.start : first.start + first.size])
        return rivals[(self.kinds[rivals] == self.kinds[cls]) & (~self.fixed[rivals] | self.fixed[cls])]


def _queries_apart(record: Record) -> tuple[Edges, Edges, Edges]:
    """Ties but those of query heads with keys and values; the latter; ties of every group's first, second, ... query head."""
    role = np.zeros(record.count, np.int64)  # of heads of keys and values 1, of query heads 2
    for (name, dim), size in record.whole.items():
        axis = record.parameter(name)[dim]
        if len(record.parameter(name)) > 1:  # no bias
            role[axis.start : axis.start + axis.size : size] = 1
    scores = [np.unique(label.numpy()) for _, label in record.scores]
    for queries in scores:
        role[queries[queries >= 0]] = 2
    sides = role[record.edges]
    apart = (sides[:, 0] != sides[:, 1]) & (sides > 0).all(1)
    shared = unique(record.edges[apart])
    group = np.full(record.count, -1)
    reader = np.where(role[shared[:, :1]] == 2, shared, shared[:, ::-1])
    group[reader[::-1, 0]] = reader[::-1, 1]  # its first partner
    alike = [NO_EDGES]
    for queries in scores:
        numbers = group[queries]
        order = queries[np.argsort(numbers, kind="stable")]
        sizes = np.unique(numbers, return_counts=True)[1]
        if len(sizes) > 1 and (sizes == sizes[0]).all() and numbers.min() >= 0:
            lines = order.reshape(len(sizes), -1)
            alike.append(np.stack([lines[:-1].ravel(), lines[1:].ravel()], 1))
    return record.edges[~apart], shared, np.concatenate(alike)


def kinds(*couplings: Coupling, among: Ints | None = None) -> list[Ints]:
    """`Coupling.kinds` of several runs, which can then be compared: where a class's atoms occur, and how they are tied.

    With `among`, of these classes alone.
    """
    names = [coupling.names if among is None else np.unique(among) for coupling in couplings]
    held, tied = [], []
    for coupling, classes in zip(couplings, names, strict=True):
        atoms, row = coupling.members_of(classes)
        held.append((np.bincount(row, minlength=len(classes)), coupling.places[atoms], coupling.signatures[atoms]))
        edges, of_edge = coupling.edges, coupling.classes[coupling.edges[:, 0]]
        if among is not None:
            wanted = np.zeros(coupling.record.count, np.bool_)
            wanted[classes] = True
            edges, of_edge = edges[wanted[of_edge]], of_edge[wanted[of_edge]]
        edges = edges[np.argsort(of_edge, kind="stable")]
        counts = np.bincount(of_edge, minlength=coupling.record.count)[classes]
        tied.append((counts, coupling.ranks[edges[:, 0]], coupling.ranks[edges[:, 1]]))
    one, two = (first_alike(*_behind_each_other(rows)) for rows in (held, tied))
    _, labels = np.unique(one * len(one) + two, return_inverse=True)
    found = []
    for coupling, classes in zip(couplings, names, strict=True):
        found.append(np.full(coupling.record.count, -1))
        found[-1][classes], labels = labels[: len(classes)], labels[len(classes) :]
    return found


def _behind_each_other(rows: Sequence[tuple[Ints, ...]]) -> list[Ints]:
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def _components(count: int, pairs: Edges) -> Ints:
    """The smallest atom of each atom's connected component, (count,)."""
    parent = np.arange(count)
    one, two = pairs[:, 0], pairs[:, 1]
    while len(one):
        low, high = np.minimum(parent[one], parent[two]), np.maximum(parent[one], parent[two])
        np.minimum.at(parent, high, low)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
        open_ends = parent[one] != parent[two]
        one, two = one[open_ends], two[open_ends]
    return parent
