"""How a child's outputs are read as its parent's, where a growth makes them larger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastmorph.outputs import Outputs, Path


class Reading(Protocol):
    """A growth, as a certificate sees it."""

    @property
    def told(self) -> str:
        """What a certificate says of it, a clause."""

    def outputs(self, parent: Outputs, child: Outputs) -> Outputs:
        """The child's outputs as the parent would have them."""

    def layer(self, name: str) -> str | None:
        """What the parent calls a layer of the child; None for one that it does not have."""


@dataclass(frozen=True)
class InsertedLayer:
    """A layer of a list is new: so is its place in lists of one entry a layer (caches, hidden states, maps of attention).

    Attributes:
        layers: dotted name of the list.
        place: of the new layer in it.
        before: the names that layers had in it.
        after: those that they have, with the new one.
    """

    layers: str
    place: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def told(self) -> str:
        """What a certificate says of it."""
        return f"lists of one entry a layer without that of {self.layers}.{self.after[self.place]}"

    def outputs(self, parent: Outputs, child: Outputs) -> Outputs:
        """Without the new entry; of a list that begins with what the first layer is given, without the one behind it."""
        before, after, count = _lengths(parent), _lengths(child), len(self.before)
        longer = {
            path: self.place + length - count - 1
            for path, length in after.items()
            if length in (count + 1, count + 2) and before.get(path, length) < length
        }
        return {kept: leaf for path, leaf in child.items() if (kept := _without(path, longer)) is not None}

    def layer(self, name: str) -> str | None:
        """Later ones stood one place before."""
        rest = name.removeprefix(f"{self.layers}.")
        key, _, inside = rest.partition(".")
        if (self.layers and rest == name) or key not in self.after:
            return name
        place = self.after.index(key)
        if place == self.place:
            return None
        return ".".join(filter(None, (self.layers, self.before[place - (place > self.place)], inside)))


@dataclass(frozen=True)
class MoreIds:
    """A vocabulary grew: outputs whose last dimension counts its ids are compared on the old ones."""

    old: int
    new: int

    @property
    def told(self) -> str:
        """What a certificate says of it."""
        return f"the first {self.old} of {self.new} ids"

    def outputs(self, parent: Outputs, child: Outputs) -> Outputs:
        """The old ids' part of what counts ids."""
        return {path: self._cut(parent.get(path), leaf) for path, leaf in child.items()}

    def _cut(self, old: Any, new: Any) -> Any:
        tensors = isinstance(old, Tensor) and isinstance(new, Tensor) and old.ndim == new.ndim > 0
        if tensors and old.shape[-1] < new.shape[-1] == self.new:
            return new[..., : self.old]
        return new

    def layer(self, name: str) -> str | None:
        """No layer is new."""
        return name


def _without(path: Path, gone: Mapping[Path, int]) -> Path | None:
    """A path when some lists have lost an entry; None if it was in such an entry."""
    kept: list[object] = []
    for depth, key in enumerate(path):
        place = gone.get(path[:depth])
        if place is not None and isinstance(key, int):
            if key == place:
                return None
            key -= key > place
        kept.append(key)
    return tuple(kept)


def read(readings: Sequence[Reading], parent: Outputs, child: Outputs) -> Outputs:
    """The child's outputs as the parent's, the last growth taken back first."""
    for reading in reversed(readings):
        child = reading.outputs(parent, child)
    return child


def read_layer(readings: Sequence[Reading], name: str) -> str | None:
    """What the parent calls a layer of the child; None for a new one."""
    found: str | None = name
    for reading in reversed(readings):
        found = None if found is None else reading.layer(found)
    return found


def told(readings: Sequence[Reading]) -> str:
    """What a certificate says it was compared on."""
    return " and ".join(dict.fromkeys(reading.told for reading in readings))


def _lengths(outputs: Outputs) -> dict[Path, int]:
    """How many entries each list among the outputs has."""
    keys: defaultdict[Path, set[int]] = defaultdict(set)
    for path in outputs:
        for depth, key in enumerate(path):
            if isinstance(key, int) and not isinstance(key, bool):
                keys[path[:depth]].add(key)
    return {path: len(found) for path, found in keys.items() if found == set(range(len(found)))}
