"""Weights g v / ||v|| (Salimans and Kingma, "Weight Normalization", 2016) whose directions v grow.

New entries of v add to its norms. A magnitude g that grows by the same factors leaves every old entry of the weight as it is,
so that v is filled as any other weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmorph.graph.find import tensor_of
from fastmorph.graph.growth import Growth
from fastmorph.morphs.widen_fill import Filling, fill_tensor
from fastmorph.plan.transaction import Transaction


class Magnitudes:
    """The magnitudes that a growth must change: those of norms over a dimension that grows.

    Attributes:
        directions: the names of their directions. Gradients of both are others than before, and no linear map of them.
    """

    def __init__(self, transaction: Transaction, growth: Growth | None) -> None:
        self._transaction = transaction
        self._norms: dict[
            tuple[str, str, int], Tensor
        ] = {}  # as the fill of g has them: those of old rows, and of their copies
        if growth is not None:
            record = growth.coupling.record
            for direction, magnitude, dim in record.normed:
                if any(axis in growth.layouts for axis in record.parameter(direction) if axis.dim != dim):
                    self._norms[direction, magnitude, dim] = _norms(tensor_of(transaction.model, direction), dim)
        self.directions = frozenset(direction for direction, _, _ in self._norms)

    def follow(self, name: str, fillings: Sequence[Filling]) -> None:
        """Note how a tensor is filled, if it is one of the magnitudes."""
        for key, norms in self._norms.items():
            if key[1] == name and fillings:
                self._norms[key], _, _ = fill_tensor(fillings, name, norms)

    @torch.no_grad()
    def settle(self) -> None:
        """Set them, when all that grows has grown."""
        for (direction, magnitude, dim), norms in self._norms.items():
            old = tensor_of(self._transaction.model, magnitude)
            factors = _norms(tensor_of(self._transaction.model, direction), dim) / norms
            self._transaction.replace(old, old.detach().double() * factors, linear=None, square=None)


def _norms(direction: Tensor, dim: int) -> Tensor:
    """In float64, of the magnitude's shape."""
    others = [other for other in range(direction.ndim) if other != dim]
    return torch.linalg.vector_norm(direction.detach().double(), dim=others, keepdim=True)
