"""What one operator of a plan did: sizes, residual, time, and how it was solved."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastmorph.equation.decomposition import Decomposition


@dataclass
class Step:
    """What one operator did.

    Attributes:
        layer: name of its target.
        before: shape of its weight before.
        after: shapes of the weights (of two or more dimensions) that stand under that name after.
        residual: largest relative residual of the equations that it solved; 0 without one.
        estimated: whether that residual is an estimate from random sums of channels, see `Decomposition.residual`.
        milliseconds: time it took, with its share, by cost, of the equations solved together.
        how: how the equations were solved.
        note: what else is to be known of it, e.g. that the model is of another class now.
    """

    layer: str
    before: tuple[int, ...]
    after: tuple[tuple[int, ...], ...] = ()
    residual: float = 0.0
    estimated: bool = False
    milliseconds: float = 0.0
    how: str = "no equation to solve"
    note: str = ""

    def add(self, answer: Decomposition[Tensor], milliseconds: float) -> None:
        """Count an equation that was solved for it."""
        if answer.worst >= self.residual:
            self.residual, self.estimated, self.how = answer.worst, answer.estimated, answer.reason
        self.milliseconds += milliseconds
