"""What is compared: each arm starts from a trained parent or from nothing, and is trained for the same compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import fastmorph as fm
from bench.learning.tasks import Task
from fastmorph.nn import ActivationSchedule, PActivation, fold_activations
from fastmorph.plan.patterns import expanded


@dataclass
class Start:
    """A network at the start of its training.

    Attributes:
        model: the network.
        optimizer: its optimizer.
        budget: compute of the run, in that of the child's own steps after the growth.
        same_steps: whether the run has as many steps as the child's own, whatever they cost.
        each_step: called after each optimizer step, with the share of the run that is done.
        warm_up: the share of the run in which the learning rate rises from 0.
    """

    model: nn.Module
    optimizer: Optimizer
    budget: float = 1.0
    same_steps: bool = False
    each_step: Callable[[float], None] = lambda done: None
    warm_up: float = 0.0


Parent = tuple[nn.Module, Optimizer, Any]  # the network, its optimizer, and inputs of the network


def adamw(task: Task, model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=task.rate, weight_decay=0.01)


def grown(task: Task, parent: Parent, seed: int, fill: str = "pair", **options: Any) -> fm.Morphed[nn.Module]:
    model, optimizer, inputs = parent
    return fm.morph(model.eval(), task.plan(fill), example_inputs=inputs, optimizer=optimizer, generator=seed, **options)


def child(task: Task, parent: Parent, seed: int, fill: str = "pair", **options: Any) -> Start:
    """The grown network with the carried optimizer."""
    found = grown(task, parent, seed, fill, **options)
    assert found.optimizer is not None
    return Start(found.model, found.optimizer)


def scratch(task: Task, parent: Parent, seed: int, budget: float) -> Start:
    """The child's architecture, plain activations in it, initialised as PyTorch does."""
    model = fm.restructure(parent[0], task.plan(), example_inputs=parent[2])
    torch.manual_seed(10_000 + seed)
    for module in model.modules():
        if isinstance(module, PActivation | nn.PReLU):
            with torch.no_grad():
                next(module.parameters()).zero_()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if hasattr(model, "embed"):
        for embedding in (model.embed, model.place):
            nn.init.normal_(embedding.weight, std=0.1)
    model = fold_activations(model)
    return Start(model, adamw(task, model), budget, warm_up=0.05)


def on(task: Task, parent: Parent, seed: int, same_steps: bool = False) -> Start:
    """The parent itself, trained on."""
    model, optimizer, _ = copy.deepcopy(parent)
    return Start(model, optimizer, same_steps=same_steps)


def warmed(task: Task, parent: Parent, seed: int) -> Start:
    """The learning rate rises again, so that the new entries' moments are there before large steps are taken."""
    found = child(task, parent, seed)
    found.warm_up = 0.1
    return found


def fresh(task: Task, parent: Parent, seed: int) -> Start:
    model = grown(task, parent, seed).model
    return Start(model, adamw(task, model))


def annealed(task: Task, parent: Parent, seed: int) -> Start:
    """The inserted activations come in over the first half of the run."""
    found = child(task, parent, seed)
    schedule = ActivationSchedule(found.model, 1000)

    def each_step(done: float) -> None:
        while schedule.step_count < min(1000, 2000 * done):
            schedule.step()

    found.each_step = each_step
    return found


def linear(task: Task, parent: Parent, seed: int) -> Start:
    """The inserted activations stay the identity."""
    found = child(task, parent, seed)
    for module in found.model.modules():
        if isinstance(module, PActivation | nn.PReLU):
            next(module.parameters()).requires_grad_(False)
    return found


def identity(task: Task, parent: Parent, seed: int) -> Start:
    """Net2Net, from its paper: duplicated channels with a little noise, identity layers with a ReLU."""
    model, _, inputs = parent
    wide = fm.morph(model.eval(), task.plan("duplicate", deepen=False), example_inputs=inputs, generator=seed).model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wide.parameters():
            if parameter.ndim > 1:
                parameter.add_(1e-2 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    for pattern in task.deeper:
        for name in [operator.layer for operator in expanded(fm.Deepen(pattern), wide)]:
            conv = wide.get_submodule(name)
            added = nn.Conv2d(conv.in_channels, conv.in_channels, 3, padding=1, bias=False)
            nn.init.dirac_(added.weight)
            # In front, where its input is the output of a ReLU: there a ReLU behind the identity changes nothing.
            wide.set_submodule(name, nn.Sequential(added, nn.ReLU(), conv))
    return Start(wide.train(), adamw(task, wide), same_steps=True)


HEADLINE: dict[str, Callable[[Task, Parent, int], Start]] = {
    "parent, trained on": on,
    "parent, as many steps": lambda task, parent, seed: on(task, parent, seed, same_steps=True),
    "child from scratch": lambda task, parent, seed: scratch(task, parent, seed, 1.0),
    "child from scratch, twice": lambda task, parent, seed: scratch(task, parent, seed, 2.0),
    "pair": child,
    "pair, warmed up": warmed,
    "pair, fresh optimizer": fresh,
    "duplicate": lambda task, parent, seed: child(task, parent, seed, "duplicate"),
    "zero": lambda task, parent, seed: child(task, parent, seed, "zero"),
    "Net2Net": identity,
}
ABLATIONS: dict[str, Callable[[Task, Parent, int], Start]] = {
    "pair, activations annealed": annealed,
    "pair, activations left out": linear,
    "pair, by Practical": lambda task, parent, seed: child(task, parent, seed, solver=fm.Practical()),
}
