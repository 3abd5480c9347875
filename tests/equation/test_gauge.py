"""The balanced gauge: the composition stays, and the product of the norms is nearly the least that any gauge has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmorph.equation import arrays, reference
from fastmorph.equation.gauge import balance


@pytest.fixture(params=[False, True], ids=["at hand", "queued"])
def queued(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(arrays, "_AT_HAND", frozenset())


def kernels(decades: float):
    """F1 (2, 12, 5, 3, 3) and F2 (2, 4, 12, 2, 2) in a basis whose condition is so many decades."""
    draw = np.random.default_rng(0)
    basis, _ = np.linalg.qr(draw.standard_normal((12, 12)))
    mix = (basis * 10.0 ** np.linspace(0, -decades, 12)) @ basis.T
    first, second = draw.standard_normal((2, 12, 5, 3, 3)), draw.standard_normal((2, 4, 12, 2, 2))
    return np.einsum("gh,bhixy->bgixy", mix, first), np.einsum("bohxy,hg->bogxy", second, np.linalg.inv(mix))


@pytest.mark.parametrize("decades", [0.0, 1.0, 3.0])
@pytest.mark.usefixtures("queued")
def test_norms_are_nearly_least_and_the_composition_stays(decades):
    first, second = kernels(decades)
    one, two = (kernel.numpy() for kernel in balance(torch.from_numpy(first), torch.from_numpy(second)))
    for b in range(2):
        before, after = reference.compose(first[b], second[b]), reference.compose(one[b], two[b])
        # Each basis costs its condition times rounding.
        assert np.abs(after - before).max() <= 10.0**decades * 1e-12 * np.abs(before).max()
        rows, columns = first[b].reshape(12, -1), second[b].swapaxes(0, 1).reshape(12, -1)
        # |T F1|^2 + |F2 T^-1|^2 >= 2 |F2 F1|_*, the nuclear norm of the product, for every T; then each is that norm.
        least = np.linalg.svd(columns.T @ rows, compute_uv=False).sum()
        assert least <= (1 + 1e-9) * np.linalg.norm(one[b]) * np.linalg.norm(two[b]) <= 1.01 * least


@pytest.mark.usefixtures("queued")
def test_zero_kernels_stay_zero_and_finite():
    first, second = (torch.from_numpy(kernel) for kernel in kernels(0.0))
    second[0] = 0
    one, two = balance(first, second)
    assert not two[0].any()
    assert bool(torch.isfinite(one).all() & torch.isfinite(two).all())


def test_nothing_is_read_where_that_would_wait(monkeypatch):
    monkeypatch.setattr(arrays, "_AT_HAND", frozenset())
    with FakeTensorMode():
        one, two = balance(torch.empty(2, 8, 4, 3), torch.empty(2, 6, 8, 3))
    assert (one.shape, two.shape) == ((2, 8, 4, 3), (2, 6, 8, 3))
