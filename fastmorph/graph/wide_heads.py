"""A stream and the heads of all attention that reads it, in proportion, for code that divides the width by their number.

Neither can be followed without the other: such code runs at no width between. So the model is resized by both and followed
once, with the rows of each head as one channel (`fastmorph.graph.heads`). Of that run, what is read of the stream leaves the
new heads out (`Record.untaped`); that these do no harm is seen as where heads are added alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastmorph.errors import MorphError
from fastmorph.graph.flow import is_real
from fastmorph.graph.growth import Growth
from fastmorph.graph.heads import Heads, by_heads, find_heads
from fastmorph.graph.propose import Found, Proposals, Refusal, tried
from fastmorph.graph.structure import Structure


@dataclass(frozen=True)
class WithHeads:
    """A stream that grows with the heads beside it.

    Attributes:
        found: both, and the structure that the model then has.
        heads: the growth of each module's heads.
    """

    found: Found
    heads: tuple[Growth, ...]


def with_heads(structure: Structure, layer: str, channels: int, way: str) -> WithHeads:
    """A layer's stream at so many channels, and heads of the size that they have: as many more.

    Raises MorphError where that cannot be, with the module, the cause and the nearest width that works.
    """
    first = _stream(structure, layer, channels, way)
    if structure.untouched(first) is not None and structure.masked is not None:
        return with_heads(structure.masked, layer, channels, way)
    weights = sorted({name for name in _queries(structure) if name in first.names})
    if not weights:
        raise MorphError(
            f"layer {layer!r}: no attention reads its channels, so that there are no heads beside them; heads=False."
        )
    modules = [name.rpartition(".")[0] for name in weights]
    structure = by_heads(structure, modules)
    stream = _stream(structure, layer, channels, way)
    width, held = len(structure.channels(layer)), [find_heads(structure, name) for name in weights]
    _check(layer, width, channels, held)
    heads = tuple(each.grown(structure, *(len(n) * channels // width for n in (each.queries, each.groups))) for each in held)
    growth = replace(Growth.of_parts([stream, *heads]), way=way, alone=stream, numbers=True)
    refusals = []
    for attempt in (growth, replace(growth, cautious=frozenset(growth.repeats)), replace(growth, numbers=False)):
        found = tried(structure, attempt)
        if isinstance(found, Found):
            return WithHeads(replace(found, followed=found.child.followed_by({})), heads)
        refusals.append(found)
    raise MorphError(
        f"layer {layer!r} cannot get more channels with heads in proportion: {refusals[0].cause}; {refusals[0].remedy}."
    )


def _stream(structure: Structure, layer: str, channels: int, way: str) -> Growth:
    found = Proposals(structure, layer, way).stream(channels)
    if isinstance(found, Refusal):
        raise MorphError(f"layer {layer!r} cannot get more channels: {found.cause}; {found.remedy}.")
    return found


def _queries(structure: Structure) -> Iterable[str]:
    """The weights that make the queries of a softmax."""
    record = structure.record
    for _, label in record.scores:
        if is_real(label):
            yield record.axis_of(int(label.flatten()[0])).name


def _check(layer: str, width: int, channels: int, held: list[Heads]) -> None:
    """Raise MorphError unless all modules get a whole number of heads."""
    step = math.lcm(*(width // math.gcd(width, len(each.groups)) for each in held))
    if channels % step:
        raise MorphError(
            f"layer {layer!r} cannot have {channels} channels with heads in proportion: {held[0].layer!r} has "
            f"{len(held[0].groups)} heads to {width} channels; the nearest number that works is "
            f"{max(width + step, round(channels / step) * step)}."
        )
