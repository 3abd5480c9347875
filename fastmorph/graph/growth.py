"""Which classes get how many copies, where the copies stand, and whether the model then still does the same with all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from fastmorph.graph.coupling import Coupling, Floats, kinds
from fastmorph.graph.edges import unique
from fastmorph.graph.flow import line, varying_dims
from fastmorph.graph.ragged import positions
from fastmorph.graph.record import Axis, Ints, Record
from fastmorph.graph.streams.algebra import Stream


@dataclass(frozen=True)
class Layout:
    """How the indices of a grown axis came about.

    Attributes:
        origin: (new size,), the old index that stands there, or of which a copy stands there.
        copy: (new size,), 0 for the old ones; 1, 2, ... for new ones.
        key: (new size,), the same for indices that differ only in their `copy`.
    """

    origin: Ints
    copy: Ints
    key: Ints

    @cached_property
    def kept(self) -> Ints:
        """Where old indices stand."""
        return np.flatnonzero(self.copy == 0)

    @cached_property
    def fresh(self) -> Ints:
        """Where new indices stand."""
        return np.flatnonzero(self.copy)

    @cached_property
    def twins(self) -> tuple[Ints, Ints, Ints]:
        """Of the copies of each index the first half, the second half in the same order, and those that are left over."""
        order = self.fresh[np.lexsort((self.copy[self.fresh], self.key[self.fresh]))]
        _, starts, counts = np.unique(self.key[order], return_index=True, return_counts=True)
        rank, half = np.arange(len(order)) - np.repeat(starts, counts), np.repeat(counts // 2, counts)
        first = np.flatnonzero(rank < half)
        first = first[np.argsort(order[first])]
        return order[first], order[first + half[first]], order[rank >= 2 * half]

    def same(self, other: Layout) -> bool:
        """Whether it is the other's, index by index."""
        pairs = ((self.origin, other.origin), (self.copy, other.copy), (self.key, other.key))
        return self is other or all(np.array_equal(one, two) for one, two in pairs)


@dataclass(frozen=True)
class Difference:
    """What a resized model does otherwise: a clause, and the module, where it is known."""

    cause: str
    module: str | None = None


def _told(entry: tuple[Any, ...]) -> str:
    """An operator and its numbers, of which a size that may grow is an n."""
    return f"{entry[1]}{entry[2:]}".replace("None", "n").replace("'", "")


def _flat(entry: Any) -> list[Any]:
    """The numbers of a nest, in order."""
    return [item for part in entry for item in _flat(part)] if isinstance(entry, tuple) else [entry]


