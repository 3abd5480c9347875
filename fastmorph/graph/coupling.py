"""From ties to classes: atoms that can only be copied together."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from fastmorph.graph.record import Choice, Edges, Ints, Record, unique

Floats = np.ndarray[Any, np.dtype[np.float64]]


class Coupling:
    """The classes of a record's atoms under one way to grow its groups.

    Attributes:
        record: the record.
        wider: attributes of those grouped operators whose groups get wider; there will be more of all others'.
        classes: (count,), the smallest atom of each atom's class.
    """

    def __init__(self, record: Record, wider: frozenset[str]) -> None:
        self.record = record
        self.wider = wider
        self.classes = _components(record.count, self.edges)

    def is_wider(self, choice: Choice) -> bool:
        """Whether the choice's groups get wider, or are no groups that could be more."""
        return choice.attribute in self.wider or not choice.attribute

    @cached_property
    def edges(self) -> Edges:
        """All ties, each once."""
        chosen = [choice.inside if self.is_wider(choice) else choice.more for choice in self.record.choices]
        return unique(np.concatenate([self.record.edges, *chosen]))

    def of(self, atoms: Tensor) -> Ints:
        """The classes of atoms."""
        return self.classes[atoms.numpy()]

    @cached_property
    def causes(self) -> dict[int, str]:
        """Why classes cannot be copied, by class."""
        found: dict[int, str] = {}
        for block in self.record.blocks:
            for cls in np.unique(self.of(block.atoms)).tolist():
                found.setdefault(cls, block.cause)
        both = (self.record.reads & self.record.writes).nonzero().reshape(-1)
        for atom in both.tolist():
            name = self.record.axis_of(atom).name
            found.setdefault(int(self.classes[atom]), f"{name!r} both makes them and sums over them (a tied weight)")
        for atom in (self.record.reads & self.record.bent).nonzero().reshape(-1).tolist():
            name = self.record.axis_of(atom).name
            found.setdefault(
                int(self.classes[atom]), f"{name!r} sums over them by a function of its entries that is not linear"
            )
        return found

    @cached_property
    def normalised(self) -> list[tuple[str, Ints]]:
        """Sets of classes that can only be copied all together, equally often, each with the module that normalises them."""
        lines = [choice for choice in self.record.choices if len(choice.lines) and self.is_wider(choice)]
        return [(choice.module, np.unique(self.classes[choice.lines[:, 0]])) for choice in lines]

    @cached_property
    def _order(self) -> tuple[Ints, Ints]:
        """Atoms sorted by class, and the classes of these."""
        order = np.argsort(self.classes, kind="stable")
        return order, self.classes[order]

    @cached_property
    def _tied(self) -> tuple[Edges, Ints]:
        """Ties sorted by class, and the classes of these."""
        order = np.argsort(self.classes[self.edges[:, 0]], kind="stable")
        return self.edges[order], self.classes[self.edges[order, 0]]

    @cached_property
    def places(self) -> Ints:
        """Of each atom the number of its axis (times 2**32) and how many atoms of its class stand before it there."""
        starts = np.array([axis.start for axis in self.record.axes])
        axes = np.searchsorted(starts, np.arange(self.record.count), "right") - 1
        order, classes = self._order
        same = (np.diff(classes) == 0) & (np.diff(axes[order]) == 0)
        positions = np.arange(len(order))
        places = np.empty_like(positions)
        places[order] = positions - np.maximum.accumulate(np.where(np.append(False, same), 0, positions))
        return places + (axes << 32)

    @cached_property
    def signatures(self) -> Ints:
        """See `Record.signatures`."""
        found = self.record.signatures
        for choice in self.record.choices:
            for role in choice.roles if self.is_wider(choice) else ():
                role.add_to(found)
        return found

    def members(self, cls: int) -> Ints:
        """The atoms of a class."""
        order, classes = self._order
        return order[np.searchsorted(classes, cls) : np.searchsorted(classes, cls, "right")]

    def kind(self, cls: int) -> tuple[bytes, bytes, bytes]:
        """Where the members of a class occur; classes of one kind, in any run, differ only in their indices."""
        edges, classes = self._tied
        members = self.members(cls)
        ties = edges[np.searchsorted(classes, cls) : np.searchsorted(classes, cls, "right")]
        return (
            self.places[members].tobytes(),
            self.signatures[members].tobytes(),
            unique(np.searchsorted(members, ties)).tobytes(),
        )

    def kin(self, cls: int) -> list[int]:
        """All classes of the same kind as this one, that may be copied too, itself among them."""
        first = self.record.axis_of(cls)
        rivals = np.unique(self.classes[first.start : first.start + first.size]).tolist()
        kind = self.kind(cls)
        return [rival for rival in rivals if rival not in self.causes and self.kind(rival) == kind]


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
