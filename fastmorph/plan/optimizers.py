"""An optimizer for the child that goes on where the parent's stood."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer
from torch.utils import _pytree as pytree

import fastmorph.plan.known_optimizers  # noqa: F401 - registers them
from fastmorph.errors import MorphError
from fastmorph.nn import PActivation
from fastmorph.plan.lineage import Ancestry, Lineage
from fastmorph.plan.optimizer_rules import FreshStateWarning, OptimizerRule, find_optimizer_rule, follow_moment

Place = Callable[[Tensor, nn.Parameter], Tensor]
_OWN = ("param_groups", "state", "defaults", "step")  # a scheduler wraps `step`


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse, before any work, an optimizer that cannot be carried over. Raises MorphError."""
    name, own = type(optimizer).__name__, set(model.parameters())
    if not isinstance(optimizer, Optimizer):
        raise MorphError(f"optimizer= takes a torch.optim.Optimizer, not a {name}; pass the one inside it, if it wraps one.")
    places: list[tuple[str, Any]] = [
        (f"its attribute {key!r}", value) for key, value in vars(optimizer).items() if key not in _OWN
    ]
    for key, value in places:
        if any(isinstance(leaf, Optimizer) for leaf in _held(value, {id(optimizer)})):
            raise MorphError(
                f"a {name} cannot be carried over: it wraps another optimizer, in {key}, and would go on training the parent. "
                f"Pass the optimizer inside it, and wrap Morphed.optimizer in a new {name}."
            )
    if not any(parameter in own for group in optimizer.param_groups for parameter in group["params"]):
        raise MorphError(f"the {name} given holds none of the model's parameters; pass the optimizer of this very model.")
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    places += [("the options of its groups", options), ("its state", list(optimizer.state.values()))]
    for key, value in places:
        if any(isinstance(leaf, nn.Parameter) and leaf in own for leaf in _held(value, {id(optimizer)})):
            raise MorphError(
                f"a {name} cannot be carried over: it keeps parameters in {key}, outside its parameter groups; "
                f"leave optimizer= out and make a new {name} for the child."
            )


