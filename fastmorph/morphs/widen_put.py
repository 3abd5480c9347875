"""Grown tensors in the place of old ones, and what must change with them: the magnitudes of weight norms.

A weight g v / ||v|| (Salimans and Kingma, "Weight Normalization", 2016) is filled by its direction v, as any other weight: the
new v' is to count as g / ||v|| v'. So g is multiplied by ||v'|| / ||v||, where ||v|| is filled as g is. Where v' would be zero,
and have no direction, g is zero instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmorph.elsewhere import values_of
from fastmorph.graph.find import tensor_of
from fastmorph.graph.growth import Growth
from fastmorph.morphs.widen_fill import Filling, filled, filled_moments
from fastmorph.plan.lineage import Map
from fastmorph.plan.transaction import Transaction


def _same(moment: Tensor) -> Tensor:
    return moment


class Grown:
    """The tensors of a growth, put one by one.

    Args:
        transaction: on the model that grows.
        growth: all of it.
    """

    def __init__(self, transaction: Transaction, growth: Growth) -> None:
        self._transaction, self._growth, record = transaction, growth, growth.coupling.record
        # By direction, magnitude and dimension: norms as they were, then filled as the magnitude is.
        self._norms: dict[tuple[str, str, int], Tensor] = {}
        self._stretched: set[str] = set()  # directions and magnitudes of norms that change
        for key in record.normed if transaction.with_weights and growth.stream is None else ():
            grown = [axis.dim for axis in record.parameter(key[0]) if axis in growth.layouts]
            if grown:
                self._norms[key] = self._norms_of(key[0], key[2])
            if any(dim != key[2] for dim in grown):
                self._stretched.update(key[:2])

    @torch.no_grad()
    def put(self, name: str, fillings: Sequence[Filling]) -> None:
        """Put a tensor that grows by all these fillings."""
        old = tensor_of(self._transaction.model, name)
        shape = self._growth.shape(name, old.shape)
        if not self._transaction.with_weights:
            self._transaction.replace(old, old.detach().new_empty(shape), linear=None, square=None)
            return
        fill = filled(fillings, name)
        new = self._transaction.compute(old, shape, lambda: fill(old))
        for key, norms in self._norms.items():
            if name == key[1]:
                self._norms[key] = fill(norms)
        self._replace(name, old, new, *filled_moments(fillings, name))

    @torch.no_grad()
    def finish(self) -> None:
        """When all of them are there, set magnitudes, and directions where there are none."""
        for (direction, magnitude, dim), norms in self._norms.items():
            found = self._norms_of(direction, dim)
            if (found == 0).any():
                old = tensor_of(self._transaction.model, direction)
                some = old.new_full((), (old.numel() // old.shape[dim]) ** -0.5)
                self._replace(direction, old, torch.where(found == 0, some, values_of(old)))
            old = tensor_of(self._transaction.model, magnitude)
            self._replace(magnitude, old, values_of(old).double() * (found / norms))

    def _replace(self, name: str, old: Tensor, new: Tensor, linear: Map = _same, square: Map = _same) -> None:
        """Put a tensor; where norms change, gradients are another function of the weight's, and moments start afresh."""
        fresh = name in self._stretched
        self._transaction.replace(old, new, linear=None if fresh else linear, square=None if fresh else square)

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
