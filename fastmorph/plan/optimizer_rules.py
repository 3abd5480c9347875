"""How an optimizer's state follows a weight that changes, and the door by which others add theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from fastmorph.elsewhere import values_of
from fastmorph.errors import MorphError
from fastmorph.plan.lineage import Ancestry

Follow = Literal["linear", "square", "size"]
Start = Callable[[nn.Parameter, Mapping[str, Any]], dict[str, Any]]


class FreshStateWarning(UserWarning):
    """Some state of an optimizer starts afresh, because no rule says how it follows a weight that changes."""


@dataclass(frozen=True, eq=False)
class OptimizerRule:
    """How the state of one class of optimizers follows; see `optimizer_rule` for its attributes."""

    moments: Mapping[str, Follow]
    start: Start | None = None


_RULES: dict[type[Optimizer] | str, OptimizerRule] = {}


def optimizer_rule(optimizer_cls: type[Optimizer] | str, moments: Mapping[str, Follow], *, start: Start | None = None) -> None:
    """Teach `morph(..., optimizer=)` how the state of an optimizer follows a parameter that changes its shape or its values.

    Parameters that a morph leaves as they are keep their state whatever it is. Numbers and tensors without dimensions (step
    counts) are copied. Where a parameter changes and a tensor of its state has no rule, the whole of that parameter's state
    starts afresh, and a `FreshStateWarning` names both.

    Args:
        optimizer_cls: the class, or its "module.qualified_name", so that its package need not be imported. It serves for
            subclasses that have no rule of their own.
        moments: {key of a parameter's state: what the tensor there is, of the parameter's shape}: "linear", an average of
            gradients; "square", an average, sum or maximum of squared gradients; "size", of absolute gradients.
        start: takes a parameter without state and its group, and returns the state that the optimizer expects to find, for
            optimizers that make it when they are made, as Adagrad does. None: the optimizer's first step makes it.

    Raises:
        MorphError: the class has a rule, or an argument is none.
    """
    if not isinstance(optimizer_cls, str) and not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise MorphError(f"optimizer_rule takes a class of torch.optim.Optimizer or its qualified name, not {optimizer_cls!r}.")
    for key, follow in moments.items():
        if follow not in ("linear", "square", "size"):
            raise MorphError(f"optimizer_rule: {key!r} is {follow!r}; it must be 'linear', 'square' or 'size'.")
    if optimizer_cls in _RULES or (isinstance(optimizer_cls, type) and _qualified_name(optimizer_cls) in _RULES):
        raise MorphError(f"{optimizer_cls!r} has a rule already; a subclass of your own may have another.")
    _RULES[optimizer_cls] = OptimizerRule(dict(moments), start)


def find_optimizer_rule(optimizer: Optimizer) -> OptimizerRule | None:
    """The rule of the nearest of an optimizer's classes that has one."""
    rules = (_RULES.get(cls) or _RULES.get(_qualified_name(cls)) for cls in type(optimizer).__mro__)
    return next((rule for rule in rules if rule is not None), None)


def follow_moment(moment: Tensor, follow: Follow, past: Ancestry) -> Tensor | None:
    """A moment of a parameter's ancestor, taken to the parameter; None where it starts afresh."""
    maps = past.linear if follow == "linear" else past.square
    if maps is None:
        return None
    moment = values_of(moment) if maps else moment
    new = moment.square() if follow == "size" and maps else moment
    for step in maps:
        new = step(new).to(moment)
    return new.sqrt() if follow == "size" and maps else new


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
