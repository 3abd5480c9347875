"""Whether a growth is one of a stream, and what it then comes to (see `fastmorph.graph.streams.algebra`)."""

from __future__ import annotations

from fastmorph.graph.growth import Growth, Layout
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
    sizes = min((axis.size, len(layout.origin)) for axis, layout in axes.items())
    if not all(_is_behind(layout, sizes) for layout in axes.values()):
        return "some tensors hold them in another order"
    grown: dict[str, int] = {}
    for axis in axes:
        grown[axis.name] = grown.get(axis.name, 0) + 1
    several = {axis.name for axis in axes if axis.size > sizes[0]}
    reads = record.mask("reads")
    readers = {axis.name for axis in axes if reads[axis.start : axis.start + axis.size].any()}
    stuck: tuple[int, str] = (-1, "")
    for kind, centred in _KINDS[growth.way]:
        algebra = Algebra(kind, centred, grown, readers, several, sizes)
        found, read = _read(algebra, old, child.tapes)
        if isinstance(found, Stream):  # which some weight reads, or it is but an output
            return found if readers or not found.outputs else "they are the model's output"
        stuck = max(stuck, (read, found), key=lambda pair: pair[0])  # of the way that led furthest
    return stuck[1]


def _is_behind(layout: Layout, sizes: tuple[int, int]) -> bool:
    """Whether an axis holds the stream once or several times, each time with new channels behind the old ones."""
    small, large = sizes
    if len(layout.origin) % large:
        return False
    old = layout.copy.reshape(-1, large) == 0
    return bool(old[:, :small].all() and not old[:, small:].any())


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
