"""How moments follow weights of which there are several copies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Copies:
    """The map of a moment to so many copies, each with 1 / `shares` of the gradient.

    Attributes:
        times: how many stand behind each other in one parameter.
        power: 1 for a first moment, 2 for a squared one.
        shares: by how many the gradient is shared; 0: by `times`.
        stacked: whether they stand along a new first dimension, and not along the first one there is.
    """

    times: int
    power: int
    shares: int = 0
    stacked: bool = False

    def __call__(self, moment: Tensor) -> Tensor:
        """(n, *) -> (times n, *), or (times, n, *)."""
        copies = moment.expand(self.times, *moment.shape) / (self.shares or self.times) ** self.power
        return copies if self.stacked else copies.flatten(0, 1)
