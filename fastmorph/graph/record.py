"""What a traced run found: which channels must grow together, which cannot grow, and where they are read.

Atoms (see `fastmorph.graph`) that meet in an operator are tied: an edge. An operator in groups leaves a grouping: whether its
groups get wider, or there will be more of them, is decided later. Two runs are compared by all that is recorded here. Labels
are noted as they are while the model runs, and gathered, all in one, when they are asked for.
"""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastmorph.graph.edges import NO_EDGES, Edges, chain, edges, unique
from fastmorph.graph.flow import line
from fastmorph.graph.ragged import scrambled
from fastmorph.graph.tape import Tape
from fastmorph.inputs import Inputs
from fastmorph.outputs import Path

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
_PLACES = 64  # operands and results of one operator
_PAIRS = 2**19  # ties that are made unique together

Kind = Literal["reads", "writes", "makes_of_zero", "shifts", "standardised", "bent"]
"""What an operator does with channels, beside tying them (see `Record.mark`):

reads: a weight's columns, which are summed over: copies of a channel must cancel here.
writes: a weight's rows, and all else that makes or changes channels: copies of a channel must be equal here.
makes_of_zero: channels on which an operator may make something of zero.
shifts: what is added to channels, which must be zero for a channel of zeros.
standardised: columns of a weight whose rows are set to mean 0 and variance 1: new ones must leave these as they are.
bent: entries of a weight that go into a product more than once: as columns they would not cancel.
"""


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
        lines: (m, n) atoms; the number of a line is that of its atoms.
    """

    code: int
    lines: Tensor

    def add_to(self, signatures: Ints) -> None:
        """Add to `Record.signatures`."""
        atoms = self.lines.reshape(-1).numpy()
        numbers, held = np.repeat(np.arange(len(self.lines)), self.lines.shape[-1]), atoms >= 0
        np.add.at(signatures, atoms[held], scrambled(np.array(self.code)) * (2 * numbers[held] + 1))


@dataclass(frozen=True)
class Grouping:
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
class Run:
    """One run of a model.

    Attributes:
        inputs: its arguments; of tensors, shapes and dtypes alone matter.
        train: whether in train mode.
        turned: places in the model's code where a comparison of sizes comes out the other way.
        option: an optional argument that the example does not give.
        mask: a module inside, and the shape of a mask that is given to it as its optional argument `option`.
    """

    inputs: Inputs
    train: bool = False
    turned: frozenset[tuple[str, int, int]] = frozenset()
    option: str = ""
    mask: tuple[str, tuple[int, ...]] | None = None

    def turn(self, place: tuple[str, int, int]) -> Run:
        """The same with a further comparison the other way."""
        return replace(self, turned=self.turned | {place})


@dataclass(frozen=True)
class Block:
    """Atoms that cannot get copies, and why: a clause that names the module; `output` where they are the model's output."""

    atoms: Ints
    cause: str
    output: bool = False


