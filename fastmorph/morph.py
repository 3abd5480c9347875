"""Running morphs on a model: restructure a copy, solve the equations, set the weights, calibrate, verify."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastmorph.calibrate import calibrate_norms
from fastmorph.decomposition import Decomposition
from fastmorph.deepen import Deepen
from fastmorph.equation import decompose
from fastmorph.errors import InexactMorphError, MorphError
from fastmorph.layers import Layer
from fastmorph.plan import Plan
from fastmorph.problem import Problem
from fastmorph.randomness import Generator
from fastmorph.solvers import Auto, Solver
from fastmorph.verify import Certificate
from fastmorph.verify import verify as verify_models


@dataclass(frozen=True)
class Step:
    """What one morph did: the layer, its weight's shape before, those of its two weights after, and how they were found."""

    layer: str
    before: tuple[int, ...]
    after: tuple[tuple[int, ...], ...]
    decomposition: Decomposition
    milliseconds: float


@dataclass(frozen=True)
class Morphed:
    """A finished plan.

    Attributes:
        model: the child.
        optimizer: None.
        certificate: what `verify` found on `example_inputs`; None if there were none or `verify=False`.
        history: a plan that replays the morphs.
        steps: what each morph did.
    """

    model: nn.Module
    optimizer: None
    certificate: Certificate | None
    history: Plan
    steps: tuple[Step, ...] = field(repr=False)


def morph(
    model: nn.Module,
    plan: Plan | Sequence[Deepen],
    *,
    example_inputs: Any = None,
    calibrate: Iterable[Any] | None = None,
    verify: bool = True,
    solver: Solver = Auto(),  # noqa: B008 - frozen
    backend: str | None = None,
    generator: Generator = None,
    allow_inexact: bool = False,
    progress: bool = False,
) -> Morphed:
    """Apply a plan to a copy of `model`; the model itself is never touched.

    Args:
        model: the parent.
        plan: morphs, in order.
        example_inputs: a tensor, or a tuple of the model's positional arguments, to verify the child on.
        calibrate: batches (each as `example_inputs`) whose statistics inserted BatchNorms take; needed for the child to be
            nearly exact in train mode, where a BatchNorm uses the batch's own.
        verify: whether to compare parent and child on `example_inputs`.
        solver: see `decompose`.
        backend: see `decompose`.
        generator: see `decompose`; the same seed gives the same child.
        allow_inexact: keep a child that is not exact instead of raising.
        progress: show a progress bar.

    Raises:
        MorphError: a layer cannot be morphed, or the certificate does not hold.
        InexactMorphError: an equation was not solved exactly.
    """
    plan = plan if isinstance(plan, Plan) else Plan(plan)
    child = _copy(model)
    steps = []
    for operator in tqdm(plan, desc="morphing", unit="layer", disable=not progress):
        began = perf_counter()
        child, layer, new, problem = operator.restructure(child)
        found = _solve(problem, layer, solver=solver, backend=backend, generator=generator, allow_inexact=allow_inexact)
        _set_weights(new, found)
        shapes = tuple(tuple(new.get_submodule(name).weight.shape) for name in ("first", "second"))
        steps.append(Step(operator.layer, tuple(layer.module.weight.shape), shapes, found, 1e3 * (perf_counter() - began)))
    if calibrate is not None:
        norms = [child.get_submodule(op.layer).get_submodule("norm") for op in plan if op.norm is not None]
        calibrate_norms(child, norms, calibrate)
    certificate = None
    if verify and example_inputs is not None:
        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        certificate = verify_models(model, child, *inputs)
        if not certificate and not allow_inexact:
            raise MorphError(f"the child does not compute what its parent computes:\n{certificate}")
    return Morphed(child, None, certificate, plan, tuple(steps))


def restructure(model: nn.Module, plan: Plan | Sequence[Deepen]) -> nn.Module:
    """The child's architecture alone, for a saved child's `load_state_dict`: the weights of new layers are not set.

    Args:
        model: the parent, or any network of its architecture; it is not touched.
        plan: the plan that made the child, or `Morphed.history`.

    Raises:
        MorphError: a layer cannot be morphed.
    """
    child = _copy(model)
    for operator in plan:
        child = operator.restructure(child)[0]
    return child


def _copy(model: nn.Module) -> nn.Module:
    computed = [
        (name, key)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    for name, key in computed:  # PyTorch refuses to copy these
        raise MorphError(
            f"the model cannot be copied: module {name!r} keeps a tensor {key!r} that it computed with gradients (pruning and "
            f"weight_norm do); bake it first, e.g. by torch.nn.utils.prune.remove(module, {key!r})."
        )
    return deepcopy(model)


def _solve(problem: Problem, layer: Layer, **options: Any) -> Decomposition:
    arguments = (problem.weight, problem.hidden_channels, problem.kernel_sizes)
    of = f"layer {layer.name!r}" + (f" (each of its {layer.groups} groups)" if layer.groups > 1 else "")
    try:
        return decompose(*arguments, spatial_dims=problem.spatial_dims, **options)
    except InexactMorphError as error:
        raise InexactMorphError(f"{of}: {error}", error.decomposition) from None
    except MorphError as error:
        raise MorphError(f"{of}: {error}") from None


@torch.no_grad()
def _set_weights(new: nn.Module, found: Decomposition) -> None:
    for name, kernels in (("first", found.first), ("second", found.second)):
        weight: Tensor = new.get_submodule(name).weight  # type: ignore[assignment]
        weight.copy_(kernels.reshape(weight.shape))  # groups join the output channels
