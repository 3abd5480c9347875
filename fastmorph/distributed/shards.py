"""Full tensors from shards and shards from full tensors, for this rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fastmorph.elsewhere import Elsewhere, Shelf, values_of
from fastmorph.ranks import Ranks


class RankShelf(Shelf):
    """Each rank holds an equal part of every tensor that is put away; to read one, all ranks read it."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def keep(self, value: Tensor) -> Tensor:
        """Keep this rank's part. Vectors stay whole on every rank."""
        if value.ndim < 2:
            return value
        shape, count = value.shape, value.numel()
        size = -(-count // self.ranks.size)
        part = value.new_zeros(size)
        own = value.reshape(-1)[self.ranks.rank * size : (self.ranks.rank + 1) * size]
        part[: len(own)] = own

        def fetch() -> Tensor:
            self.ranks.check()
            return self.ranks.gather(part)[:count].view(shape)

        return self.of(torch.empty(shape, dtype=value.dtype, device="meta"), value.device, fetch)

    def sharded(self, tensor: Tensor) -> Elsewhere:
        """A tensor as it stands on the ranks, a `DTensor` or a whole one on each, as one whose values are elsewhere."""

        def fetch() -> Tensor:
            if not isinstance(tensor, DTensor):
                return tensor.detach()
            self.ranks.check()
            self.ranks.count(tensor)
            return whole(tensor.detach())

        new = self.of(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor.device, fetch)
        new.origin = tensor
        return new


@torch.no_grad()
def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a full tensor, placed as `like` is: memory of its own.

    Ranks talk only where the values are elsewhere, and are not placed so already.
    """
    origin = value.origin if isinstance(value, Elsewhere) else None
    if isinstance(origin, DTensor) and isinstance(like, DTensor):
        one, two = (tensor._spec for tensor in (origin, like))
        if (one.mesh, one.placements, one.shape) == (two.mesh, two.placements, two.shape):
            return origin.detach().clone()
    value = values_of(value)
    if not isinstance(like, DTensor):
        return value.clone(memory_format=torch.contiguous_format)
    shape, offset = compute_local_shape_and_global_offset(value.shape, like.device_mesh, like.placements)
    cut: Any = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    local = value[cut].clone(memory_format=torch.contiguous_format)
    meta = torch.empty(value.shape, device="meta")
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=meta.shape, stride=meta.stride())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, of what each rank has."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parameter_like(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    """A parameter that holds this rank's shard of a full tensor, placed and marked as `like` is."""
    new = nn.Parameter(shard_like(value, like), like.requires_grad)
    vars(new).update({key: mark for key, mark in vars(like).items() if not key.startswith("_")})
    return new
