"""What a traced run found: which channels must grow together, which cannot grow, and where they are read.

Atoms (see `fastmorph.graph.flow`) that meet in an operator are tied: an edge. A grouped operator leaves a choice, of which one
is made later: its groups may get wider or more. Two runs are compared by all that is recorded here.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmorph.graph.flow import line, real_atoms

Ints = np.ndarray[Any, np.dtype[np.int64]]
Edges = np.ndarray[Any, np.dtype[np.int64]]  # (n, 2), pairs of atoms
NO_EDGES: Edges = np.zeros((0, 2), np.int64)
_PLACES = 64  # operands and results of one operator


@dataclass(frozen=True)
class Axis:
    """A dimension of a parameter or buffer, or the channels of an output that has more of them than its weight has rows.

    Attributes:
        name: the parameter's name, or the module's.
        dim: which dimension.
        size: its size.
        start: the atom of its first index.
        parameter: whether it belongs to a parameter or buffer.
    """

    name: str
    dim: int
    size: int
    start: int
    parameter: bool


@dataclass(frozen=True)
class Role:
    """What tells atoms apart that ties alone do not: a number for each, in one operator.

    Attributes:
        code: the operator and operand.
        atoms: (n,).
        numbers: (n,).
    """

    code: int
    atoms: Tensor
    numbers: Tensor

    def add_to(self, signatures: Ints) -> None:
        """Add to `Record.signatures`."""
        held = self.atoms >= 0
        np.add.at(signatures, self.atoms[held].numpy(), _number(self.code) * (2 * self.numbers[held].numpy() + 1))


@dataclass(frozen=True)
class Choice:
    """An operator in groups. Its groups may get wider (`inside`) or more (`more`).

    Attributes:
        module: name of the module that ran it.
        attribute: that module's attribute that counts the groups.
        groups: how many there are.
        channels: the atoms of all its input channels, in order.
        inside: what is tied if groups get wider.
        more: what is tied if there will be more of them.
        lines: (n, 2), atoms and the number of the group over which they are normalised; such groups get wider only if every
            channel is copied equally often. Empty for a convolution.
        roles: in which group a channel is, if groups get wider.
    """

    module: str
    attribute: str
    groups: int
    channels: Tensor
    inside: Edges
    more: Edges
    lines: Edges = field(default_factory=lambda: NO_EDGES)
    roles: tuple[Role, ...] = ()


@dataclass(frozen=True)
class Block:
    """Atoms that cannot get copies, and why: a clause that names the module."""

    atoms: Tensor
    cause: str


class Record:
    """Everything that one traced run found; filled by a `Tracer`."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.count = 0
        self.choices: list[Choice] = []
        self.blocks: list[Block] = []
        self.outputs: dict[str, Tensor] = {}  # weight's name -> atoms of the channels that it produces, in order
        self.sites: list[tuple[str, Tensor]] = []  # a norm's module and the atoms of its channels
        self.depthwise: list[tuple[str, Tensor]] = []  # a depthwise convolution's module and its rows
        self.journal: list[tuple[Any, ...]] = []  # operators that compute, with their numbers
        self.moves: list[tuple[Any, ...]] = []  # operators that move data, with what is the same at any size
        self.trained = False  # whether a run in train mode is part of it
        self.sizes: dict[str, dict[tuple[int, int], Tensor]] = {}  # what `note_sizes` found, by module
        self.cuts: dict[str, list[tuple[tuple[int, ...], list[Tensor]]]] = {}  # what `note_cut` found, by module
        self.used: set[str] = set()  # parameters and buffers that some operator took
        self.result: list[tuple[int, ...]] = []  # shapes of the model's outputs
        self._parameters: dict[str, list[Axis]] = {}
        self._edges: list[Edges] = []
        self._reads: list[Tensor] = []
        self._writes: list[Tensor] = []
        self._unsafe: list[Tensor] = []
        self._shifts: list[Tensor] = []
        self._standard: list[Tensor] = []
        self._bent: list[Tensor] = []
        self._marks: list[tuple[int, Tensor]] = []
        self._roles: list[Role] = []

    def add_axis(self, name: str, dim: int, size: int, *, parameter: bool) -> Axis:
        """A new axis with atoms of its own."""
        axis = Axis(name, dim, size, self.count, parameter)
        self.axes.append(axis)
        self.count += size
        return axis

    def add_parameter(self, name: str, shape: tuple[int, ...]) -> None:
        """An axis for each dimension of a parameter or buffer."""
        self._parameters[name] = [self.add_axis(name, dim, size, parameter=True) for dim, size in enumerate(shape)]

    def parameter(self, name: str) -> list[Axis]:
        """The axes of a parameter or buffer."""
        return self._parameters[name]

    def note_sizes(self, module: str, shape: Sequence[int], labels: Iterable[Tensor]) -> None:
        """Sizes that the module's forward handles, with the atoms along them: a number of its own may be one of them."""
        known = self.sizes.setdefault(module, {})
        for label in labels:
            for dim, size in enumerate(label.shape):
                if size > 1:
                    atoms = line(label, dim)
                    known.setdefault((shape[dim], int(atoms[0])), atoms)

    def note_cut(self, module: str, sizes: Sequence[int], lines: list[Tensor]) -> None:
        """Sizes by which the module's forward cuts or pads something, with the atoms of each."""
        self.cuts.setdefault(module, []).append((tuple(sizes), lines))

    def add_atoms(self, module: str, count: int) -> Tensor:
        """Atoms for channels of an output that no row of a weight stands for alone."""
        return torch.arange(count) + self.add_axis(module, 1, count, parameter=False).start

    def add_output(self, atoms: Tensor, weight: str) -> None:
        """The channels that a weight produces, in order."""
        self.outputs.setdefault(weight, atoms)

    def axis_of(self, atom: int) -> Axis:
        """The axis that an atom belongs to."""
        return self.axes[bisect.bisect_right(self.axes, atom, key=lambda axis: axis.start) - 1]

    def tie(self, one: Tensor, two: Tensor) -> None:
        """Tie two labels position by position."""
        self._edges.append(edges(one, two))

    def tie_edges(self, pairs: Edges) -> None:
        """Tie pairs of atoms."""
        self._edges.append(pairs)

    def block(self, labels: Iterable[Tensor], cause: str) -> None:
        """Forbid copies of all atoms in the labels."""
        atoms = real_atoms(labels)
        if atoms.numel():
            self.blocks.append(Block(atoms, cause))

    def read(self, label: Tensor) -> None:
        """A weight's columns, which are summed over: copies of a channel must cancel here."""
        self._reads.append(real_atoms([label]))

    def write(self, labels: Iterable[Tensor]) -> None:
        """A weight's rows, and all else that makes or changes channels: copies of a channel must be equal here."""
        self._writes.append(real_atoms(labels))

    def unsafe(self, labels: Iterable[Tensor]) -> None:
        """Channels on which an operator may make something of zero."""
        self._unsafe.append(real_atoms(labels))

    def shift(self, labels: Iterable[Tensor]) -> None:
        """What is added to channels, which must be zero for a channel of zeros."""
        self._shifts.append(real_atoms(labels))

    def standardise(self, labels: Iterable[Tensor]) -> None:
        """Columns of a weight whose rows are set to mean 0 and variance 1: new ones must leave these as they are."""
        self._standard.append(real_atoms(labels))

    @property
    def reads(self) -> Tensor:
        """(count,) bool."""
        return self._mask(self._reads)

    @property
    def writes(self) -> Tensor:
        """(count,) bool."""
        return self._mask(self._writes)

    @property
    def makes_of_zero(self) -> Tensor:
        """(count,) bool: see `unsafe`."""
        return self._mask(self._unsafe)

    @property
    def shifts(self) -> Tensor:
        """(count,) bool: see `shift`."""
        return self._mask(self._shifts)

    def mark(self, place: int, labels: Iterable[Tensor]) -> None:
        """The channels in one operand, or in one result, of the operator that the journal names last."""
        code = len(self.journal) * _PLACES + place
        self._marks += [(code, label.reshape(-1)) for label in labels]

    @property
    def signatures(self) -> Ints:
        """(count,): a number for the operands and results that an atom was in; others give another, all but surely."""
        found = np.zeros(self.count, np.int64)
        for code, atoms in self._marks:
            found[atoms[atoms >= 0].numpy()] += _number(code)  # once, however often it is there
        for role in self._roles:
            role.add_to(found)
        return found

    def roles_of(self, place: int, lines: Tensor) -> Role:
        """Each row of (m, n) labels has a role of its own in the operator that the journal names last."""
        numbers = torch.arange(len(lines))[:, None].expand_as(lines)
        return Role(len(self.journal) * _PLACES + place, lines.reshape(-1), numbers.reshape(-1))

    def mark_roles(self, place: int, lines: Tensor) -> None:
        """Note the roles of labels, see `roles_of`, that growth leaves as they are."""
        self._roles.append(self.roles_of(place, lines))

    def bend(self, labels: Iterable[Tensor]) -> None:
        """Entries of a weight that go into a product more than once: as columns they would not cancel."""
        self._bent.append(real_atoms(labels))

    @property
    def bent(self) -> Tensor:
        """(count,) bool: see `bend`."""
        return self._mask(self._bent)

    @property
    def standardised(self) -> Tensor:
        """(count,) bool: see `standardise`."""
        return self._mask(self._standard)

    @property
    def edges(self) -> Edges:
        """All ties but those of choices, each once."""
        return unique(np.concatenate([NO_EDGES, *self._edges]))

    def _mask(self, atoms: list[Tensor]) -> Tensor:
        mask = torch.zeros(self.count, dtype=torch.bool)
        if atoms:
            mask[torch.cat(atoms)] = True
        return mask


def _number(code: int) -> int:
    """A large number that is another for another code."""
    return random.Random(code).getrandbits(62)


def edges(one: Tensor, two: Tensor) -> Edges:
    """The pairs of atoms at equal positions of two labels that broadcast."""
    one, two = torch.broadcast_tensors(one, two)
    pairs = torch.stack([one.reshape(-1), two.reshape(-1)], 1).numpy()
    return pairs[(pairs >= 0).all(1)]


def chain(lines: Tensor) -> Edges:
    """Ties neighbours in each row of (*, n) labels."""
    return edges(lines[..., :-1], lines[..., 1:])


def unique(pairs: Edges) -> Edges:
    """Undirected, each once, without loops, sorted."""
    if not len(pairs):
        return pairs
    low, high = pairs.min(1), pairs.max(1)
    base = int(high.max()) + 1
    keys = np.sort(low * base + high)  # as one number, which sorts much faster than pairs
    keys = keys[np.append(True, np.diff(keys) > 0)]
    pairs = np.stack([keys // base, keys % base], 1)
    return pairs[pairs[:, 0] != pairs[:, 1]]
