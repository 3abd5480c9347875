"""Grown tensors in the place of old ones, and what must change with them: the magnitudes of weight norms.

A weight g v / ||v|| (Salimans and Kingma, "Weight Normalization", 2016) is filled by its direction v, as any other weight: the
new v' is to count as g / ||v|| v'. So g is multiplied by ||v'|| / ||v||, where ||v|| is filled as g is. Where v' would be zero,
and have no direction, g is zero instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmorph.elsewhere import Elsewhere, values_of
from fastmorph.equation.arrays import host_waits
from fastmorph.graph.find import tensor_of
from fastmorph.graph.growth import Growth
from fastmorph.morphs.widen_fill import Filling, Growing, fill_tensors, writing_of
from fastmorph.morphs.widen_launch import is_launched, write_all
from fastmorph.plan.lineage import Map
from fastmorph.plan.transaction import Transaction

_TOGETHER = 2**30  # bytes of old tensors that wait at most, which is what launches cost in memory


def _same(moment: Tensor) -> Tensor:
    return moment


class Grown:
    """The tensors of a growth, put one by one; those on a device that queues wait for each other.

    One copy from the device then takes the sizes of all, and where a kernel writes them, one launch does.

    Args:
        transaction: on the model that grows.
        growth: all of it.
    """

    def __init__(self, transaction: Transaction, growth: Growth) -> None:
        self._transaction, self._growth, record = transaction, growth, growth.coupling.record
        # By direction, magnitude and dimension: norms as they were, then filled as the magnitude is.
        self._norms: dict[tuple[str, str, int], Tensor] = {}
        self._stretched: set[str] = set()  # directions and magnitudes of norms that change
        self._waiting: list[Growing] = []
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
        backend = self._transaction.solving.get("backend")
        if self._transaction.late and not self._norms:
            writing = writing_of(fillings, name)
            new = self._transaction.compute(old, shape, lambda: write_all([writing(values_of(old))], backend)[0])
            self._transaction.replace(old, new, linear=None, square=None)
            return
        # Where the parent is consumed, each old tensor is gone before the next new one comes.
        launched = is_launched(old, backend)
        queued = launched or (host_waits(old.device) and not isinstance(old, Elsewhere))
        if self._transaction.consume or not queued:
            self._put([(fillings, name, old)])
            return
        self._waiting.append((fillings, name, old))
        if sum(tensor.nbytes for _, _, tensor in self._waiting) >= _TOGETHER:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Put those that wait."""
        waiting, self._waiting = self._waiting, []
        self._put(waiting)

    def _put(self, tensors: list[Growing]) -> None:
        norms = [(fillings, key) for fillings, name, _ in tensors for key in self._norms if name == key[1]]
        those = [(fillings, key[1], self._norms[key]) for fillings, key in norms]
        filled = fill_tensors([*tensors, *those], self._transaction.solving.get("backend"))
        for (_, name, old), (new, linear, square) in zip(tensors, filled, strict=False):
            self._replace(name, old, new, linear, square)
        self._norms.update((key, new) for (_, key), (new, _, _) in zip(norms, filled[len(tensors) :], strict=True))

    @torch.no_grad()
    def finish(self) -> None:
        """When all of them have been put, set magnitudes, and directions where there are none."""
        self.flush()
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