@dataclass(frozen=True, eq=False)
class Growth:
    """Copies of classes.

    Attributes:
        coupling: the classes.
        copies: (count,), how many copies each atom gets; the same for all atoms of a class, or an average over classes.
        by_run: whether a copy of a class stands behind each run of its indices, or behind each index.
        even: whether every class gets equally many, as norms over channels need it.
        numbers: whether numbers that modules keep, where they are the size of something that grows, grow with it.
        cautious: modules whose numbers do not, if they are the size of something else too.
        plain: modules whose lists and tuples of numbers do not.
        repeats: of modules of attention, how many query heads share keys and values, before and after.
        given: the layouts, where they do not follow from `copies`.
        known: whether there was a channel of each new one's kind.
        way: how a stream that norms read grows, "axis" or "turned"; "": it is none, and norms allow whole multiples.
        stream: what that comes to, once it has been found.
        alone: of a stream with heads beside it, the stream's growth; None: nothing grows beside it.
    """

    coupling: Coupling
    copies: Floats
    by_run: bool = True
    even: bool = False
    numbers: bool = False
    cautious: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()
    repeats: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    given: dict[Axis, Layout] | None = None
    known: bool = True
    way: str = ""
    stream: Stream | None = None
    alone: Growth | None = None

    @classmethod
    def of_classes(cls, coupling: Coupling, classes: Ints, counts: Ints, *, even: bool = False, way: str = "") -> Growth:
        """So many copies of these classes."""
        atoms, row = coupling.members_of(classes)
        copies = np.zeros(coupling.record.count)
        copies[atoms] = counts[row]
        growth = cls(coupling, copies, even=even, way=way)
        vars(growth)["atoms"] = np.sort(atoms)  # known here, so that nobody looks for them among all
        return growth

    @classmethod
    def of_parts(cls, parts: Sequence[Growth]) -> Growth:
        """All these at once: growths as they are tried first, of one coupling, that have no axis in common."""
        copies = np.zeros_like(parts[0].copies)
        for part in parts:
            copies[part.atoms] = part.copies[part.atoms]
        layouts = {axis: layout for part in parts for axis, layout in part.layouts.items()}
        repeats = {module: numbers for part in parts for module, numbers in part.repeats.items()}
        return cls(parts[0].coupling, copies, numbers=parts[0].numbers, repeats=repeats, given=layouts)

    @cached_property
    def atoms(self) -> Ints:
        """The atoms that get copies."""
        return np.flatnonzero(self.copies)

    @cached_property
    def plain_copies(self) -> Floats:
        """(count,), the copies that are none of a stream's."""
        if not self.way:
            return self.copies
        return np.zeros_like(self.copies) if self.alone is None else self.copies - self.alone.copies

    def total(self, atoms: Tensor) -> int:
        """How many there are of these atoms, and of positions that are none, after all."""
        return len(atoms) + round(float(self.copies[atoms[atoms >= 0].numpy()].sum()))

    def same_layout(self, other: Growth) -> bool:
        """Whether the copies stand where the other's do."""
        return all(np.array_equal(layout.origin, other.layouts[axis].origin) for axis, layout in self.layouts.items())

    @cached_property
    def layouts(self) -> dict[Axis, Layout]:
        """All axes that grow."""
        if self.given is not None:
            return self.given
        axes = self.coupling.record.axes
        found: dict[Axis, Layout] = {}
        known: dict[bytes, Layout] = {}  # of axes with copies of the same classes, as all are that share their channels
        for axis in (axes[number] for number in np.unique(self.coupling.axes[self.atoms]).tolist()):
            span = slice(axis.start, axis.start + axis.size)
            copies, classes = self.copies[span].astype(np.int64), self.coupling.classes[span]
            key = copies.tobytes() + classes.tobytes()
            if key not in known:
                known[key] = self._layout(copies, classes)
            found[axis] = known[key]
        return found

    def _layout(self, copies: Ints, classes: Ints) -> Layout:
        size = len(classes)
        begins = np.flatnonzero(np.append(True, np.diff(classes) != 0)) if self.by_run else np.arange(size)
        lengths = np.diff(np.append(begins, size))  # of runs of one class
        sizes = lengths * (1 + copies[begins])
        within, long = positions(sizes), np.repeat(lengths, sizes)
        origin = np.repeat(begins, sizes) + within % long
        return Layout(origin, within // long, origin)

    @property
    def streamed(self) -> Growth:
        """What of it is a stream's."""
        return replace(self, alone=None, copies=self.alone.copies, given=self.alone.layouts) if self.alone else self

    @property
    def beside(self) -> dict[Axis, Layout]:
        """The axes that grow beside a stream."""
        return {axis: layout for axis, layout in self.layouts.items() if self.alone and axis not in self.alone.layouts}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters and buffers that grow."""
        return tuple(dict.fromkeys(axis.name for axis in self.layouts if axis.parameter))

    def shape(self, name: str, before: Sequence[int]) -> tuple[int, ...]:
        """What becomes of the shape of a parameter or buffer; of sizes that do not grow, any may be given."""
        sizes = list(before)
        for axis in self.coupling.record.parameter(name):
            if axis in self.layouts:
                sizes[axis.dim] = len(self.layouts[axis].origin)
        return tuple(sizes)

    def difference(self, child: Record, after: Coupling) -> Difference | None:
        """What the resized model does otherwise than the record's; None if old channels flow as before.

        It runs the same operators with the same numbers, old channels meet as they met, no new one meets an old one, and copies
        of one class meet alike. Of a stream (`way`) numbers, norms and outputs are left to those who read it. `after` is the
        coupling of `child`, of the same way to grow groups.
        """
        parent = self.coupling.record
        for entries, others in ((parent.journal, child.journal), (parent.moves, child.moves)):
            if entries == others:
                continue
            for entry, other in zip(entries, others, strict=False):
                if entry != other and not (self.way and entry[:2] == other[:2]) and not self._repeated(entry, other):
                    name = repr(entry[0]) if entry[0] else "the model itself"
                    return Difference(f"{name} would run {_told(other)} instead of {_told(entry)}", entry[0])
            if len(entries) != len(others):
                return Difference("the model would run other operators")
        pairs = zip(parent.result, child.result, strict=False)
        wider = self.way and all(old == new or type(old) is type(new) is tuple for old, new in pairs)
        if parent.result != child.result and not wider and not (self.repeats and self._by_head(child)):
            return Difference(f"its outputs would have shapes {child.result} instead of {parent.result}")
        if len(parent.axes) != len(child.axes) or len(parent.groupings) != len(child.groupings):
            return Difference("the model would run other operators")
        source, copy, key = (np.zeros(child.count, np.int64) for _ in range(3))
        for old, new in zip(parent.axes, child.axes, strict=True):
            layout = self.layouts.get(old)
            size = old.size if layout is None else len(layout.origin)
            if size != new.size or (old.name, old.dim) != (new.name, new.dim):
                return Difference(f"{new.name!r} would have {new.size} channels instead of {size}")
            span = slice(new.start, new.start + new.size)
            if layout is None:
                key[span] = np.arange(size)
                source[span] = key[span] + old.start
            else:
                source[span], copy[span], key[span] = layout.origin + old.start, layout.copy, layout.key
        plain = copy > 0 if not self.way else (copy > 0) & (self.plain_copies[source] > 0)
        for block in child.blocks:
            if not (self.repeats and block.output) and plain[block.atoms].any():
                return Difference(block.cause)
        astray = np.flatnonzero((self.coupling.signatures[source] != after.signatures) & (copy == 0))
        if len(astray):
            return Difference(f"channels of {child.axis_of(int(astray[0])).name!r} would go through other operators")
        odd = self._other_ties(after, source, copy) or self._other_copies(after, copy, key) or self._other_lines(child, source)
        return Difference(odd) if odd else None

    def _by_head(self, child: Record) -> bool:
        """Whether outputs grow where they hold something of each head, as caches do, and one is what it was."""
        parent, expected, kept = self.coupling.record, {}, False
        for path, shape, labels in parent.returned:
            sizes = list(shape)
            for label in labels:
                for dim in varying_dims(label):
                    sizes[dim] = self.total(line(label, dim))
            expected[path] = tuple(sizes)
            kept |= tuple(sizes) == shape
        found = {path: shape for path, shape, _ in child.returned}
        same = (old == new or type(old) is type(new) is tuple for old, new in zip(parent.result, child.result, strict=True))
        return kept and expected == found and all(same)

    def _repeated(self, entry: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
        """Whether an operator repeats keys and values for more query heads, and does else what it did."""
        before, after = self.repeats.get(entry[0], (0, 0))
        ways = zip(_flat(entry), _flat(other), strict=False)
        alike = len(_flat(entry)) == len(_flat(other)) and entry[:2] == other[:2]
        return alike and all(one == two or (one, two) == (before, after) for one, two in ways)

    def _other_ties(self, after: Coupling, source: Ints, copy: Ints) -> str | None:
        if not np.array_equal(self.coupling.shared, unique(source[after.shared])):
            return "query heads would meet keys and values of others"
        is_new = copy[after.edges] > 0
        mixed = is_new[:, 0] != is_new[:, 1]
        odd = source[after.edges[mixed][:1]]
        if not len(odd):
            expected, found = self.coupling.edges, unique(source[after.edges[~is_new[:, 0]]])
            if np.array_equal(expected, found):
                return None
            pairs, counts = np.unique(np.concatenate([expected, found]), axis=0, return_counts=True)
            odd = pairs[counts == 1][:1]
        one, two = (self.coupling.record.axis_of(int(atom)).name for atom in odd[0])
        return f"channels of {one!r} would meet others of {two!r}"

    def _other_copies(self, after: Coupling, copy: Ints, key: Ints) -> str | None:
        """Copies of one class must be classes of one kind, with the same member at the same place."""
        grown = np.isin(after.axes, after.axes[copy > 0])  # nothing else has two indices of one key
        atoms = np.flatnonzero(grown)
        order = atoms[np.lexsort((copy[atoms], key[atoms], after.axes[atoms]))]
        one, two = order[:-1], order[1:]
        alike = (after.axes[one] == after.axes[two]) & (key[one] == key[two]) & (copy[two] > 0)
        one, two = one[alike], two[alike]
        pairs = np.unique(np.stack([after.classes[one], after.classes[two]], 1), axis=0)
        apart = (after.places[one] != after.places[two]).any() or len(np.unique(pairs[:, 1])) != len(pairs)
        (found,) = kinds(after, among=pairs)
        if apart or (found[pairs[:, 0]] != found[pairs[:, 1]]).any():
            return "copies of one channel would not be treated alike"
        return None

    def _other_lines(self, child: Record, source: Ints) -> str | None:
        """What is normalised together stays together, and is copied equally often."""
        for old, new in zip(self.coupling.record.groupings, child.groupings, strict=True):
            if self.coupling.is_wider(old) and len(old.lines):
                copies = self.copies[old.lines[:, 0]].astype(np.int64)
                plain = self.plain_copies[old.lines[:, 0]]
                order = np.argsort(old.lines[:, 1], kind="stable")
                if ((np.diff(plain[order]) != 0) & (np.diff(old.lines[order, 1]) == 0)).any():
                    return f"module {old.module!r} normalises over them and over others that would not be copied as often"
                expected = np.repeat(old.lines, 1 + copies, axis=0)
                found = np.stack([source[new.lines[:, 0]], new.lines[:, 1]], 1)
                if not np.array_equal(expected[np.lexsort(expected.T)], found[np.lexsort(found.T)]):
                    return f"module {old.module!r} would normalise over other channels"
        return None
