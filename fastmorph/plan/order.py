"""Turns of a plan: widths are found and checked together, though operators that change layers stand between them.

A local operator keeps what its layer computes, so that what is known of all other channels stays right. A width may
therefore be found before it, if it changes no tensor of that layer: both orders give the same child, bit by bit, and one
following of the network serves them all. What meets keeps its order; and widths that meet, neighbours as written, are written
at once, others one after the other, since the noise of the second has the size of what the first has left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from fastmorph.errors import MorphError
from fastmorph.graph.structure import Structure
from fastmorph.plan.patterns import expanded, has_factor, has_pattern, may_match_inside, named

EVERYTHING = frozenset({""})  # the modules under the model itself


def is_wide(operator: Any) -> bool:
    """Whether an operator joins widths: it tells what it reaches."""
    return hasattr(type(operator), "reach")


def may_move(operator: Any) -> bool:
    """Whether it can be known what an operator changes: it is a width or a local one, and its layer has a name."""
    return isinstance(operator.target, str) and (getattr(type(operator), "local", False) or is_wide(operator))


def neighbours(operators: Sequence[Any]) -> list[list[Any]]:
    """Operators that have their turn together: neighbours of one class, and alike in whether their names are patterns."""
    return [list(group) for _, group in groupby(operators, lambda operator: (type(operator), has_pattern(operator)))]


class Decided(NamedTuple):
    """What an operator comes to before those in front of it have had their turn: a name for its pattern, and, of a width, a
    number for its factor.

    Attributes:
        operator: with these.
        reach: the modules whose tensors it changes.
        written: the place of the operator that was written.
        group: a number for its neighbours.
    """

    operator: Any
    reach: frozenset[str]
    written: int
    group: int


def decide(operators: Sequence[Any], structure: Structure, model: nn.Module) -> list[Decided]:
    """What the first operators come to, up to one whose names or number depend on those in front of it.

    A local operator may change the names inside of its layer, and any operator the channels of what it reaches.
    """
    found: list[Decided] = []
    changed, renamed, place = Reach(), Reach(), 0
    for group_number, group in enumerate(neighbours(operators)):
        for part in [group] if hasattr(type(group[0]), "apply_together") else [[operator] for operator in group]:
            try:
                each = [expanded(operator, model) if is_wide(operator) else named(operator, model) for operator in part]
            except MorphError:  # at its place
                return found
            if not all(_is_known(operator, ones, changed, renamed) for operator, ones in zip(part, each, strict=True)):
                return found
            for number, ones in enumerate(each):
                found += [Decided(one, _reach(one, structure), place + number, group_number) for one in ones]
            place += len(part)
            for one in found[len(found) - sum(map(len, each)) :]:
                changed.add(one.reach)
                if not is_wide(one.operator):
                    renamed.add(one.reach)
    return found


def _is_known(operator: Any, ones: Sequence[Any], changed: Reach, renamed: Reach) -> bool:
    """Whether an operator comes to these, whatever is done to what operators in front of it change and rename."""
    names = frozenset(one.target for one in ones)
    if has_pattern(operator):
        nested = any(around in names for name in names for around in _around(name.rpartition(".")[0]))
        if nested or renamed.meets(names) or any(may_match_inside(operator.target, module) for module in renamed.modules):
            return False
    return not (is_wide(operator) and has_factor(operator) and changed.meets(names))


def _reach(operator: Any, structure: Structure) -> frozenset[str]:
    """The modules whose tensors an operator changes."""
    if is_wide(operator):
        reached: frozenset[str] = operator.reach(structure)
        return reached
    inside = (name for name in structure.skeleton.names if name.startswith(f"{operator.target}."))
    return structure.owners(inside) | {operator.target}


def turns_of(decided: Sequence[Decided]) -> list[list[int]]:
    """The places of operators, turn by turn, each turn of one sort; neighbours that meet have one turn."""
    units: list[tuple[list[int], Reach, int]] = []
    for place, one in enumerate(decided):
        met = [unit for unit in units if unit[2] == one.group and is_wide(one.operator) and unit[1].meets(one.reach)]
        for unit in met:
            units.remove(unit)
        places = sorted([place, *(other for unit in met for other in unit[0])])
        units.append((places, Reach(frozenset().union(*(decided[other].reach for other in places))), one.group))
    units.sort(key=lambda unit: unit[0])
    reaches, wide = [frozenset(unit[1].modules) for unit in units], [is_wide(decided[unit[0][0]].operator) for unit in units]
    return [sorted(place for number in turn for place in units[number][0]) for turn in turns(reaches, wide)]


def turns(reaches: Sequence[frozenset[str]], wide: Sequence[bool]) -> list[list[int]]:
    """The places of operators, turn by turn, each turn of one sort: in as few turns as this finds.

    Widths that meet have different ones.

    Args:
        reaches: of each operator, the modules whose tensors it may change, those inside of them included.
        wide: of each operator, whether it is a width.
    """
    found: list[list[int]] = []
    left, sort = list(range(len(wide))), True
    while left:
        waiting = Reach()
        turn = []
        for place in left:
            taken = wide[place] == sort and not waiting.meets(reaches[place])
            if taken:
                turn.append(place)
            if sort or not taken:  # local operators of one turn run in their order
                waiting.add(reaches[place])
        left = [place for place in left if place not in set(turn)]
        sort = not sort
        found += [turn] if turn else []
    return found


def interleaved(wide: Sequence[bool]) -> bool:
    """Whether something else stands between widths."""
    return sum(sort for sort, _ in groupby(wide)) > 1


class Reach:
    """A set of modules with all that is inside of them."""

    def __init__(self, modules: frozenset[str] = frozenset()) -> None:
        self.modules, self._around = set[str](), set[str]()
        self.add(modules)

    def add(self, modules: frozenset[str]) -> None:
        """Add modules."""
        self.modules |= modules
        self._around.update(around for module in modules for around in _around(module))

    def covers(self, module: str) -> bool:
        """Whether a module is one of them, or inside of one."""
        return any(around in self.modules for around in _around(module))

    def meets(self, modules: frozenset[str]) -> bool:
        """Whether one of these is, is inside of, or holds one of them."""
        return any(module in self._around or self.covers(module) for module in modules)


def _around(module: str) -> Iterator[str]:
    """The module itself and all that hold it, the model last."""
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""
