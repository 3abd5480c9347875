"""Three or more kernels in a row, and sums of branches: exact by the oracle, whatever their reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastmorph as fm
from fastmorph.equation import reference


def composed(kernels):
    whole = kernels[0].double().numpy()
    for kernel in kernels[1:]:
        whole = reference.compose(whole, kernel.double().numpy())
    return whole


def laid_out(weight, chains):
    """The weight less its chains, on a canvas large enough for all of them."""
    margin = 16
    canvas = np.pad(weight.double().numpy(), [(0, 0), (0, 0)] + [(margin, margin)] * (weight.ndim - 2))
    for chain in chains:
        whole = composed(chain.kernels)
        spot = tuple(slice(margin - b, margin - b + n) for b, n in zip(chain.before, whole.shape[2:], strict=True))
        canvas[(..., *spot)] -= whole
    return float(np.linalg.norm(canvas) / np.linalg.norm(weight.double().numpy()))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_any_number_of_kernels_in_a_row(dtype, bound, data):
    dims = data.draw(st.integers(0, 3))
    count = data.draw(st.integers(1, 4))
    co, ci = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    k = tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
    sizes = [tuple(data.draw(st.integers(1, 3)) for _ in range(dims)) for _ in range(count)]
    place = data.draw(st.integers(0, count - 1))  # one kernel holds the weight, so that few channels are enough
    sizes[place] = tuple(map(max, zip(sizes[place], k, strict=True))) if dims else ()
    hidden = sorted(max(co, ci) + data.draw(st.integers(0, 5)) for _ in range(count - 1))
    weight = torch.randn(co, ci, *k, dtype=torch.float64).to(dtype)
    chain = fm.decompose_sequence(weight, hidden, sizes if dims else [1] * count, spatial_dims=dims)
    assert [kernel.dtype for kernel in chain.kernels] == [dtype] * count
    assert bool(chain.converged)
    missed = laid_out(weight, [chain])
    assert missed <= bound * max(1, count - 1)
    assert float(chain.residual) == pytest.approx(missed, rel=1e-6, abs=1e-12)


def test_a_seven_wide_kernel_as_three_of_three():
    weight = torch.randn(2, 6, 4, 7, 7, dtype=torch.float64)
    chain = fm.decompose_sequence(weight, (12, 34), (3, 3, 3))
    assert [tuple(kernel.shape) for kernel in chain.kernels] == [(2, 12, 4, 3, 3), (2, 34, 12, 3, 3), (2, 6, 34, 3, 3)]
    assert chain.residual.shape == (2,)
    for b in range(2):
        whole = composed([kernel[b] for kernel in chain.kernels])
        np.testing.assert_allclose(whole, weight[b].numpy(), atol=1e-10)


@pytest.mark.parametrize(
    ("dims", "branches"),
    [
        (2, [((8,), (3, 3)), ((), (1,)), ((6, 6), (1, 3, 1))]),
        (2, [((), (3,)), ((), (5,)), ((15,), ((3, 1), (1, 3)))]),
        (1, [((), (2,)), ((7,), (3, 2))]),
        (0, [((6,), (1, 1)), ((), (1,))]),
    ],
)
def test_sums_of_branches(dims, branches):
    weight = torch.randn(6, 5, *(3,) * dims)
    found = fm.decompose_sum(weight, branches, spatial_dims=dims, generator=torch.Generator().manual_seed(0))
    assert len(found.branches) == len(branches)
    assert bool(found.converged)
    assert laid_out(weight, found.branches) <= 5e-6
    assert float(found.residual) <= 5e-6
    assert all(float(kernel.abs().max()) > 0.01 for chain in found.branches for kernel in chain.kernels)
    again = fm.decompose_sum(weight, branches, spatial_dims=dims, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.branches[0].kernels[0], found.branches[0].kernels[0])


def test_refusals_name_the_kernel_and_the_branch():
    weight = torch.randn(6, 5, 3, 3)
    with pytest.raises(fm.MorphError, match="2 kernels in a row"):
        fm.decompose_sequence(weight, (8, 8), (3, 3))
    with pytest.raises(fm.MorphError, match="smaller than the weight"):
        fm.decompose_sequence(weight, (8,), (1, 1))
    with pytest.raises(fm.MorphError, match="kernel 1 of 3: hidden_channels"):
        fm.decompose_sequence(weight, (8, 2), (3, 3, 3))
    with pytest.raises(fm.MorphError, match="branch 1: kernel 0 of 2"):
        fm.decompose_sum(weight, [((), (3,)), ((2,), (3, 3))])
    with pytest.raises(fm.MorphError, match="no branch reaches"):
        fm.decompose_sum(weight, [((), (1,)), ((), (2,))])
