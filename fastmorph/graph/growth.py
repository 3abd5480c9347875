"""Which classes get how many copies, where the copies stand, and whether the model then still does the same with all others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from fastmorph.graph.coupling import Coupling, Ints
from fastmorph.graph.record import Axis, Choice, Edges, Record, unique


@dataclass(frozen=True)
class Layout:
    """How the indices of a grown axis came about.

    Attributes:
        origin: (new size,), the old index that stands there, or of which a copy stands there.
        copy: (new size,), 0 for the old ones, then 1, 2, ... for each copy of a class.
    """

    origin: Ints
    copy: Ints


@dataclass(frozen=True, eq=False)
class Growth:
    """Copies of classes.

    Attributes:
        coupling: the classes.
        copies: (count,), how many copies each atom gets; the same for all atoms of a class.
        by_run: whether a copy of a class stands behind each run of its indices, or behind each index.
        even: whether every class gets equally many, as norms over channels need it.
    """

    coupling: Coupling
    copies: Ints
    by_run: bool = True
    even: bool = False

    @classmethod
    def of_classes(cls, coupling: Coupling, classes: dict[int, int], **options: bool) -> Growth:
        """So many copies of these classes."""
        copies = np.zeros_like(coupling.classes)
        for key, count in classes.items():
            copies[coupling.classes == key] = count
        return cls(coupling, copies, **options)

    def total(self, atoms: Tensor) -> int:
        """How many there are of these atoms after all."""
        return len(atoms) + int(self.copies[atoms.numpy()].sum())

    def layout(self, axis: Axis) -> Layout | None:
        """Where the axis's indices come from; None if it does not grow."""
        span = slice(axis.start, axis.start + axis.size)
        copies, classes = self.copies[span], self.coupling.classes[span]
        if not copies.any():
            return None
        cuts = np.flatnonzero(np.diff(classes)) + 1 if self.by_run else np.arange(1, axis.size)
        origin, copy = [], []
        for run in np.split(np.arange(axis.size), cuts):
            for number in range(1 + int(copies[run[0]])):
                origin.append(run)
                copy.append(np.full(len(run), number))
        return Layout(np.concatenate(origin), np.concatenate(copy))

    @cached_property
    def layouts(self) -> dict[Axis, Layout]:
        """All axes that grow."""
        found = {axis: self.layout(axis) for axis in self.coupling.record.axes}
        return {axis: layout for axis, layout in found.items() if layout is not None}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The new shapes of parameters and buffers that grow, by name."""
        sizes: dict[str, list[int]] = {}
        for axis in self.coupling.record.axes:
            if axis.parameter:
                sizes.setdefault(axis.name, []).append(len(self.layouts[axis].origin) if axis in self.layouts else axis.size)
        grown = {axis.name for axis in self.layouts}
        return {name: tuple(shape) for name, shape in sizes.items() if name in grown}

    def difference(self, child: Record) -> str | None:
        """What the resized model does otherwise than the record's, a clause; None if old channels flow as before.

        Its operators are the same with the same numbers, what met still meets, copies meet copies, and nothing else meets.
        """
        parent = self.coupling.record
        for before, after in zip(parent.journal, child.journal, strict=False):
            if before != after:
                return f"module {before[0]!r} would run {after[1:]} instead of {before[1:]}"
        if len(parent.journal) != len(child.journal) or parent.result != child.result:
            return "the model would run other operators"
        if len(parent.axes) != len(child.axes) or len(parent.choices) != len(child.choices):
            return "the model would run other operators"
        codes = np.zeros(child.count, np.int64)
        for old, new in zip(parent.axes, child.axes, strict=True):
            layout = self.layouts.get(old)
            origin = np.arange(old.size) if layout is None else layout.origin + layout.copy * parent.count
            if len(origin) != new.size or (old.name, old.dim) != (new.name, new.dim):
                return f"{new.name!r} would have {new.size} channels instead of {len(origin)}"
            codes[new.start : new.start + new.size] = origin + old.start
        after = Coupling(child, self.coupling.wider)
        expected = self._copied(self.coupling.edges, self.coupling.edges[:, 0])
        found = unique(codes[after.edges])
        odd = _first_difference(expected, found)
        if odd is not None:
            names = [parent.axis_of(int(atom) % parent.count).name for atom in odd]
            return f"channels of {names[0]!r} would meet others of {names[1]!r}"
        for old, new in zip(parent.choices, child.choices, strict=True):
            if self.coupling.is_wider(old) and self._lines(old, None) != self._lines(new, codes):
                return f"module {old.module!r} would normalise over other channels"
        for block in child.blocks:
            if (codes[block.atoms.numpy()] >= parent.count).any():
                return block.cause
        return None

    def _copied(self, pairs: Ints, atoms: Ints) -> Edges:
        """The pairs and their copies; the first column's atoms say how many."""
        count = self.coupling.record.count
        copies = self.copies[atoms]
        shifted = [pairs[copies >= number] + number * count for number in range(1, int(self.copies.max(initial=0)) + 1)]
        return unique(np.concatenate([pairs, *shifted]))

    def _lines(self, choice: Choice, codes: Ints | None) -> set[tuple[int, int]]:
        """(atom's code, line) of all atoms that are normalised, expected ones if there are no codes."""
        atoms, lines = choice.lines[:, 0], choice.lines[:, 1]
        if codes is not None:
            return set(zip(codes[atoms].tolist(), lines.tolist(), strict=True))
        count = self.coupling.record.count
        return {
            (atom + number * count, line)
            for atom, line, copies in zip(atoms.tolist(), lines.tolist(), self.copies[atoms].tolist(), strict=True)
            for number in range(1 + copies)
        }


def _first_difference(one: Edges, two: Edges) -> tuple[int, int] | None:
    if np.array_equal(one, two):
        return None
    left, right = set(map(tuple, one.tolist())), set(map(tuple, two.tolist()))
    return min(left ^ right)
