"""An optimizer's state for a network that was made from the parent in some other way."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from fastmorph.errors import MorphError
from fastmorph.plan.lineage import Lineage
from fastmorph.plan.optimizer_rules import FreshStateWarning
from fastmorph.plan.optimizers import carry_over, check_optimizer


def transfer_optimizer(optimizer: Optimizer, new_model: nn.Module, mapping: Mapping[str, str | nn.Parameter]) -> Optimizer:
    """A new optimizer for `new_model`, with the groups, options, step counts and moments of an old model's.

    Args:
        optimizer: the old model's; it is not touched.
        new_model: a network whose parameters come from the old one's.
        mapping: for each parameter of `new_model`, by its name, the old parameter whose group it joins: that parameter itself,
            or its name where the optimizer was made of `named_parameters()`. Where both have one shape they are taken to be the
            same weight, and the state is copied; else it starts afresh, and a `FreshStateWarning` names the parameter.

    Returns:
        An optimizer of the same class for the parameters of `new_model` alone. A parameter whose old one was in no group is in
        none.

    Raises:
        MorphError: `mapping` lacks a parameter of `new_model`, has another, or names an old one that the optimizer does not
            have; or the optimizer cannot be carried over (see `morph`).
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    check_optimizer(optimizer, nn.ParameterList(held))
    named = dict(zip((name for group in optimizer.param_groups for name in group.get("param_names", ())), held, strict=False))
    parameters = dict(new_model.named_parameters())
    if mapping.keys() != parameters.keys():
        differs = ", ".join(sorted(mapping.keys() ^ parameters.keys()))
        raise MorphError(f"the mapping must name each parameter of the new model, and no other; it differs in {differs}.")
    unknown = sorted(name for name in mapping.values() if isinstance(name, str) and name not in named)
    if unknown:
        raise MorphError(
            f"the optimizer has no parameter of the name {', '.join(unknown)}; make it of named_parameters(), or map to the "
            "old parameters themselves."
        )
    olds = {name: named[old] if isinstance(old, str) else old for name, old in mapping.items()}
    lineage = Lineage((parameters[name], old) for name, old in olds.items())
    lineage.ancestors = {old: place for place, old in enumerate([*held, *olds.values()])}
    resized = [name for name, old in olds.items() if old.shape != parameters[name].shape]
    for name in resized:
        lineage.replaced(parameters[name], parameters[name], None, None)
    fresh = [name for name in resized if optimizer.state.get(olds[name])]
    if fresh:
        warnings.warn(
            f"the state of a {type(optimizer).__name__} starts afresh for {', '.join(fresh)}: the shapes are others.",
            FreshStateWarning,
            stacklevel=2,
        )
    return carry_over(optimizer, new_model, lineage)[0]
