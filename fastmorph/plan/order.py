"""Turns of a plan: widths are found and checked together, though operators that change layers stand between them.

A local operator keeps what its layer computes, so that what is known of all other channels stays right. A width may
therefore be found before it, if it changes no tensor of that layer: both orders give the same child, bit by bit, and one
following of the network serves them all. What meets keeps its order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from fastmorph.graph.structure import Structure

EVERYTHING = frozenset({""})  # the modules under the model itself


def is_wide(operator: Any) -> bool:
    """Whether an operator joins widths: it tells what it reaches."""
    return hasattr(type(operator), "reach")


def may_move(operator: Any) -> bool:
    """Whether it is known what an operator changes: it is a width or a local one, of one layer, named as it stands."""
    plain = isinstance(operator.target, str) and not set(operator.target) & set("*?[")
    return plain and (getattr(type(operator), "local", False) or is_wide(operator))


def reaches(operators: Sequence[Any], structure: Structure) -> list[frozenset[str]]:
    """Of each operator, the modules whose tensors it changes."""
    names, found = structure.skeleton.names, []
    for operator in operators:
        if is_wide(operator):
            found.append(operator.reach(structure))
        else:
            inside = (name for name in names if name.startswith(f"{operator.target}."))
            found.append(structure.owners(inside) | {operator.target})
    return found


def turns(reaches: Sequence[frozenset[str]], wide: Sequence[bool]) -> list[list[int]]:
    """The places of operators, turn by turn, each turn of one sort: in as few turns as this finds.

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
            if wide[place] == sort and not waiting.meets(reaches[place]):
                turn.append(place)
            else:
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
        self._modules, self._around = set[str](), set[str]()
        self.add(modules)

    def add(self, modules: frozenset[str]) -> None:
        """Add modules."""
        self._modules |= modules
        self._around.update(around for module in modules for around in _around(module))

    def covers(self, module: str) -> bool:
        """Whether a module is one of them, or inside of one."""
        return any(around in self._modules for around in _around(module))

    def meets(self, modules: frozenset[str]) -> bool:
        """Whether one of these is, is inside of, or holds one of them."""
        return any(module in self._around or self.covers(module) for module in modules)


def _around(module: str) -> Iterator[str]:
    """The module itself and all that hold it, the model last."""
    while module:
        yield module
        module = module.rpartition(".")[0]
    yield ""
