"""How large the noise of the closed form is, and what its factors are multiplied by so that they have one mean square."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Balance(NamedTuple):
    """With noise of root mean square s in it, the weight's factor takes the gain sqrt(ratio / s), and the delta's 1 / gain."""

    least: float  # s where the weight is zero
    ratio: float
    noise: float  # root mean square of the noise in the delta's factor

    def scales(self, spread: Tensor) -> tuple[Tensor, Tensor]:
        """For each factor (B, 2), the root mean square of its noise and its gain, from s (B,)."""
        spread = torch.where(spread > 0, spread, self.least)
        gain = (self.ratio / spread).sqrt()
        return torch.stack([spread, gain], 1), torch.stack([torch.full_like(gain, self.noise), 1.0 / gain], 1)


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
