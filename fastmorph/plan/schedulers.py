"""Learning-rate schedulers that go on with the child's optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastmorph.errors import MorphError

# What PyTorch's schedulers, and timm's (base_values), keep a list of, one entry a parameter group.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "base_values")


class _StepCounter(LRScheduler):
    """Lets an optimizer note that it has stepped, as every scheduler does, and leaves its learning rates alone."""

    def _initial_step(self) -> None:
        pass


def note_steps(optimizer: Optimizer) -> None:
    """Let an optimizer note its steps, for a scheduler that is not made by its constructor."""
    _StepCounter(optimizer)


def rebound(scheduler: Any, optimizer: Optimizer, sources: Sequence[int] = ()) -> Any:
    """A copy of a learning-rate scheduler, with those inside it, that drives `optimizer` from where it stands.

    Args:
        scheduler: of the parent's optimizer.
        optimizer: that one carried over.
        sources: for each group at the end of `optimizer` that the parent's has not, the group whose schedule it follows.

    Raises MorphError if the scheduler was made for another number of parameter groups.
    """
    old = scheduler.optimizer
    count = len(old.param_groups)
    if count + len(sources) != len(optimizer.param_groups):
        raise MorphError(
            f"the scheduler drives {count} parameter groups, the child's optimizer has {len(optimizer.param_groups)}; pass a "
            "scheduler of the optimizer that was carried over."
        )
    note_steps(optimizer)
    new = deepcopy(scheduler, {id(old): optimizer})
    for part in _schedulers(new, optimizer):
        for name in _PER_GROUP:
            entries = vars(part).get(name)
            if isinstance(entries, list | tuple) and len(entries) == count:
                setattr(part, name, [*entries, *(deepcopy(entries[index]) for index in sources)])
    return new


def _schedulers(scheduler: Any, optimizer: Optimizer) -> Iterator[Any]:
    """A scheduler and those inside it."""
    yield scheduler
    for value in vars(scheduler).values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if getattr(part, "optimizer", None) is optimizer:
                yield from _schedulers(part, optimizer)
