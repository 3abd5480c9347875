"""A 3x3 convolution becomes two: by the closed form, by an identity layer as in Net2Net, by numpy's least squares.

fastmorph's two kernels are dense, the identity layer's second one is zero but for its diagonal; numpy is the dense oracle of 16
channels, its time taken per weight entry.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmorph as fm
from bench.conftest import Race
from bench.equation.exact import decomposing, worst_residual
from bench.floors import Job
from bench.race import Contender
from fastmorph.equation import reference
from fastmorph.equation.frame import make_frame

CHANNELS, SMALL = 64, 16


@cache
def parent() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU())


@cache
def batch() -> Tensor:
    return torch.randn(4, CHANNELS, 12, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def error(child: Any) -> float:
    expected = parent()(batch())
    return float((child(batch()) - expected).abs().max() / expected.abs().max())


def identity_layer(model: nn.Sequential) -> nn.Sequential:
    added = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    nn.init.dirac_(added.weight)
    nn.init.zeros_(added.bias)
    return nn.Sequential(*model, added, nn.ReLU())


def dense() -> Contender:
    weight = np.random.default_rng(0).standard_normal((SMALL, SMALL, 3, 3))
    start = np.random.default_rng(1).standard_normal((3 * SMALL, SMALL, 3, 3))
    frame = make_frame((3, 3), (3, 3))
    return Contender(
        run=lambda: reference.half_step(weight, start, frame),
        residual=lambda found: worst_residual(weight, found.first, found.second),
        tolerance=1e-10,
        rounds=5,
        job=decomposing(torch.from_numpy(weight), 3 * SMALL, (3, 3)),
        work=weight.size,
        asks="a weight alone",
    )


def ours() -> Any:
    return fm.deepen(parent(), "0", activation="relu", verify=False, example_inputs=batch(), generator=1)


WAYS = {
    "fastmorph": (ours, "any nn.Module, one call of it; a copy is grown"),
    "identity layer": (lambda: identity_layer(parent()), "code written for this network"),
}


@pytest.mark.contenders("fastmorph", "identity layer", "numpy")
def test_deeper(race: Race, name: str) -> None:
    if name == "numpy":
        race("deeper", dense())
        return
    weight = parent()[0].weight
    # Two layers are written where one is read.
    job = Job(f"{CHANNELS} channels, 3x3, into two such layers", moved=3 * weight.nbytes)
    run, asks = WAYS[name]
    race("deeper", Contender(run, error, float("inf"), rounds=20, job=job, work=weight.numel(), asks=asks))