def _held(value: Any, seen: set[int]) -> Iterator[Any]:
    """The parameters and optimizers that can be reached from a value, through containers, objects and modules."""
    if id(value) in seen or isinstance(value, type | ModuleType | FunctionType | MethodType):
        return
    seen.add(id(value))
    if isinstance(value, nn.Parameter | Optimizer):
        yield value
    elif isinstance(value, Mapping):
        for part in (*value.keys(), *value.values()):
            yield from _held(part, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _held(part, seen)
    elif not isinstance(value, Tensor):
        yield from _held(getattr(value, "__dict__", ()), seen)


@torch.no_grad()
def carry_over(
    optimizer: Optimizer, child: nn.Module, lineage: Lineage, *, consume: bool = False, place: Place | None = None
) -> tuple[Optimizer, tuple[int, ...]]:
    """An optimizer of the same class for the child's parameters; the one given is left as it is, unless it is consumed.

    Parameter groups keep their order and options. Each parameter of the child stands in the group of its ancestor, in the
    order of `child.parameters()` where the ancestors stood in the parent's, and where the way of all of the ancestor's moments
    is known, it has the moments and the step count too. New vectors (the weights and biases of norms, the `a` of P-activations)
    join a group without weight decay where there is one. Where there is none, each group that decays and would get an `a` gets
    a twin without weight decay at the end.

    `place` takes a tensor of a parameter's state, once it is there, and the parameter, and returns what is kept of it.

    Returns the optimizer, and for each of those new groups the index of the group that it is a twin of.

    Raises MorphError where a parameter's ancestor is not known, or where the optimizer cannot take a new parameter.
    """
    rule = find_optimizer_rule(optimizer)
    names = {parameter: name for name, parameter in child.named_parameters()}
    for parameter, name in names.items():
        if parameter not in lineage:
            raise MorphError(f"the child's {name!r} has no ancestor in the parent, and so no parameter group.")
    state, lost = _carried_state(optimizer, names, lineage, rule, consume, place or (lambda value, parameter: value))
    if lost:
        keys = ", ".join(sorted({str(key) for found in lost.values() for key in found}))
        warnings.warn(
            f"the state of a {type(optimizer).__name__} starts afresh for {', '.join(lost)}: how {keys} follows a weight that "
            "changes is not known; say it by fm.optimizer_rule.",
            FreshStateWarning,
            stacklevel=3,
        )
    groups, sources = _carried_groups(optimizer, names, lineage, child)
    for old, kept in optimizer.state.items():
        if old not in lineage.ancestors:  # not the model's
            state[old] = deepcopy(kept) if isinstance(old, Tensor) else kept
    if rule is not None and rule.start is not None:
        for group in groups:
            for parameter in group["params"]:
                if parameter not in state:
                    state[parameter] = rule.start(parameter, group)
    return like(optimizer, groups, state), sources


# --- parameter groups --------------------------------------------------------------------------------------------------------


def _carried_groups(
    optimizer: Optimizer, names: Mapping[nn.Parameter, str], lineage: Lineage, child: nn.Module
) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    old_groups = optimizer.param_groups
    home = {old: index for index, group in enumerate(old_groups) for old in group["params"]}
    fading = {module.a for module in child.modules() if isinstance(module, PActivation)}
    members: defaultdict[int, list[nn.Parameter]] = defaultdict(list)
    twins: defaultdict[int, list[nn.Parameter]] = defaultdict(list)
    for parameter, name in names.items():
        past = lineage[parameter]
        index = home.get(past.ancestor)
        if index is None:  # the optimizer does not train it
            continue
        if past.joined and parameter.ndim < 2 and old_groups[index].get("weight_decay"):
            apart = _group_without_decay(old_groups, index, lineage)
            (twins if apart is None and parameter in fading else members)[index if apart is None else apart].append(parameter)
        else:
            members[index].append(parameter)
        if isinstance(optimizer, Muon) and parameter.ndim != 2:
            raise MorphError(
                f"a Muon trains matrices alone, and the child's {name!r} of shape {tuple(parameter.shape)} would join them; "
                "leave out the activation and norm, or leave optimizer= out and make new optimizers for the child."
            )
    groups = [
        _group(group, _in_order(group["params"], members[index], lineage), names) for index, group in enumerate(old_groups)
    ]
    groups += [{**_group(old_groups[index], twins[index], names), "weight_decay": 0.0} for index in sorted(twins)]
    return groups, tuple(sorted(twins))


def _group_without_decay(groups: list[dict[str, Any]], index: int, lineage: Lineage) -> int | None:
    """The group of the parent's without weight decay whose other options are most like those of group `index`."""
    held = [i for i, group in enumerate(groups) if any(old in lineage.ancestors for old in group["params"])]
    free = [i for i in held if not groups[i].get("weight_decay", 1)]

    def likeness(other: int) -> int:
        return sum(key != "params" and bool(value == groups[other].get(key)) for key, value in groups[index].items())

    return max(free, key=likeness, default=None)


def _in_order(old: list[nn.Parameter], new: list[nn.Parameter], lineage: Lineage) -> list[nn.Parameter]:
    """The new parameters of a group, and those of its old ones that are not the model's.

    `new` is in the child's order. Where the group was not in the parent's, it keeps its own order.
    """
    ranks = [lineage.ancestors[parameter] for parameter in old if parameter in lineage.ancestors]
    if ranks != sorted(ranks):
        places = {parameter: place for place, parameter in enumerate(old)}
        new = sorted(new, key=lambda parameter: places.get(lineage[parameter].ancestor, len(old)))
    first = next((place for place, parameter in enumerate(old) if parameter in lineage.ancestors), len(old))
    return [*old[:first], *new, *(parameter for parameter in old[first:] if parameter not in lineage.ancestors)]


def _group(old: Mapping[str, Any], params: list[nn.Parameter], names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    kept = {key: deepcopy(value) for key, value in old.items() if key not in ("params", "param_names")}
    kept["params"] = params
    if "param_names" in old:
        before = dict(zip(old["params"], old["param_names"], strict=True))
        kept["param_names"] = [names.get(parameter) or before[parameter] for parameter in params]
    return kept


# --- state -------------------------------------------------------------------------------------------------------------------


def _carried_state(
    optimizer: Optimizer,
    names: Mapping[nn.Parameter, str],
    lineage: Lineage,
    rule: OptimizerRule | None,
    consume: bool,
    place: Place,
) -> tuple[dict[Any, dict[str, Any]], dict[str, set[str]]]:
    """State by the child's parameters, and by their names, the keys without a rule for which it starts afresh."""
    state: dict[Any, dict[str, Any]] = {}
    lost: dict[str, set[str]] = {}
    left = Counter(part.ancestor for parameter in names for part in _parts(lineage[parameter]))

    def held(part: Ancestry) -> dict[str, Any]:
        left[part.ancestor] -= 1
        last = consume and not left[part.ancestor]
        return optimizer.state.pop(part.ancestor, {}) if last else optimizer.state.get(part.ancestor, {})

    for parameter, name in names.items():
        past = lineage[parameter]
        befores = [held(part) for part in _parts(past)]
        if past.linear is None and past.square is None:
            continue
        before = befores[0] if not past.parts else _behind_each_other(befores, rule, past.parts)
        if past.linear == past.square == ():
            kept = dict(before) if consume else deepcopy(dict(before))
            state[parameter] = {key: _placed(value, parameter, place) for key, value in kept.items()}
        elif unknown := {key for key, value in before.items() if not _has_rule(key, value, rule)}:
            lost[name] = unknown
        elif after := _followed(before, rule, past, partial(_placed, parameter=parameter, place=place)):
            state[parameter] = after
    return {parameter: each for parameter, each in state.items() if each}, lost


def _parts(past: Ancestry) -> tuple[Ancestry, ...]:
    return past.parts or (past,)


def _behind_each_other(
    befores: Sequence[dict[str, Any]], rule: OptimizerRule | None, parts: Sequence[Ancestry]
) -> dict[str, Any]:
    """The state of several parameters as one, moments along the first dimension; empty where some have none."""
    states = [_followed(before, rule, part, lambda value: value) for before, part in zip(befores, parts, strict=True)]
    if rule is None or not all(states):
        return {}
    moments = {
        key: torch.cat([state[key] for state in states]) for key in states[0] if key in rule.moments and states[0][key].ndim
    }
    return states[0] | moments


def _has_rule(key: str, value: Any, rule: OptimizerRule | None) -> bool:
    if rule is None:
        return False
    return key in rule.moments or not any(isinstance(leaf, Tensor) and leaf.ndim for leaf in pytree.tree_leaves(value))


def _placed(value: Any, parameter: nn.Parameter, place: Place) -> Any:
    return place(value, parameter) if isinstance(value, Tensor) and value.ndim else value


def _followed(
    before: Mapping[str, Any], rule: OptimizerRule | None, past: Ancestry, placed: Callable[[Any], Any]
) -> dict[str, Any]:
    """A descendant's state; empty where part of it would start afresh: a step count without its moments would mislead."""
    after = {}
    for key, value in before.items():
        if rule is not None and key in rule.moments and isinstance(value, Tensor):
            after[key] = follow_moment(value, rule.moments[key], past)
            if after[key] is None:
                return {}
            if after[key] is value:
                after[key] = value.clone()
            after[key] = placed(after[key])
        else:
            after[key] = deepcopy(value)
    return after


def like(optimizer: Optimizer, groups: list[dict[str, Any]], state: Mapping[Any, dict[str, Any]]) -> Optimizer:
    """A new optimizer of the same class and settings, made as PyTorch makes one that it unpickles."""
    new: Optimizer = type(optimizer).__new__(type(optimizer))
    whole = {"defaults": deepcopy(optimizer.defaults), "state": defaultdict(dict, state), "param_groups": groups}
    new.__setstate__(whole)
    for key, value in vars(optimizer).items():
        if key.endswith("_hooks"):
            getattr(new, key).update(value)
        elif key not in vars(new) and key != "step":  # a scheduler's wrapper, which knows the old one
            setattr(new, key, value)
    return new
