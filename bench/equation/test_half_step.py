"""One 3x3 layer of 48 channels into two, 144 channels between them: the dense oracle, the half-step and the closed form.

Claim 1 holds (144 * 9 >= 48 * 25), so one half-step is exact. The oracle starts from the noise that the torch backend drew
and must arrive at the same second kernel; it is timed for the half-step alone, fastmorph for the whole call of `decompose`:
checks, noise, half-step, rounding, residual.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import fastmorph as fm
from bench.conftest import Race
from bench.equation.exact import decomposing, half_step_operations, worst_residual
from bench.floors import Job
from bench.race import Contender
from fastmorph.equation import reference
from fastmorph.equation.frame import make_frame
from fastmorph.equation.solvers import Solver

CHANNELS, HIDDEN, SIZES = 48, 144, (3, 3)
DTYPES = {"float64": torch.float64, "float32": torch.float32}
SOLVERS: dict[str, Solver] = {"torch": fm.General(max_iter=1), "auto": fm.Auto()}
ROUNDS = {"numpy": 2, "torch": 6, "auto": 30}


@cache
def weight(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(CHANNELS, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)


def decompose(dtype: torch.dtype, solver: Solver) -> fm.Decomposition:
    return fm.decompose(
        weight(dtype), HIDDEN, SIZES, solver=solver, backend="torch", generator=torch.Generator().manual_seed(1)
    )


def job(solver: str, dtype: torch.dtype) -> Job:
    """A half-step solves a system, the closed form none."""
    name = str(dtype).removeprefix("torch.")
    operations = {} if solver == "auto" else half_step_operations(CHANNELS, CHANNELS, 5, name)
    return decomposing(weight(dtype), HIDDEN, SIZES, operations)


def dense() -> Contender:
    g = weight(torch.float64).numpy()
    ours = decompose(torch.float64, SOLVERS["torch"])
    start, frame = ours.first.numpy(), make_frame((3, 3), SIZES)
    found = reference.half_step(g, start, frame).second
    assert np.linalg.norm(found - ours.second.numpy()) <= 1e-10 * np.linalg.norm(found), "two answers from the same noise"
    return Contender(
        run=lambda: reference.half_step(g, start, frame),
        residual=lambda solved: worst_residual(g, solved.first, solved.second),
        tolerance=fm.tolerance(torch.float64),
        rounds=ROUNDS["numpy"],
        job=job("numpy", torch.float64),
    )


def ours(solver: str, dtype: torch.dtype) -> Contender:
    return Contender(
        run=lambda: decompose(dtype, SOLVERS[solver]),
        residual=lambda found: worst_residual(weight(dtype), found.first, found.second),
        tolerance=fm.tolerance(dtype),
        rounds=ROUNDS[solver],
        job=job(solver, dtype),
    )


@pytest.mark.contenders("numpy", "torch float64", "torch float32", "auto float64", "auto float32")
def test_half_step(race: Race, name: str) -> None:
    solver, _, dtype = name.partition(" ")
    race("half-step", dense() if solver == "numpy" else ours(solver, DTYPES[dtype]))