class Record:
    """Everything that one traced run found; filled by a `Tracer`.

    Args:
        whole: of dimensions of parameters, given as (name, dim), how many neighbours are followed as one channel, called by
            the first of them: the rows of a head of attention.
        untaped: of dimensions of parameters, which indices tapes leave out, (size,): new heads beside a stream.
    """

    def __init__(
        self,
        whole: Mapping[tuple[str, int], int] = MappingProxyType({}),
        untaped: Mapping[tuple[str, int], Bools] = MappingProxyType({}),
    ) -> None:
        self.whole, self.untaped = whole, untaped
        self.axes: list[Axis] = []
        self.count = 0
        self.groupings: list[Grouping] = []
        self.blocks: list[Block] = []
        self.outputs: dict[str, Tensor] = {}  # weight's name -> atoms of the channels that it produces, in order
        self.norms: list[tuple[str, Tensor]] = []  # a norm's module and the atoms of its channels
        self.splits: dict[str, list[Tensor]] = {}  # channels that a module's forward arranges in several dimensions
        self.scores: list[
            tuple[str, Tensor]
        ] = []  # a module that takes a softmax, and the channels apart from each other in it
        self.normed: list[tuple[str, str, int]] = []  # a weight's direction and magnitude, and the dimension of the latter
        self.depthwise: list[tuple[str, Tensor]] = []  # a depthwise convolution's module and its rows
        self.journal: list[tuple[Any, ...]] = []  # operators that compute, with their numbers
        self.moves: list[tuple[Any, ...]] = []  # operators that move data, with what is the same at any size
        self.runs: list[Run] = []  # whatever was found was found in these
        self.tapes: list[Tape] = []  # of the runs in eval mode, where these are asked for
        self.cuts: dict[str, list[tuple[tuple[int, ...], list[Tensor]]]] = {}  # what `note_cut` found, by module
        self.used: set[str] = set()  # parameters and buffers that some operator took
        self.result: list[Any] = []  # shapes of the model's outputs, and what else is in these
        self.returned: list[tuple[Path, tuple[int, ...], Sequence[Tensor]]] = []  # outputs, with their shapes and labels
        self._parameters: dict[str, list[Axis]] = {}
        self._edges: list[Edges] = []
        self._ties: list[tuple[Tensor, Tensor]] = []
        self._marks: dict[str, list[Tensor]] = {}
        self._operands: list[Tensor] = []  # labels, and of each the operand that it was found in
        self._places: list[int] = []
        self._roles: list[Role] = []
        self._sizes: dict[str, dict[tuple[Any, ...], Tensor]] = {}
        self._masks: dict[str, Bools] = {}

    def copy(self) -> Record:
        """Another one to go on with, which leaves this one as it is."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list | dict | set):
                setattr(new, name, value.copy())
        new.cuts = {module: [*cuts] for module, cuts in self.cuts.items()}
        new.splits = {module: [*labels] for module, labels in self.splits.items()}
        new._marks = {kind: [*labels] for kind, labels in self._marks.items()}
        new._sizes = {module: {**labels} for module, labels in self._sizes.items()}
        new._masks = {}
        vars(new).pop("edges", None)  # gathered anew
        return new

    def add_axis(self, name: str, dim: int, size: int, *, parameter: bool) -> Axis:
        """A new axis with atoms of its own."""
        axis = Axis(name, dim, size, self.count, parameter)
        self.axes.append(axis)
        self.count += size
        return axis

    def add_parameter(self, name: str, shape: tuple[int, ...]) -> None:
        """An axis for each dimension of a parameter or buffer."""
        self._parameters[name] = [self.add_axis(name, dim, size, parameter=True) for dim, size in enumerate(shape)]
        for axis in self._parameters[name]:
            if (name, axis.dim) in self.whole:
                self.tie_edges(chain(self.atoms_of(axis).view(-1, self.whole[name, axis.dim])))

    def atoms_of(self, axis: Axis) -> Tensor:
        """The atoms of an axis, (size,)."""
        return torch.arange(axis.start, axis.start + axis.size)

    def labels_of(self, name: str) -> list[Tensor]:
        """(size,) for each dimension of a parameter or buffer: the atoms by which its indices are followed."""
        labels = []
        for axis in self._parameters[name]:
            count = self.whole.get((name, axis.dim), 1)
            labels.append(self.atoms_of(axis).view(-1, count)[:, :1].expand(-1, count).reshape(-1))
        return labels

    def parameter(self, name: str) -> list[Axis]:
        """The axes of a parameter or buffer."""
        return self._parameters[name]

    def add_atoms(self, module: str, count: int) -> Tensor:
        """Atoms for channels of an output that no row of a weight stands for alone."""
        start = self.add_axis(module, 1, count, parameter=False).start
        return torch.arange(start, start + count)

    def taped(self, shape: tuple[int, ...], labels: Iterable[Tensor]) -> tuple[int, ...]:
        """The shape that a tape has: without what it leaves out (`untaped`)."""
        sizes = list(shape)
        for label in labels if self.untaped else ():
            for dim, size in enumerate(label.shape):
                if size > 1:
                    atoms = line(label, dim).numpy()
                    of_parameters = atoms[(atoms >= 0) & (atoms < len(self._is_untaped))]
                    sizes[dim] = shape[dim] - int(self._is_untaped[of_parameters].sum())
        return tuple(sizes)

    @cached_property
    def _is_untaped(self) -> Bools:
        found = np.zeros(self.count, np.bool_)
        for (name, dim), fresh in self.untaped.items():
            axis = self._parameters[name][dim]
            found[axis.start : axis.start + axis.size] = fresh
        return found

    def add_output(self, atoms: Tensor, weight: str) -> None:
        """The channels that a weight produces, in order."""
        self.outputs.setdefault(weight, atoms)

    def axis_of(self, atom: int) -> Axis:
        """The axis that an atom belongs to."""
        return self.axes[bisect.bisect_right(self.axes, atom, key=lambda axis: axis.start) - 1]

    def axes_of(self, atoms: Tensor) -> list[Axis]:
        """The axes that atoms belong to, each once."""
        found, left = [], np.unique(atoms.numpy())
        while len(left):
            found.append(self.axis_of(int(left[0])))
            left = left[np.searchsorted(left, found[-1].start + found[-1].size) :]
        return found

    # --- what the rules note --------------------------------------------------------------------------------------------------

    def tie(self, one: Tensor, two: Tensor) -> None:
        """Tie two labels position by position."""
        self._ties.append((one, two))

    def tie_edges(self, pairs: Edges) -> None:
        """Tie pairs of atoms."""
        self._edges.append(pairs)

    def mark(self, kind: Kind, labels: Iterable[Tensor]) -> None:
        """Note what an operator does with all atoms in the labels, see `Kind`."""
        self._marks.setdefault(kind, []).extend(labels)

    def block(self, labels: Iterable[Tensor], cause: str, *, output: bool = False) -> None:
        """Forbid copies of all atoms in the labels."""
        atoms = _atoms(labels)
        if len(atoms):
            self.blocks.append(Block(atoms, cause, output))

    def note_operand(self, place: int, labels: Sequence[Tensor]) -> None:
        """The channels in one operand, or in one result, of the operator that the journal names last."""
        self._operands += labels
        self._places += [len(self.journal) * _PLACES + place] * len(labels)

    def roles_of(self, place: int, lines: Tensor) -> Role:
        """Each row of (m, n) labels has a role of its own in the operator that the journal names last."""
        return Role(len(self.journal) * _PLACES + place, lines)

    def note_roles(self, place: int, lines: Tensor) -> None:
        """Note the roles of labels, see `roles_of`, that growth leaves as they are."""
        self._roles.append(self.roles_of(place, lines))

    def note_sizes(self, module: str, shape: Sequence[int], labels: Iterable[Tensor]) -> None:
        """Sizes that the module's forward handles, with the atoms along them: a number of its own may be one of them."""
        known = self._sizes.setdefault(module, {})
        for label in labels:
            known.setdefault((id(label), *shape), label)

    def note_cut(self, module: str, sizes: Sequence[int], lines: list[Tensor]) -> None:
        """Sizes by which the module's forward cuts or pads something, with the atoms of each."""
        self.cuts.setdefault(module, []).append((tuple(sizes), lines))

    # --- what they come to ----------------------------------------------------------------------------------------------------

    def mask(self, kind: Kind) -> Bools:
        """(count,): which atoms were marked so."""
        if kind not in self._masks:
            self._masks[kind] = np.zeros(self.count, np.bool_)
            atoms = _joined(self._marks.get(kind, ()))
            self._masks[kind][atoms[atoms >= 0]] = True
        return self._masks[kind]

    @cached_property
    def edges(self) -> Edges:
        """All ties but those of groupings, each once; the labels that they were found by are let go."""
        ties = self._ties  # before the others, and replaced after them, as threads may share a record
        found, waiting, count = NO_EDGES, list[Edges](), 0
        for pairs in itertools.chain(self._edges, (edges(*tie) for tie in ties)):  # several runs find the same ones
            waiting.append(pairs)
            count += len(pairs)
            if count > _PAIRS:
                found, waiting, count = unique(np.concatenate([found, *waiting])), [], 0
        found = unique(np.concatenate([found, *waiting]))
        self._edges = [found]
        self._ties = []
        return found

    @property
    def signatures(self) -> Ints:
        """(count,): a number for the operands and results that an atom was in; others give another, all but surely."""
        found = np.zeros(self.count, np.int64)
        labels = {id(label): label for label in self._operands}  # most stand in several operands
        order = {key: place for place, key in enumerate(labels)}
        numbers = np.zeros(len(labels), np.int64)
        np.add.at(numbers, [order[id(label)] for label in self._operands], scrambled(np.array(self._places, np.int64)))
        for number, label in zip(numbers, labels.values(), strict=True):
            atoms = label.reshape(-1).numpy()
            found[atoms[atoms >= 0]] += number  # once, however often it is there
        for role in self._roles:
            role.add_to(found)
        return found

    def sizes(self, module: str) -> dict[tuple[int, int], Tensor]:
        """What `note_sizes` found in a module: atoms along a dimension, by its size and the first of them."""
        found: dict[tuple[int, int], Tensor] = {}
        for (_, *shape), label in self._sizes.get(module, {}).items():
            for dim, size in enumerate(label.shape):
                if size > 1:
                    atoms = line(label, dim)
                    found.setdefault((shape[dim], int(atoms[0])), atoms)
        return found

    @property
    def sized(self) -> list[str]:
        """The modules for which `sizes` knows something, in the order of their first operator."""
        return list(self._sizes)


def _joined(labels: Iterable[Tensor]) -> Ints:
    found = [label.numpy().reshape(-1) for label in labels]
    return np.concatenate([np.zeros(0, np.int64), *found])


def _atoms(labels: Iterable[Tensor]) -> Ints:
    """All atoms in the labels, each once, (n,)."""
    atoms = np.unique(_joined(labels))
    return atoms[atoms >= 0]
