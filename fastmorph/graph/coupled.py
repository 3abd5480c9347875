"""What would grow with a layer, to be read before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fastmorph.graph.coupling import Coupling
from fastmorph.graph.find import as_inputs, channels_of
from fastmorph.graph.guess import traced
from fastmorph.graph.skeleton import Skeleton


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


def coupled(model: nn.Module, layer: str, example_inputs: Any = None) -> Coupled:
    """The tensors that share the output channels of a layer: what `widen` would change.

    Args:
        model: the model; it is not touched.
        layer: dotted name of a layer with a weight, or of the weight itself.
        example_inputs: a tensor, or a tuple of the model's positional arguments; None: guessed from its first layer.

    Raises:
        MorphError: the layer makes no channels, or the model does not run.
    """
    _, record = traced(Skeleton(model), as_inputs(example_inputs))
    coupling = Coupling(record, frozenset({"groups"}))
    atoms = channels_of(model, record, layer)
    sequence = coupling.of(atoms)
    classes, reads = np.unique(sequence), record.reads.numpy()
    held = np.isin(coupling.classes, classes)
    rows = []
    for axis in record.axes:
        span = slice(axis.start, axis.start + axis.size)
        if axis.parameter and held[span].any():
            made = (
                axis.name in record.outputs
                and np.isin(record.outputs[axis.name].numpy(), np.arange(axis.start, span.stop)).any()
            )
            role = "reads" if reads[span].any() else "makes" if made else "follows"
            rows.append(Row(axis.name, axis.dim, axis.size, int(held[span].sum()), role))
    last = int(sequence[-1])
    normalised = [module for module, together in coupling.normalised if np.isin(together, classes).any()]
    fixed = dict.fromkeys(coupling.causes[cls] for cls in classes.tolist() if cls in coupling.causes)
    fixed.update(dict.fromkeys(f"{module!r} normalises over them, and whole multiples alone work" for module in normalised))
    step = 0 if fixed else int((sequence == last).sum())
    return Coupled(layer, len(atoms), step, tuple(rows), tuple(fixed))
