"""By what factors a grown model's numbers may differ from the old one's: unknowns, and equations between them.

Factors are positive, and all that is known of them are products: equations are linear in their logarithms, and are solved one
by one as they come. Unknowns that no equation decides are 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Unknown = tuple[str, float]  # a parameter, and what is added to it
_SAME = 1e-6  # logarithms that differ by less are equal: factors come from sizes, and from numbers that models keep in float32


@dataclass(frozen=True)
class Scale:
    """The logarithm of a factor: powers of unknowns, and a number."""

    powers: tuple[tuple[Unknown, float], ...] = ()
    log: float = 0.0

    def __add__(self, other: Scale) -> Scale:
        powers = dict(self.powers)
        for unknown, power in other.powers:
            powers[unknown] = powers.get(unknown, 0.0) + power
        return Scale(tuple(pair for pair in powers.items() if pair[1]), self.log + other.log)

    def __mul__(self, power: float) -> Scale:
        return Scale(tuple((unknown, power * own) for unknown, own in self.powers if power), power * self.log)

    def __sub__(self, other: Scale) -> Scale:
        return self + other * -1.0


ONE = Scale()


class Scales:
    """Equations, solved as they come; `rank` says which unknown an equation decides: the one of the smallest rank."""

    def __init__(self, rank: Callable[[Unknown], Any]) -> None:
        self._rank = rank
        self._solved: dict[Unknown, Scale] = {}

    def known(self, scale: Scale) -> Scale:
        """A factor by those unknowns that are not decided."""
        while any(unknown in self._solved for unknown, _ in scale.powers):
            reduced = Scale((), scale.log)
            for unknown, power in scale.powers:
                reduced += self._solved.get(unknown, Scale(((unknown, 1.0),))) * power
            scale = reduced
        return scale

    def equate(self, one: Scale, two: Scale) -> bool:
        """Let two factors be equal; False where they cannot be."""
        rest = self.known(one - two)
        if not rest.powers:
            return abs(rest.log) < _SAME
        unknown, power = min(rest.powers, key=lambda pair: self._rank(pair[0]))
        others = Scale(tuple(pair for pair in rest.powers if pair[0] != unknown), rest.log)
        self._solved[unknown] = others * (-1.0 / power)
        return True

    def is_one(self, scale: Scale) -> bool:
        """Whether a factor is 1 whatever the unknowns are."""
        rest = self.known(scale)
        return not rest.powers and abs(rest.log) < _SAME

    def log_of(self, scale: Scale) -> float:
        """The logarithm of a factor, where all that is not decided is 1."""
        return self.known(scale).log
