"""Where a child's parameters come from: what an optimizer needs to know to go on with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Ancestry:
    """One parameter's past.

    Attributes:
        ancestor: the parent's parameter whose optimizer options it has.
        linear: maps, in order, that take a first moment (a momentum, an average of gradients) of the ancestor to the
            parameter's; None if there is no way: the moment starts afresh.
        square: the same for second moments (averages or sums of squared gradients).
        joined: whether the parameter descends from none, and has the ancestor for its options alone.
        parts: of one that descends from several parameters, laid behind each other along the first dimension, the past of each;
            the maps are what came after. Its options are those of the first.
    """

    ancestor: nn.Parameter
    linear: tuple[Map, ...] | None = ()
    square: tuple[Map, ...] | None = ()
    joined: bool = False
    parts: tuple[Ancestry, ...] = ()

    def then(self, linear: Map | None, square: Map | None) -> Ancestry:
        """The past of what these maps make of the parameter."""
        return replace(self, linear=_then(self.linear, linear), square=_then(self.square, square))


class Lineage:
    """The ancestry of each parameter of a model that is being morphed."""

    def __init__(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Start from (child's parameter, parent's parameter) pairs of equal values."""
        self._of = {child: Ancestry(parent) for child, parent in pairs}
        # The parent's parameters, with their places among its `parameters()`.
        self.ancestors = {past.ancestor: place for place, past in enumerate(self._of.values())}

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return parameter in self._of

    def __getitem__(self, parameter: nn.Parameter) -> Ancestry:
        """The ancestry of a parameter. Raises KeyError for one that is not of this model."""
        return self._of[parameter]

    def replaced(self, old: nn.Parameter, new: nn.Parameter, linear: Map | None, square: Map | None) -> None:
        """Let `new` take the place of `old`."""
        past = self._of.pop(old, None)
        if past is not None:
            self._of[new] = past.then(linear, square)

    def renamed(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Let `new` be what `old` was, if that is known."""
        if old in self._of:
            self._of[new] = self._of.pop(old)

    def copied(self, new: nn.Parameter, old: Sequence[nn.Parameter], linear: Map | None, square: Map | None) -> None:
        """Let `new` descend from what `old` descend from, beside them; of several, it is made of all, one behind the other."""
        parts = tuple(self._of[each] for each in old if each in self._of)
        if len(parts) == len(old):
            past = Ancestry(parts[0].ancestor, parts=parts) if len(parts) > 1 else parts[0]
            self._of[new] = past.then(linear, square)

    def of_twins(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> Lineage:
        """The same ancestries for another model's parameters, given as (this model's, the other's)."""
        new = Lineage(())
        new._of = {twin: self._of[parameter] for parameter, twin in pairs}
        new.ancestors = self.ancestors
        return new

    def joined(self, new: nn.Parameter, near: nn.Parameter) -> None:
        """Let `new`, unless it is known, share the options of `near` and start afresh."""
        past = self._of.get(near)
        if past is not None and new not in self._of:
            self._of[new] = Ancestry(past.ancestor, None, None, joined=True)


def _then(maps: tuple[Map, ...] | None, new: Map | None) -> tuple[Map, ...] | None:
    return None if maps is None or new is None else (*maps, new)
