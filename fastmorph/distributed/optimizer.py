"""The state of an optimizer whose tensors are sharded as its parameters are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fastmorph.distributed.shards import RankShelf, shard_like
from fastmorph.errors import MorphError
from fastmorph.plan.lineage import Lineage
from fastmorph.plan.optimizers import carry_over, check_optimizer


def check_sharded_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that cannot be carried over, before any work. Raises MorphError with the way that works."""
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):  # its module warns at import
        raise MorphError(
            "a ZeroRedundancyOptimizer keeps each parameter's state on one rank alone: call consolidate_state_dict(to=rank) "
            "for every rank, which takes state_dict() when it is its turn; load that into a plain optimizer of the model's "
            "parameters, pass that one, and load Morphed.optimizer.state_dict() into a new ZeroRedundancyOptimizer; or shard "
            "the model by fully_shard instead."
        )
    check_optimizer(optimizer, model)


def carry_shards(
    optimizer: Optimizer, child: nn.Module, lineage: Lineage, shelf: RankShelf
) -> tuple[Optimizer, tuple[int, ...]]:
    """`carry_over` where moments are shards: each is read, follows its weight, and is cut as the child's parameter is.

    Raises MorphError as it does.
    """
    away: Any = object.__new__(type(optimizer))
    vars(away).update(vars(optimizer))
    away.state = {
        parameter: {key: shelf.sharded(value) if isinstance(value, DTensor) else value for key, value in state.items()}
        for parameter, state in optimizer.state.items()
    }

    def place(value: Tensor, parameter: nn.Parameter) -> Tensor:
        return shard_like(value, parameter) if value.shape == parameter.shape else value

    carried = carry_over(away, child, lineage, place=place)
    shelf.let_go()
    return carried
