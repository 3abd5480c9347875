"""A of a fixed kernel: the same maps whether it is built or not, and those of the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmorph.equation import arrays, reference
from fastmorph.equation.backends import TorchBackend
from fastmorph.equation.system import System

CASES = [((2, 5, 3, 3, 2), (2, 3), (3, 3), (0, 1)), ((3, 4, 2, 3), (4,), (2,), (1,)), ((2, 4, 3), (), (), ())]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("shape", "k2", "kernel", "before"), CASES)
@pytest.mark.parametrize("queued", [False, True])
def test_maps_are_those_of_the_oracle(monkeypatch, shape, k2, kernel, before, queued):
    if queued:
        monkeypatch.setattr(arrays, "_AT_HAND", frozenset())
    first, target, second = (
        noise(*shape),
        noise(shape[0], 6, shape[2], *kernel, seed=1),
        noise(shape[0], 6, shape[1], *k2, seed=2),
    )
    system = System(first, k2, TorchBackend())
    assert (system.matrix is not None) == queued
    error, norm = system.error(target, before, second)
    rows, columns = system.right_side(target, before), system.columns(target, before)
    gram, columns_gram = system.row_gram(), system.column_gram()
    for b in range(shape[0]):
        a = reference.dense_system(first[b].numpy(), k2)  # rows channel by channel
        order = np.arange(len(a)).reshape(shape[1], -1).T.reshape(-1)  # tap by tap
        a = torch.from_numpy(a[order])
        widths = [(0, 0)] * 2 + [(x, n - x - k) for x, n, k in zip(before, error.shape[3:], kernel, strict=True)]
        padded = np.pad(target[b].numpy(), widths)
        left = padded - reference.compose(first[b].numpy(), second[b].numpy())
        torch.testing.assert_close(error[b], torch.from_numpy(left), rtol=1e-12, atol=1e-12)
        assert float(norm[b]) == pytest.approx(np.linalg.norm(left), rel=1e-12)
        right = a @ torch.from_numpy(padded).flatten(1).mT
        torch.testing.assert_close(rows[b], right, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(system.rows(system.image(columns))[b], right, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gram[b].tril(), (a @ a.mT).tril(), rtol=1e-12, atol=1e-12)
        # Columns have an order of their own, in which the target's are given.
        lower = columns_gram[b].tril()
        whole = lower + lower.tril(-1).mT
        shown = columns[b].mT @ whole @ columns[b]
        torch.testing.assert_close(shown, right.mT @ right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(system.kernel(system.rows(second)), second)
