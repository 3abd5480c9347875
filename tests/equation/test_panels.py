"""The blocked factor of batches: the dense one, to its error bound; failures are found item by item."""

from __future__ import annotations

import pytest
import torch

from fastmorph.equation import arrays, half_step, panels
from fastmorph.equation.backends import TorchBackend
from fastmorph.equation.half_step import HalfStep
from fastmorph.equation.panels import PanelCholesky


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(panels, "_PANEL", 7)


def matrices(batch: int, n: int) -> torch.Tensor:
    rows = torch.randn(batch, n, n + 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows @ rows.mT


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("n", [5, 7, 14, 40])
def test_it_solves_as_the_dense_factor_does(n):
    gram = matrices(3, n)
    right = torch.randn(3, n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor = PanelCholesky(gram.clone())
    assert not factor.failed.any()
    # Both are backward stable, the corners' inverses up to their condition, which is below the whole one's.
    bound = float(torch.linalg.cond(gram).max()) * n * torch.finfo(torch.float64).eps
    dense = torch.linalg.cholesky(gram)
    assert float((factor.dense.tril() - dense).norm()) <= bound * float(dense.norm())
    expected = torch.linalg.solve(gram, right)
    assert float((factor.solve(right) - expected).norm()) <= bound * float(expected.norm())


@pytest.mark.usefixtures("narrow")
def test_items_that_fail_are_found_and_dropped():
    gram = matrices(4, 20)
    gram[1, 12, 12] = -1.0
    gram[2] = torch.eye(20, dtype=torch.float64)
    gram[2, 19, 19] = 1e-17
    right = torch.randn(4, 20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor = PanelCholesky(gram.clone())
    assert factor.failed.tolist() == [False, True, True, False]
    factor.drop_failed()
    solved = factor.solve(right)
    torch.testing.assert_close(solved[1:3], right[1:3])
    torch.testing.assert_close(gram[[0, 3]] @ solved[[0, 3]], right[[0, 3]], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("narrow")
def test_a_batch_of_large_half_steps_has_it_where_launches_cost(monkeypatch):
    first = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at_hand = HalfStep(first, (3,), TorchBackend())
    monkeypatch.setattr(arrays, "_AT_HAND", frozenset())
    monkeypatch.setattr(half_step, "_ALONE", 10)
    queued = HalfStep(first, (3,), TorchBackend())
    assert isinstance(queued.factor, PanelCholesky)
    assert not isinstance(HalfStep(first[:1], (3,), TorchBackend()).factor, PanelCholesky)
    scale = 15 * float(torch.linalg.cond(TorchBackend().column_gram(first, (3,))).max()) * torch.finfo(torch.float64).eps
    ours, theirs = queued.solve(target, (1,)), at_hand.solve(target, (1,))
    assert float((ours - theirs).norm()) <= scale * float(theirs.norm())
