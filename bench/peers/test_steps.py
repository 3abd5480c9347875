"""GroMo's growth step, updates and eight new neurons a layer, of 64 layers: by its own loop, and all at once."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.conftest import Race
from bench.floors import Job
from bench.race import Contender
from bench.zoo.models import declare_torchvision_operators
from fastmorph.integrations.gromo import optimal_deltas, optimal_neurons

LAYERS, NEURONS = 64, 8
NAMES = tuple((f"GroMo, {units}", f"at once, {units}") for units in (16, 64))


@cache
def statistics(units: int) -> tuple[list[Tensor], list[Tensor]]:
    """S and M of layers of `units` with a bias, from four times as many samples, in float32 as GroMo gathers them."""
    generator = torch.Generator().manual_seed(units)
    inputs = torch.randn(LAYERS, 4 * units, units + 1, generator=generator)
    gradients = torch.randn(LAYERS, 4 * units, units, generator=generator)
    return list(inputs.mT @ inputs / (4 * units)), list(inputs.mT @ gradients / (4 * units))


@cache
def expected(units: int) -> tuple[Any, Any]:
    """What the updates are, and what the neurons of a layer add together, in float64 by numpy."""
    s, m = (np.stack([each.double().numpy() for each in part]) for part in statistics(units))
    values, vectors = np.linalg.eigh(s)
    root = vectors / np.sqrt(values)[:, None] @ vectors.swapaxes(1, 2)
    left, singular, right = np.linalg.svd(root @ m, full_matrices=False)
    added = (root @ left[:, :, :NEURONS] * singular[:, None, :NEURONS]) @ right[:, :NEURONS]
    return np.linalg.solve(s, m).swapaxes(1, 2), added.swapaxes(1, 2)


def error(answer: Any, units: int) -> float:
    deltas = np.stack([update[0].double().numpy() for update in answer[0]])
    added = np.stack([(outgoing.double() @ incoming.double()).numpy() for incoming, outgoing, _ in answer[1]])
    pairs = zip((deltas, added), expected(units), strict=True)
    return max(float(np.linalg.norm(ours - oracle) / np.linalg.norm(oracle)) for ours, oracle in pairs)


def by_gromo(units: int) -> Any:
    from gromo.utils.tools import compute_optimal_added_parameters, optimal_delta

    pairs = list(zip(*statistics(units), strict=True))
    return [optimal_delta(s, m) for s, m in pairs], [
        compute_optimal_added_parameters(s, m, maximum_added_neurons=NEURONS) for s, m in pairs
    ]


def at_once(units: int) -> Any:
    return optimal_deltas(*statistics(units)), optimal_neurons(*statistics(units), maximum_added_neurons=NEURONS)


@pytest.mark.contenders(*map(list, NAMES))
@pytest.mark.filterwarnings("ignore")
def test_steps(race: Race, name: str) -> None:
    pytest.importorskip("gromo", reason="gromo is not installed")
    declare_torchvision_operators()
    way, units = name.split(", ")
    run = by_gromo if way == "GroMo" else at_once
    # float32 statistics and answers: their rounding times the condition of S, about 10
    count = sum(part.nbytes for parts in statistics(int(units)) for part in parts)
    job = Job(f"{LAYERS} layers of {units} units, {NEURONS} neurons", moved=count)  # both statistics are read
    race("steps", Contender(lambda: run(int(units)), lambda answer: error(answer, int(units)), 1e-5, rounds=10, job=job))
