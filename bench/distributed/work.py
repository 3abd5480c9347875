"""What the ranks run: equations divided among them, and the growth of a sharded network."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastmorph as fm
from bench.peak import peak_of
from fastmorph.ranks import Ranks

EQUATIONS, CHANNELS, HIDDEN = 16, 32, 96
WIDTH, BLOCKS = 1024, 8
_SOLVING: dict[str, Any] = {"solver": fm.General(max_iter=1), "memory_budget": 0, "generator": 0, "progress": False}


def problems() -> list[fm.Problem[torch.Tensor]]:
    """Half-steps, each a batch of its own, so that there is something to deal."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(EQUATIONS, CHANNELS, CHANNELS, 3, 3, generator=generator, dtype=torch.float64)
    return [fm.Problem(weight, HIDDEN) for weight in weights]


def alone() -> list[fm.Decomposition[torch.Tensor]]:
    """All equations in one process."""
    return fm.decompose_many(problems(), **_SOLVING)


def divided(destination: int | None) -> list[Any]:
    """The same by all ranks, weights on the first; nothing goes back to the caller but whether the bits are the same."""
    given = problems() if dist.get_rank() == 0 else [fm.Problem(None, HIDDEN) for _ in range(EQUATIONS)]
    return fm.decompose_many(given, process_group=dist.group.WORLD, destination=destination, **_SOLVING)


def runs(destination: int | None) -> None:
    """For the clock."""
    divided(destination)


def is_the_same() -> bool:
    """Whether each answer has the bits of one process's."""
    return all(
        torch.equal(a.first, b.first) and torch.equal(a.second, b.second) for a, b in zip(divided(None), alone(), strict=True)
    )


def bytes_sent() -> int:
    """Bytes that this rank gives to the others, tensors and what the ranks tell each other, answers wanted on the first."""
    sent, made, exchange = 0, [], Ranks._told
    init: Callable[..., None] = Ranks.__init__

    def noted(self: Ranks, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    def told(self: Ranks, said: Any) -> list[Any]:
        nonlocal sent
        sent += len(pickle.dumps(said)) * (self.size - 1)
        return exchange(self, said)

    Ranks.__init__, Ranks._told = noted, told  # type: ignore[method-assign]
    try:
        divided(0)
    finally:
        Ranks.__init__, Ranks._told = init, exchange  # type: ignore[method-assign]
    return sent + sum(each.sent for each in made)


class Block(nn.Module):
    """A residual feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def shard(model: nn.Module) -> None:
    for block in model:
        fully_shard(block)
    fully_shard(model)


def growth() -> tuple[int | None, int, int, int]:
    """The peak of a rank's memory while a sharded network grows, its child's shards, the whole child, the largest parameter."""
    torch.manual_seed(0)
    parent = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    shard(parent)
    plan = [fm.Widen(f"{i}.up", 3 * WIDTH) for i in range(BLOCKS)]
    inputs, made = torch.zeros(1, WIDTH), []
    options: dict[str, Any] = {"parallelize": shard, "example_inputs": inputs, "verify": False, "memory_budget": 0}
    fm.distributed.morph(parent, [], **options)  # what is imported at first use
    peak = peak_of(lambda: made.append(fm.distributed.morph(parent, plan, **options).model))
    parameters = list(made[0].parameters())
    own = sum(parameter.to_local().nbytes for parameter in parameters)
    return peak, own, sum(p.nbytes for p in parameters), max(p.nbytes for p in parameters)
