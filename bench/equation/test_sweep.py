"""Auto's closed form and the dense oracle's half-step on 3x3 layers of C channels into two, 3 C channels between them.

The oracle solves for the second kernel by least squares on the whole system, in cubes of C; the closed form costs as much as
its weights, in squares. The oracle is timed up to 128 channels.
"""

from __future__ import annotations

import pytest
import torch

import fastmorph as fm
from bench.conftest import Race
from bench.equation.exact import decomposing, worst_residual
from bench.race import Contender
from fastmorph.equation import reference
from fastmorph.equation.frame import make_frame

CHANNELS = (48, 64, 96, 128, 192, 256, 384, 512)
DENSE = (48, 96, 128)
SIZES = (3, 3)


def contender(way: str, channels: int) -> Contender:
    weight = torch.randn(channels, channels, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = 3 * channels

    def ours() -> fm.Decomposition:
        return fm.decompose(weight, hidden, SIZES, backend="torch", generator=torch.Generator().manual_seed(1))

    g, start, frame = weight.numpy(), ours().first.numpy(), make_frame((3, 3), SIZES)
    return Contender(
        run=ours if way == "auto" else lambda: reference.half_step(g, start, frame),
        residual=lambda found: worst_residual(weight, found.first, found.second),
        tolerance=fm.tolerance(weight.dtype),
        rounds=1 if way == "numpy" else max(2, 2048 // channels),
        job=decomposing(weight, hidden, SIZES),
        work=weight.numel(),
        once=True,
    )


@pytest.mark.contenders(*(f"numpy C={c}" for c in DENSE), *(f"auto C={c}" for c in CHANNELS), visits=2)
def test_sweep(race: Race, name: str) -> None:
    way, _, channels = name.partition(" C=")
    race("sweep", contender(way, int(channels)))
