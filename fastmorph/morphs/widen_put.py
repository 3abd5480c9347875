"""Grown tensors in the place of old ones, and what must change with them: the magnitudes of weight norms.

A weight g v / ||v|| (Salimans and Kingma, "Weight Normalization", 2016) is filled by its direction v, as any other weight. New
entries add to the norms of v; a magnitude g that grows by the same factors leaves every old entry of the weight as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmorph.elsewhere import values_of
from fastmorph.graph.find import tensor_of
from fastmorph.graph.growth import Growth
from fastmorph.morphs.widen_fill import Filling, fill_tensor
from fastmorph.plan.transaction import Transaction


class Grown:
    """The tensors of a growth, put one by one.

    Args:
        transaction: on the model that grows.
        growth: all of it.
    """

    def __init__(self, transaction: Transaction, growth: Growth) -> None:
        self._transaction, self._growth, record = transaction, growth, growth.coupling.record
        # By direction, magnitude and dimension: norms of old rows, then filled as the magnitude is.
        self._norms: dict[tuple[str, str, int], Tensor] = {}
        for direction, magnitude, dim in record.normed if transaction.with_weights and growth.stream is None else ():
            if any(axis in growth.layouts for axis in record.parameter(direction) if axis.dim != dim):
                self._norms[direction, magnitude, dim] = self._norms_of(direction, dim)

    @torch.no_grad()
    def put(self, name: str, fillings: Sequence[Filling]) -> None:
        """Put a tensor that grows by all these fillings."""
        old = tensor_of(self._transaction.model, name)
        if not self._transaction.with_weights:
            shape = self._growth.shape(name, old.shape)
            self._transaction.replace(old, old.detach().new_empty(shape), linear=None, square=None)
            return
        new, linear, square = fill_tensor(fillings, name, old)
        for key, norms in self._norms.items():
            if name == key[1]:
                self._norms[key], _, _ = fill_tensor(fillings, name, norms)
        # Where norms change, a direction's gradients are another function of the weight's.
        fresh = any(name == direction for direction, _, _ in self._norms)
        self._transaction.replace(old, new, linear=None if fresh else linear, square=None if fresh else square)

    @torch.no_grad()
    def finish(self) -> None:
        """When all of them are there, set magnitudes."""
        for (direction, magnitude, dim), norms in self._norms.items():
            old = tensor_of(self._transaction.model, magnitude)
            factors = self._norms_of(direction, dim) / norms
            self._transaction.replace(old, values_of(old).double() * factors, linear=None, square=None)

    def _norms_of(self, direction: str, dim: int) -> Tensor:
        """In float64, of the magnitude's shape."""
        v = values_of(tensor_of(self._transaction.model, direction)).double()
        return torch.linalg.vector_norm(v, dim=[other for other in range(v.ndim) if other != dim], keepdim=True)


def put_grown(transaction: Transaction, growth: Growth, fillings: Sequence[Filling]) -> None:
    """Put all tensors that grow, all by these fillings."""
    grown = Grown(transaction, growth)
    for name in growth.names:
        grown.put(name, fillings)
    grown.finish()
