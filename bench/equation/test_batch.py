"""64 equations of 16 channels, 3x3 kernels and 48 hidden channels, a half-step each: in one call, or one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastmorph as fm
from bench.conftest import Race
from bench.equation.exact import decomposing, half_step_operations, worst_residual
from bench.race import Contender

ITEMS, CHANNELS, HIDDEN = 64, 16, 48


def decompose(weight: torch.Tensor, seed: int) -> fm.Decomposition:
    solver, generator = fm.General(max_iter=1), torch.Generator().manual_seed(seed)
    return fm.decompose(weight, HIDDEN, solver=solver, backend="torch", generator=generator)


def stacked(found: list[fm.Decomposition]) -> tuple[Any, Any]:
    return torch.stack([f.first for f in found]), torch.stack([f.second for f in found])


@pytest.mark.contenders("loop", "batch")
def test_batch(race: Race, name: str) -> None:
    weight = torch.randn(ITEMS, CHANNELS, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    runs: dict[str, Callable[[], Any]] = {
        "loop": lambda: [decompose(item, seed) for seed, item in enumerate(weight)],
        "batch": lambda: decompose(weight, 0),
    }
    each = half_step_operations(CHANNELS, CHANNELS, 5, "float64")
    operations = {dtype: ITEMS * count for dtype, count in each.items()}
    contender = Contender(
        run=runs[name],
        residual=lambda found: worst_residual(weight, *(stacked(found) if name == "loop" else (found.first, found.second))),
        tolerance=fm.tolerance(weight.dtype),
        rounds=3,
        job=decomposing(weight, HIDDEN, (3, 3), operations),
    )
    race("batch", contender)
