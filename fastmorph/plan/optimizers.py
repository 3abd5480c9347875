"""An optimizer for the child that goes on where the parent's stood."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree

from fastmorph.errors import MorphError
from fastmorph.plan.lineage import Ancestry, Lineage

_ADAM = {"exp_avg": "linear", "exp_avg_sq": "square", "max_exp_avg_sq": "square"}
# By what rule each tensor of a parameter's state follows the parameter.
_MOMENTS: dict[type[Optimizer], dict[str, str]] = {
    SGD: {"momentum_buffer": "linear"},
    Adam: _ADAM,
    AdamW: _ADAM,
    RMSprop: {"square_avg": "square", "momentum_buffer": "linear", "grad_avg": "linear"},
    Adagrad: {"sum": "square"},
}


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse, before any work, an optimizer that cannot be carried over. Raises MorphError."""
    name = type(optimizer).__name__
    own = set(model.parameters())
    if not any(parameter in own for group in optimizer.param_groups for parameter in group["params"]):
        raise MorphError(f"the {name} given holds none of the model's parameters; pass the optimizer of this very model.")
    rules = _rules(optimizer)
    for key, value in vars(optimizer).items():
        held = () if key in ("param_groups", "state", "defaults") else pytree.tree_leaves(value)
        if any(isinstance(leaf, nn.Parameter) and leaf in own for leaf in held):
            raise MorphError(
                f"a {name} cannot be carried over: it keeps parameters in its attribute {key!r}, outside its parameter groups; "
                f"leave optimizer= out and make a new {name} for the child."
            )
    known = ", ".join(kind.__name__ for kind in _MOMENTS)
    for parameter, state in optimizer.state.items():
        strange = sorted(k for k, v in state.items() if rules is None or (k not in rules and isinstance(v, Tensor) and v.ndim))
        if parameter in own and strange:
            raise MorphError(
                f"the state {', '.join(map(str, strange))} of a {name} cannot be carried over: how it follows a weight that "
                f"changes is known for {known} alone. Leave optimizer= out and make a new {name} for the child."
            )


@torch.no_grad()
def carry_over(optimizer: Optimizer, child: nn.Module, lineage: Lineage, *, consume: bool = False) -> Optimizer:
    """An optimizer of the same class for the child's parameters; the one given is left as it is, unless it is consumed.

    Parameter groups keep their order and options. Each parameter of the child stands in the group of its ancestor, and where
    the way of all of the ancestor's moments is known, it has the moments and the step count too.

    Raises MorphError where a parameter's ancestor is not known.
    """
    descendants: defaultdict[nn.Parameter, list[nn.Parameter]] = defaultdict(list)
    state: dict[nn.Parameter, dict[str, Any]] = {}
    rules = _rules(optimizer) or {}
    names = {parameter: name for name, parameter in child.named_parameters()}
    for parameter, name in names.items():
        past = lineage[parameter]
        if past is None:
            raise MorphError(f"the child's {name!r} has no ancestor in the parent, and so no parameter group.")
        descendants[past.ancestor].append(parameter)
        if past.linear is not None or past.square is not None:
            before = optimizer.state.pop(past.ancestor, {}) if consume else optimizer.state.get(past.ancestor, {})
            if after := _state(before, rules, past, move=consume):
                state[parameter] = after
    groups = []
    for group in optimizer.param_groups:
        kept = {key: deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        kept["params"] = []
        for index, old in enumerate(group["params"]):
            new = descendants[old] if old in lineage.ancestors else [old]
            kept["params"] += new
            if "param_names" in group:
                kept.setdefault("param_names", []).extend(names.get(p, group["param_names"][index]) for p in new)
            if old not in lineage.ancestors and old in optimizer.state:  # not the model's
                state[old] = deepcopy(optimizer.state[old])
        groups.append(kept)
    return _like(optimizer, groups, state)


def _rules(optimizer: Optimizer) -> dict[str, str] | None:
    return next((_MOMENTS[kind] for kind in type(optimizer).__mro__ if kind in _MOMENTS), None)


def _state(before: Mapping[str, Any], rules: Mapping[str, str], past: Ancestry, *, move: bool) -> dict[str, Any]:
    """A descendant's state; empty where part of it would start afresh: a step count without its moments would mislead."""
    after = {}
    for key, value in before.items():
        if key in rules and isinstance(value, Tensor):
            maps = past.linear if rules[key] == "linear" else past.square
            if maps is None:
                return {}
            moment = value
            for follow in maps:
                moment = follow(moment).to(value)
            after[key] = moment if maps or move else moment.clone()
        else:
            after[key] = deepcopy(value)
    return after


def _like(optimizer: Optimizer, groups: list[dict[str, Any]], state: dict[nn.Parameter, dict[str, Any]]) -> Optimizer:
    """A new optimizer of the same class and settings, made as PyTorch makes one that it unpickles."""
    new: Optimizer = type(optimizer).__new__(type(optimizer))
    whole = {"defaults": deepcopy(optimizer.defaults), "state": defaultdict(dict, state), "param_groups": groups}
    new.__setstate__(whole)
    for key, value in vars(optimizer).items():
        if key.endswith("_hooks"):
            getattr(new, key).update(value)
        elif key not in vars(new) and key != "step":  # a scheduler's wrapper, which knows the old one
            setattr(new, key, value)
    if isinstance(new, Adagrad):
        for group in groups:
            for parameter in group["params"]:
                if parameter not in new.state:
                    start = torch.full_like(parameter, group["initial_accumulator_value"])
                    device = parameter.device if group.get("fused") else None
                    new.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=device), "sum": start}
    return new


class _StepCounter(LRScheduler):
    """Lets an optimizer note that it has stepped, as every scheduler does, and leaves its learning rates alone."""

    def _initial_step(self) -> None:
        pass


def rebound(scheduler: Any, optimizer: Optimizer) -> Any:
    """A copy of a learning-rate scheduler, with those inside it, that drives `optimizer` from where it stands.

    Raises MorphError if it was made for another number of parameter groups.
    """
    old = scheduler.optimizer
    if len(old.param_groups) != len(optimizer.param_groups):
        raise MorphError(
            f"the scheduler drives {len(old.param_groups)} parameter groups, the child's optimizer has "
            f"{len(optimizer.param_groups)}; pass a scheduler of the optimizer that was carried over."
        )
    _StepCounter(optimizer)
    return deepcopy(scheduler, {id(old): optimizer})
