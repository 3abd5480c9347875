"""The half-step's factor: zeros of the Gram matrix are left out, and no digit with them."""

from __future__ import annotations

import pytest
import torch

from fastmorph.equation.backends import TorchBackend
from fastmorph.equation.banded import BandedCholesky
from fastmorph.equation.half_step import HalfStep


@pytest.mark.parametrize(
    ("shape", "k2", "blocks"),
    [
        ((3, 40, 4, 3, 3), (3, 3), 5),
        ((2, 30, 4, 2), (6,), 7),
        ((1, 9, 2, 1, 3), (2, 2), 2),
        ((2, 8, 3, 4), (1,), 1),
        ((2, 12, 5), (), 1),
        ((1, 4, 1, 300), (300,), 1),
    ],
)
def test_the_banded_factor_is_the_dense_one(shape, k2, blocks):
    first = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = HalfStep(first, k2, TorchBackend())
    assert len(step.factor.lower) == blocks
    if step.by_rows:
        return
    gram = TorchBackend().column_gram(first, k2)
    right = torch.randn(len(gram), gram.shape[1], 3, dtype=torch.float64)
    dense = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    # Both are backward stable: they differ by the condition times rounding.
    scale = float(torch.linalg.cond(gram).max()) * gram.shape[1] * torch.finfo(torch.float64).eps
    assert float((step.factor.solve(right) - dense).norm()) <= scale * float(dense.norm())


def test_indefinite_and_hopeless_items_are_found():
    gram = torch.eye(6, dtype=torch.float64).repeat(3, 1, 1)
    gram[1, 4, 4] = -1.0
    gram[2, 5, 5] = 1e-17
    factor = BandedCholesky(gram, 3, 1)
    assert factor.failed.tolist() == [False, True, True]
    factor.drop_failed()
    right = torch.randn(3, 6, 2, dtype=torch.float64)
    torch.testing.assert_close(factor.solve(right), right)
