"""General to a tolerance, Practical and Direct, each beside what it does written line by line in numpy, from other noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import fastmorph as fm
from bench.conftest import Race
from bench.equation.exact import decomposing, worst_residual
from bench.race import Contender
from fastmorph.equation import reference
from fastmorph.equation.frame import Frame, make_frame
from fastmorph.equation.solvers import Solver


class Case(NamedTuple):
    """An equation, who solves it, how numpy does, and the largest residual that counts."""

    channels: int
    size: int
    hidden: int
    sizes: tuple[int, int]
    solver: Solver
    oracle: Callable[[Any, Any, Frame], Any]
    tolerance: float


def noise(*shape: int) -> Any:
    return np.random.default_rng(2).standard_normal(shape)


CASES = {
    "General": Case(
        *(5, 5, 10, (3, 3), fm.General()),
        oracle=lambda g, start, frame: reference.general_gauss_newton(g, start, frame, max_iter=400, tol=1e-10),
        tolerance=1e-10,
    ),
    "Practical": Case(
        *(24, 3, 36, (3, 3), fm.Practical()),
        oracle=lambda g, start, frame: reference.practical(g, start, frame, tol=1e-10),
        tolerance=1e-10,
    ),
    "Direct": Case(
        *(64, 3, 96, (3, 3), fm.Direct()),
        oracle=lambda g, start, frame: reference.direct(g, len(start), frame, noise, 1.0),
        tolerance=1e-10,
    ),
}


def contender(solver: str, way: str) -> Contender:
    case = CASES[solver]
    shape = (case.channels, case.channels, case.size, case.size)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g, frame = weight.numpy(), make_frame(shape[2:], case.sizes)
    start = noise(case.hidden, case.channels, *frame.first)

    def ours() -> fm.Decomposition:
        return fm.decompose(weight, case.hidden, case.sizes, solver=case.solver, backend="torch", generator=1)

    return Contender(
        run=ours if way == "torch" else lambda: case.oracle(g, start, frame),
        residual=lambda found: worst_residual(weight, found.first, found.second),
        tolerance=case.tolerance,
        rounds=1 if way == "numpy" else 3,
        job=decomposing(weight, case.hidden, case.sizes),
        once=True,
    )


@pytest.mark.contenders(*([f"{solver} {way}" for way in ("numpy", "torch")] for solver in CASES))
def test_solvers(race: Race, name: str) -> None:
    solver, _, way = name.partition(" ")
    race("solvers", contender(solver, way))
