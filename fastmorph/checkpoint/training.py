"""Optimizers and schedulers as plain data and tensors, and back to where they stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from fastmorph.checkpoint.values import decode, encode
from fastmorph.errors import MorphError
from fastmorph.plan.schedulers import note_steps

Make = Callable[[Any], Any]


def describe_optimizer(optimizer: Optimizer, model: nn.Module, tensors: MutableMapping[str, Tensor]) -> dict[str, Any]:
    """The class, groups and state of an optimizer, parameters by their names in the model; tensors go to `tensors`.

    Raises MorphError for an optimizer of other parameters, or of state that no file can hold.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    strangers = [p for group in optimizer.param_groups for p in group["params"] if p not in names]
    strangers += [key for key in optimizer.state if key not in names]
    if strangers:
        raise MorphError(
            f"the {type(optimizer).__name__} holds {len(strangers)} parameters that are not the model's; save the optimizer of "
            "this very model, Morphed.optimizer."
        )
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    state = {names[p]: encode(kept, f".optimizer.{names[p]}", tensors, p) for p, kept in optimizer.state.items()}
    return {
        "class": _name(type(optimizer)),
        "defaults": encode(optimizer.defaults, ".optimizer.defaults", tensors),
        "groups": encode(groups, ".optimizer.groups", tensors),
        "state": state,
    }


def describe_scheduler(scheduler: Any, tensors: MutableMapping[str, Tensor]) -> dict[str, Any]:
    """The class and state of a scheduler. Raises MorphError for state that no file can hold."""
    return {
        "class": _name(type(scheduler)),
        "state": encode(scheduler.state_dict(), ".scheduler", tensors),
        "whole": not hasattr(scheduler, "_schedulers") and not hasattr(scheduler, "lr_lambdas"),
    }


def revive(
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    make_optimizer: Make | None,
    make_scheduler: Make | None,
) -> tuple[Optimizer | None, Any]:
    """The optimizer and the scheduler that a file describes, for the model that was loaded from it.

    Raises MorphError where a class is none of PyTorch's, or a scheduler has parts that are no data, and no way to make one
    was given.
    """
    described = saved["optimizer"]
    if described is None:
        return None, None
    parameters = dict(model.named_parameters())
    groups = decode(described["groups"], tensors)
    for group in groups:
        group["params"] = [parameters[name] for name in group["params"]]
    make = make_optimizer or _known(described["class"], torch.optim, "optimizer=, called with the parameter groups")
    optimizer: Optimizer = make([dict(group) for group in groups])
    scheduler = _scheduler(saved["scheduler"], tensors, optimizer, make_scheduler)
    optimizer.defaults.update(decode(described["defaults"], tensors))
    for made, group in zip(optimizer.param_groups, groups, strict=True):
        made.update(group)  # again: a scheduler that is made sets learning rates
    for name, kept in described["state"].items():
        optimizer.state[parameters[name]] = decode(kept, tensors, parameters[name])
    return optimizer, scheduler


def _scheduler(saved: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], optimizer: Optimizer, make: Make | None) -> Any:
    if saved is None:
        return None
    state = decode(saved["state"], tensors)
    if make is not None:
        scheduler = make(optimizer)
    else:
        remedy = "scheduler=, called with the optimizer"
        cls = _known(saved["class"], lr_scheduler, remedy)
        if not saved["whole"]:
            raise MorphError(f"a {cls.__name__} has parts that no file holds; give {remedy}.")
        note_steps(optimizer)
        scheduler = cls.__new__(cls)
        scheduler.optimizer = optimizer
    scheduler.load_state_dict(state)
    return scheduler


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _known(name: str, module: Any, remedy: str) -> Any:
    """A class of PyTorch's by its full name: a file never decides what is imported."""
    found = getattr(module, name.rpartition(".")[2], None)
    if not isinstance(found, type) or _name(found) != name:
        raise MorphError(f"the file was saved with a {name}, which is not PyTorch's own; give {remedy}.")
    return found
