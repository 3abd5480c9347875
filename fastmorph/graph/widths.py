"""Many widths of one plan, found on one structure and checked together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastmorph.errors import MorphError
from fastmorph.graph.coupling import Coupling
from fastmorph.graph.growth import Growth
from fastmorph.graph.propose import Found, Proposals, Refusal, tried
from fastmorph.graph.record import Axis
from fastmorph.graph.structure import Structure
from fastmorph.graph.wide_heads import with_heads


@dataclass(frozen=True)
class Width:
    """A layer that is to have so many channels.

    Attributes:
        layer: its name.
        channels: how many.
        way: how it grows where norms read its channels, see `Growth.way`.
        heads: whether heads of attention that reads them grow in proportion.
        accept: called with the growth that was found; raises MorphError where the caller cannot use it.
    """

    layer: str
    channels: int
    accept: Callable[[Growth], None]
    way: str = ""
    heads: bool = False


@dataclass(frozen=True)
class Stage:
    """Widths that were checked together.

    Attributes:
        growths: of each width in turn; None for one that its layer has already. No two grow the same axis.
        growth: all of them; None if nothing grows.
        heads: what grows beside a stream.
    """

    growths: tuple[Growth | None, ...]
    growth: Growth | None
    heads: tuple[Growth, ...] = ()


def find_stages(structure: Structure, widths: Sequence[Width]) -> tuple[list[Stage], Structure | None]:
    """How the layers grow, one behind the other, and the structure that the model then has, where it has been followed.

    Widths that do not meet (that grow no axis in common) are found on one structure, and one run of the model that is grown by
    all of them is checked. A width that meets an earlier one is found on the structure that this run left. Where a check fails,
    halves are checked, down to the width that fails alone: other ways are tried for it, or it is refused.

    Raises MorphError for the first width that cannot be had, with the module, the cause and the nearest width that works.
    """
    stages: list[Stage] = []
    done, most = 0, len(widths)
    last: Found | None = None
    while done < len(widths):
        structure = structure if last is None else last.child
        growths = _together(structure, widths[done : done + most])
        parts = [growth for growth in growths if growth is not None]
        found: Found | None = None
        heads: tuple[Growth, ...] = ()
        if len(parts) > 1 or (parts and structure.is_sure(parts[0])):
            attempt = tried(structure, Growth.of_parts(parts) if len(parts) > 1 else parts[0])
            if isinstance(attempt, Refusal):
                most = len(growths) // 2
                continue
            found = attempt
        elif parts or not growths:
            growths = growths[: growths.index(parts[0])] if parts else []
            width = widths[done + len(growths)]
            proposals = _proposals(structure, width)
            if width.heads:
                both = with_heads(structure, width.layer, width.channels, width.way)
                found, heads = both.found, both.heads
            else:
                found = proposals.found(width.channels)
            growths.append(found.growth)
        for width, growth in zip(widths[done:], growths, strict=False):
            if growth is not None:
                width.accept(growth)
        stages.append(Stage(tuple(growths), None if found is None else found.growth, heads))
        last = found or last
        done, most = done + len(growths), 2 * len(growths)
    return stages, structure if last is None else last.followed


def reach(structure: Structure, width: Width) -> frozenset[str]:
    """The modules whose tensors change, under all their names, if the layer grows in the way that is tried first.

    That is the model itself, and with it everything, where there is none.
    """
    growth = next(iter(_together(structure, [width])), None)
    return frozenset({""}) if growth is None else structure.owners(growth.names)


def _proposals(structure: Structure, width: Width) -> Proposals:
    proposals = Proposals(structure, width.layer, width.way)
    channels, old = width.channels, len(proposals.atoms)
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < old:
        raise MorphError(f"layer {width.layer!r} has {old} channels: channels={channels!r} must be an int of at least that.")
    return proposals


def _together(structure: Structure, widths: Sequence[Width]) -> list[Growth | None]:
    """What is tried first for each of the widths, up to one that meets an earlier one or for which nothing plain is tried."""
    found: list[Growth | None] = []
    grown: set[Axis] = set()
    ways: set[Coupling] = set()
    for width in widths:
        try:
            proposals = _proposals(structure, width)
        except MorphError:  # raised again when its turn comes
            break
        axes = structure.record.axes_of(proposals.atoms)
        if not grown.isdisjoint(axes):
            break
        growth = None
        if width.channels > len(proposals.atoms):
            growth = None if width.way == "turned" or width.heads else proposals.first(width.channels)
            if growth is None or not grown.isdisjoint(growth.layouts) or not ways <= {growth.coupling}:
                break
            grown.update(growth.layouts)
            ways.add(growth.coupling)
        found.append(growth)
    return found
