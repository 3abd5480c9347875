"""Whether a growth is one of a stream, and what it then comes to (see `fastmorph.graph.streams.algebra`)."""

from __future__ import annotations

import numpy as np

from fastmorph.graph.growth import Growth
from fastmorph.graph.record import Record
from fastmorph.graph.streams.algebra import Algebra, Kind, State, Stream, Stuck
from fastmorph.graph.streams.rules import RULES
from fastmorph.graph.streams.walk import Walk
from fastmorph.graph.tape import Tape
from fastmorph.outputs import Path

_KINDS: dict[str, tuple[tuple[Kind, bool], ...]] = {
    "axis": (("zero", False), ("mean", True)),
    "turned": (("turned", False), ("turned", True)),
}


def read_stream(growth: Growth, old: list[Tape], child: Record) -> Stream | str:
    """What a growth of a stream comes to, from the tapes of the model and of the resized one; a clause where it is none."""
    record = growth.coupling.record
    axes = {axis: layout for axis, layout in growth.layouts.items() if axis.parameter}
    (sizes,) = {(axis.size, len(layout.origin)) for axis, layout in axes.items()}
    if any((layout.origin[: axis.size] != np.arange(axis.size)).any() for axis, layout in axes.items()):
        return "some tensors hold them in another order"
    grown: dict[str, int] = {}
    for axis in axes:
        grown[axis.name] = grown.get(axis.name, 0) + 1
    reads = record.mask("reads")
    readers = {axis.name for axis in axes if reads[axis.start : axis.start + axis.size].any()}
    stuck: tuple[int, str] = (-1, "")
    for kind, centred in _KINDS[growth.way]:
        algebra = Algebra(kind, centred, grown, readers, sizes)
        found, read = _read(algebra, old, child.tapes)
        if isinstance(found, Stream):  # which some weight reads, or it is but an output
            return found if readers or not found.outputs else "they are the model's output"
        stuck = max(stuck, (read, found), key=lambda pair: pair[0])  # of the way that led furthest
    return stuck[1]


def _read(algebra: Algebra, old: list[Tape], new: list[Tape]) -> tuple[Stream | str, int]:
    """The stream, or why it is none and how many operators were read."""
    read, kept = 0, False
    outputs: dict[Path, tuple[int, State]] = {}
    for before, after in zip(old, new, strict=True):
        walk = Walk(algebra, before, after, RULES)
        try:
            walk.read()
        except Stuck as error:
            return str(error), read + walk.entry
        read += walk.entry
        kept |= walk.kept
        outputs.update(walk.outputs)
    if not kept:
        return "they are the model's output", read
    try:
        changes = algebra.changes()
    except Stuck as error:
        return str(error), read
    wider = {path: algebra.output(dim, state) for path, (dim, state) in outputs.items()}
    return Stream(algebra.kind, algebra.centred, changes, wider), read
