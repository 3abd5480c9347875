"""How large the noise of the closed form is, and what its factors are multiplied by so that they have one mean square."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

Scale = float | Tensor
"""A number for every item, or one each."""


class Balance(NamedTuple):
    """With noise of root mean square s in it, the weight's factor takes the gain sqrt(ratio / s), and the delta's 1 / gain."""

    least: float  # s where the weight is zero
    ratio: float
    noise: float  # root mean square of the noise in the delta's factor

    def scales(self, spread: Scale) -> tuple[tuple[Scale, Scale], tuple[Scale, Scale]]:
        """For each factor, the root mean square of its noise and its gain, from s."""
        spread = spread + (spread == 0) * self.least
        ratio = self.ratio / spread
        gain = math.sqrt(ratio) if isinstance(ratio, float) else ratio.sqrt()  # of one rounding, both
        return (spread, gain), (self.noise, 1.0 / gain)


def balance_of(weight: Tensor, one: Tensor, two: Tensor, density: float) -> Balance:
    """For a weight (B, rows, columns, *K), its factor `one` (B, hidden, columns, *K1) and the delta's, `two`.

    P keeps a norm, so that the mean squares are known without a look at the factors. The delta has as many ones as the weight
    has rows: a unit matrix, or orthonormal columns.
    """
    hidden, taps, size = one.shape[1], math.prod(two.shape[3:]), math.prod(one.shape[2:])
    extra = hidden - weight.shape[1]
    share = (max(1, weight.shape[1]) / max(1, two.shape[2])) ** 0.5
    noise = share * density / (extra - extra % 2) ** 0.5 if extra > 1 else 0.0
    mean_one = (math.prod(weight.shape[1:]) + extra * size) / max(1, hidden * size)  # times s^2
    mean_two = share**2 * (1.0 + (density**2 * taps if extra > 1 else 0.0)) / max(1, hidden * taps)
    return Balance(max(1, size) ** -0.5, (mean_two / mean_one) ** 0.5 if mean_one else 1.0, noise)
