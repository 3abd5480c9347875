"""From P-activations to plain ones: a penalty or a schedule that drives every a to 0, and the fold that ends it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.errors import MorphError
from fastmorph.nn.activation import PActivation


def _activations(model: nn.Module) -> list[PActivation]:
    return [module for module in model.modules() if isinstance(module, PActivation)]


def activation_penalty(model: nn.Module) -> Tensor:
    """Sum over the model's P-activations of the mean of a**2: a scalar to add, scaled, to the training loss.

    It draws every a to 0 and so the network to its plain activations. PReLUs that the network had before the morph are
    left out, a shared P-activation counts once, and a model without any gives 0.
    """
    return sum((module.a.square().mean() for module in _activations(model)), start=torch.zeros(()))


class ActivationSchedule:
    """Take every `a` from where it stands to exactly 0 in a number of steps; then `fold_activations` can follow.

    Call `step()` after the optimizer's. From construction on, `a` is held (`requires_grad` is False, its gradient is
    dropped): the schedule alone moves it, and neither gradient nor weight decay fights it. Construct it before a
    wrapper that fixes what is trainable, such as DistributedDataParallel.

    Args:
        model: a model with P-activations.
        steps: how many calls of `step()` lead to 0; more change nothing.
        shape: "linear" or "cosine".

    Raises:
        MorphError: no P-activation in the model, steps below 1, or an unknown shape.
    """

    def __init__(self, model: nn.Module, steps: int, shape: str = "linear") -> None:
        if steps < 1:
            raise MorphError(f"an ActivationSchedule needs at least one step, not {steps}.")
        if shape not in ("linear", "cosine"):
            raise MorphError(f"an ActivationSchedule is 'linear' or 'cosine', not {shape!r}.")
        self._modules = _activations(model)
        if not self._modules:
            raise MorphError("the model has no P-activation to schedule; deepen it with an activation first.")
        self.steps, self.shape, self.step_count = steps, shape, 0
        self._start = [module.a.detach().clone() for module in self._modules]
        for module in self._modules:
            module.a.requires_grad_(False).grad = None

    def step(self) -> None:
        """Move every `a` one step nearer to 0."""
        self.step_count = min(self.step_count + 1, self.steps)
        self._apply()

    def _apply(self) -> None:
        left = 1 - self.step_count / self.steps
        if self.shape == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2  # exactly 1 at the start and 0 at the end
        with torch.no_grad():
            for module, start in zip(self._modules, self._start, strict=True):
                module.a.copy_(start * left)

    def state_dict(self) -> dict[str, Any]:
        """What a later `load_state_dict` resumes from; `torch.load(weights_only=True)` reads it."""
        start = [a.clone() for a in self._start]
        return {"steps": self.steps, "shape": self.shape, "step_count": self.step_count, "start": start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume where `state_dict` was taken, and set every `a` to its value there.

        Raises:
            MorphError: the state belongs to a model with other P-activations.
        """
        shapes = [tuple(a.shape) for a in state_dict["start"]]
        if shapes != [tuple(module.a.shape) for module in self._modules]:
            raise MorphError(
                f"this state is for P-activations of shapes {shapes}, which are not the model's; load the state that "
                "was saved with this model."
            )
        self.steps, self.shape, self.step_count = (state_dict[key] for key in ("steps", "shape", "step_count"))
        self._start = [a.clone() for a in state_dict["start"]]
        self._apply()


def fold_activations(model: nn.Module, *, atol: float = 0.0, strict: bool = True) -> nn.Module:
    """A copy of the model without the P-activations that are done; the model itself is not touched.

    Where every |a| <= atol the plain activation takes its place, where every a is exactly 1 `torch.nn.Identity`. With
    atol = 0 the copy computes the same for finite values. Modules that were shared stay shared, and PReLUs that the
    network had before the morph stay as they are.

    Raises:
        MorphError: a P-activation is neither; strict=False keeps those as they are.
    """
    for name, module in model.named_modules() if strict else ():
        if isinstance(module, PActivation) and _folded(module, atol) is module:
            low, high = module.a.min().item(), module.a.max().item()
            raise MorphError(
                f"{name or 'the model'} is unfinished, its a lies in [{low:.6g}, {high:.6g}]: drive it to 0 with an "
                "ActivationSchedule, allow more with atol, or keep such modules with strict=False."
            )
    done: dict[nn.Module, nn.Module] = {}

    def fold(module: nn.Module) -> nn.Module:
        if module not in done:
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = fold(child)
            done[module] = _folded(module, atol) if isinstance(module, PActivation) else module
        return done[module]

    return fold(copy.deepcopy(model))


def _folded(module: PActivation, atol: float) -> nn.Module:
    if bool((module.a.abs() <= atol).all()):
        return module.fn.train(module.training)
    if bool((module.a == 1).all()):
        return nn.Identity().train(module.training)
    return module
