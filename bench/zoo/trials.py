"""Morphs at random places of a network, each certified or refused; nothing else may happen."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastmorph as fm
from bench.zoo.models import build
from fastmorph.certify.recorded import certify, record

OPERATORS = ("deepen", "widen", "grow_kernel")
_NEAREST = re.compile(r"the nearest number that works is (\d+)")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Trial:
    """One operator at one place: exact, or refused with a reason, or wrong (an error that is no refusal, or inexact)."""

    operator: str
    place: str
    dtype: str
    outcome: str  # "exact", "refused" or "wrong"
    detail: str = ""


@dataclass(frozen=True)
class Visit:
    """All trials of one network."""

    name: str
    convolutional: bool
    trials: tuple[Trial, ...] = ()
    unusable: str = ""
    seconds: float = field(default=0.0, compare=False)


class Case:
    """A parent in one dtype, its inputs, and what it computes from them."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.model, self.inputs, self.outputs = model, inputs, record(model, inputs)
        self.dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")


def visit(name: str, places: int, seed: int = 0) -> Visit:
    """Build a network and morph it at `places` random places by each operator: the first in float64 and in float32 too."""
    began = time.perf_counter()
    try:
        model, inputs = build(name)
    except Exception as error:  # whatever its package raises: the network is reported as unusable, not left out
        return Visit(name, False, unusable=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    draw = random.Random(f"{name} {seed}")
    reached = _reached(model, inputs)
    convolutions = [layer for layer in reached if isinstance(model.get_submodule(layer), _CONVOLUTIONS)]
    convolutional = 2 * len(convolutions) > len(reached) and not name.startswith("transformers/")
    trials: list[Trial] = []
    wide = Case(model, inputs)
    narrow = Case(deepcopy(model).float(), tuple(x.float() if x.is_floating_point() else x for x in inputs))
    for operator in OPERATORS:
        among = convolutions if operator == "grow_kernel" else reached
        for number, place in enumerate(draw.sample(among, min(places, len(among)))):
            morph = _morph(operator, model, place, draw)
            for case in (wide, narrow)[: 2 if number == 0 else 1]:
                trials.append(_try(operator, place, case, morph))
    return Visit(name, convolutional, tuple(trials), seconds=time.perf_counter() - began)


def _reached(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """Convolutions and linear layers that the model calls on these inputs, by name."""
    found: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: found.append(name) if name not in found else None)
        for name, module in model.named_modules()
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear))
    ]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


Morph = Callable[[nn.Module, tuple[Tensor, ...]], nn.Module]


def _morph(operator: str, model: nn.Module, place: str, draw: random.Random) -> Morph:
    """The operator with random arguments, fixed for both dtypes; noise is seeded, so that a trial can be repeated."""
    layer: Any = model.get_submodule(place)
    seed = draw.randrange(2**31)

    def seeded() -> dict[str, Any]:  # the certificate is ours to take
        return {"generator": torch.Generator().manual_seed(seed), "verify": False}

    if operator == "deepen":
        activation = draw.choice(["relu", "gelu", "tanh"])
        return lambda m, _: fm.deepen(m, place, activation=activation, **seeded())
    if operator == "grow_kernel":
        by = draw.choice([1, 2, 3])
        size = tuple(k + by for k in layer.kernel_size)
        return lambda m, _: fm.grow_kernel(m, {place: size}, **seeded())
    width = layer.out_channels if isinstance(layer, _CONVOLUTIONS) else layer.out_features
    wider = width + draw.choice([2, 7, max(1, width // 4), width])

    def widen(m: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
        try:
            return fm.widen(m, {place: wider}, example_inputs=inputs, **seeded())
        except fm.MorphError as refusal:
            nearest = _NEAREST.search(str(refusal))
            if nearest is None:
                raise
            return fm.widen(m, {place: int(nearest[1])}, example_inputs=inputs, **seeded())

    return widen


def _try(operator: str, place: str, case: Case, morph: Morph) -> Trial:
    try:
        certificate = certify(case.outputs, morph(case.model, case.inputs), case.inputs)
    except fm.MorphError as refusal:
        outcome = "wrong" if isinstance(refusal, fm.InexactMorphError) else "refused"
        return Trial(operator, place, case.dtype, outcome, str(refusal))
    except Exception as error:  # an error that is no refusal is a finding, and the other places are still tried
        return Trial(operator, place, case.dtype, "wrong", f"{type(error).__name__}: {' '.join(str(error).split())}")
    found = f"max rel {certificate.max_rel:.1e}"
    return Trial(operator, place, case.dtype, "exact" if certificate else "wrong", found)
