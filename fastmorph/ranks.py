"""Processes that work on one thing together: what they tell each other, and how the failure of one becomes that of all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastmorph.errors import MorphError

T = TypeVar("T")


class RankError(MorphError):
    """Another rank failed, so that this one stops too; the message has its error."""


class Ranks:
    """The ranks of a process group, in its order; each makes the same calls in the same order.

    Args:
        group: the process group; None: the default one.

    Attributes:
        rank: this process's place in the group.
        size: how many there are.
        sent: bytes of tensors that this rank has sent to others by `move`.
        received: bytes of tensors that it has got from others, by `move` and in parts.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise MorphError("there is no process group: call torch.distributed.init_process_group, or use fastmorph.morph.")
        self.group: Any = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.sent = self.received = 0
        if self.rank < 0:
            raise MorphError("this process is not of the group that is to work; call it on the ranks of the group alone.")

    @property
    def device(self) -> torch.device:
        """Where tensors are that the group's backend moves."""
        kind = "cuda" if "nccl" in dist.get_backend(self.group) else "cpu"
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def exchange(self, value: T) -> list[T]:
        """What each rank has to say, in their order. Raises RankError where another rank has left `together` by an error."""
        told = self._told((value, None))
        for rank, (_, error) in enumerate(told):
            if error is not None:
                raise RankError(f"rank {rank} failed, and so all ranks stop: {error}")
        return [other for other, _ in told]

    def _told(self, said: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, said, group=self.group)
        return found

    def check(self) -> None:
        """Raise RankError where another rank has left `together` by an error: before a collective, which would wait for it."""
        self.exchange(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work in which all ranks meet an error of one where they `exchange` or `check` next, or at the end."""
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            self._told((None, f"{type(error).__name__}: {error}"))
            raise
        self.check()

    def from_rank(self, value: T, source: int) -> T:
        """One rank's value, on all."""
        return self.exchange(value if self.rank == source else None)[source]  # type: ignore[return-value]

    def same(self, what: str, value: T) -> T:
        """The value, which all ranks must have. Raises MorphError where they differ."""
        told = self.exchange(value)
        for rank, other in enumerate(told):
            if other != told[0]:
                raise RankError(f"{what} must be the same on all ranks: rank 0 has {told[0]!r}, rank {rank} has {other!r}.")
        return value

    def move(
        self, tensor: Tensor | None, like: Tensor, device: torch.device, source: int, destination: int | None
    ) -> Tensor | None:
        """A tensor of one rank on another one, or for None on all; None elsewhere. `like` has its shape and dtype."""
        if self.rank != source and destination not in (None, self.rank):
            return None
        into = torch.empty(like.shape, dtype=like.dtype, device=device) if tensor is None else tensor.contiguous()
        if self.rank == source:
            self.sent += into.nbytes * (self.size - 1 if destination is None else source != destination)
        if self.rank != source:
            self.received += into.nbytes
        if destination is None:
            dist.broadcast(into, group=self.group, group_src=source)
        elif source != destination and self.rank == source:
            dist.send(into, group=self.group, group_dst=destination)
        elif source != destination:
            dist.recv(into, group=self.group, group_src=source)
        return into if destination in (None, self.rank) else None

    def count(self, whole: Tensor) -> None:
        """Note that a tensor comes of which each rank had an equal part."""
        self.received += whole.numel() * whole.itemsize * (self.size - 1) // self.size

    def gather(self, part: Tensor) -> Tensor:
        """Parts of one size, (n,), of all ranks one behind the other, (size * n,)."""
        whole = part.new_empty(self.size * len(part))
        self.count(whole)
        dist.all_gather([*whole.chunk(self.size)], part, group=self.group)
        return whole
