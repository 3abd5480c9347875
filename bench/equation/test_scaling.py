"""How Auto's time per weight entry grows with the number of channels: 3x3 layers, C channels to C + 4 hidden ones."""

from __future__ import annotations

import pytest
import torch

import fastmorph as fm
from bench.conftest import Race
from bench.equation.exact import worst_residual
from bench.race import Contender

ROUNDS = {"C=64": 40, "C=256": 8}


@pytest.mark.contenders(*ROUNDS)
def test_scaling(race: Race, name: str) -> None:
    channels = int(name.removeprefix("C="))
    weight = torch.randn(channels, channels, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    contender = Contender(
        run=lambda: fm.decompose(weight, channels + 4, backend="torch", generator=torch.Generator().manual_seed(1)),
        residual=lambda found: worst_residual(weight, found.first, found.second),
        tolerance=fm.tolerance(weight.dtype),
        rounds=ROUNDS[name],
        work=weight.numel(),
    )
    race("scaling", contender)
