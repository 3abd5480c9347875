"""What would grow with a layer, to be read before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastmorph.graph.coupling import Coupling
from fastmorph.graph.ragged import first_alike, positions
from fastmorph.graph.record import Ints


@dataclass(frozen=True)
class Row:
    """A dimension of a parameter or buffer that shares channels with the layer.

    Attributes:
        name: the parameter's or buffer's name.
        dim: which of its dimensions.
        size: that dimension's size.
        shared: how many of its indices belong to the layer's channels.
        role: "makes" for a weight's rows, "reads" for a weight's columns, "follows" for all else (biases, norms, scales).
    """

    name: str
    dim: int
    size: int
    shared: int
    role: str


@dataclass(frozen=True)
class Coupled:
    """The tensors that grow with a layer; prints as a table.

    Attributes:
        layer: its name.
        channels: how many output channels it has.
        step: how many channels one copy of its last channel comes with, itself included; 0 where that has no copies.
        rows: the tensors, in the order of the model.
        fixed: why some of the channels cannot get copies, a clause each.
    """

    layer: str
    channels: int
    step: int
    rows: tuple[Row, ...]
    fixed: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [("parameter", "dim", "size", "shared", "role")]
        cells += [(row.name, str(row.dim), str(row.size), str(row.shared), row.role) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
        grows = f"in steps of {self.step}" if self.step else "not at all by copies of its last channel"
        lines = [*table, f"{self.layer!r} has {self.channels} output channels and grows {grows}."]
        return "\n".join(lines + [f"Some of them are fixed: {cause}." for cause in self.fixed])


class Tables:
    """The tables of any layers of a model."""

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        record, axes = coupling.record, len(coupling.record.axes)
        reads = np.bincount(coupling.axes[record.mask("reads")], minlength=axes) > 0
        makes = np.zeros(axes, np.bool_)
        for name, atoms in record.outputs.items():
            held = np.unique(coupling.axes[atoms.numpy()])
            makes[[place for place in held.tolist() if record.axes[place].name == name]] = True
        self._roles = np.where(reads, "reads", np.where(makes, "makes", "follows")).tolist()
        # Each class with each axis that it occurs in, and how often it does.
        keys, self._counts = np.unique(coupling.classes * axes + coupling.axes, return_counts=True)
        self._classes, self._axes = keys // axes, keys % axes

    def of(self, layers: Mapping[str, Tensor]) -> dict[str, Coupled]:
        """The tables of layers, given as the atoms of their channels, by the same names."""
        coupling = self._coupling
        sequences = [coupling.of(atoms) for atoms in layers.values()]
        sets = [np.unique(sequence) for sequence in sequences]
        lengths = np.array([len(classes) for classes in sets], np.int64)
        alike = first_alike(lengths, np.concatenate([np.zeros(0, np.int64), *sets]))
        rows = {place: self._rows(sets[place]) for place in np.unique(alike).tolist()}
        fixed = {place: self._fixed(sets[place]) for place in rows}
        found = {}
        for layer, sequence, place in zip(layers, sequences, alike.tolist(), strict=True):
            step = 0 if fixed[place] else int((sequence == sequence[-1]).sum())
            found[layer] = Coupled(layer, len(sequence), step, rows[place], fixed[place])
        return found

    def _rows(self, classes: Ints) -> tuple[Row, ...]:
        starts, ends = (np.searchsorted(self._classes, classes, side) for side in ("left", "right"))
        held = np.repeat(starts, ends - starts) + positions(ends - starts)
        axes = self._coupling.record.axes
        shared = np.bincount(self._axes[held], self._counts[held], len(axes)).astype(np.int64)
        numbered = ((number, axes[number], int(shared[number])) for number in np.flatnonzero(shared).tolist())
        return tuple(
            Row(axis.name, axis.dim, axis.size, count, self._roles[number])
            for number, axis, count in numbered
            if axis.parameter
        )

    def _fixed(self, classes: Ints) -> tuple[str, ...]:
        coupling = self._coupling
        normalised = [module for module, together in coupling.normalised if np.isin(together, classes).any()]
        names = [repr(module) if module else "the model itself" for module in dict.fromkeys(normalised)]
        causes = [f"{name} normalises over them, and whole multiples alone work" for name in names]
        return (*coupling.causes(classes), *causes)
