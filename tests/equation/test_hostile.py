"""Weights of any power, short dtypes, autocast, transforms, empty batches and what is no problem: right or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmorph as fm
from fastmorph.equation import reference

SOLVERS = [
    pytest.param(fm.Direct(), (4, 3, 3, 3), 7, (3, 3), id="direct"),
    pytest.param(fm.General(max_iter=1), (4, 3, 3, 3), 9, (3, 3), id="half-step"),
    pytest.param(fm.Practical(), (4, 3, 3, 3), 6, (3, 3), id="practical"),
    pytest.param(fm.General(), (4, 4, 5, 5), 10, (3, 3), id="gauss-newton"),
    pytest.param(fm.General(acceleration="anderson"), (4, 4, 5, 5), 11, (3, 3), id="anderson"),
]


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def missed(weight, first, second, power):
    """The oracle's relative residual, of kernels and weight divided by powers of two, which is exact."""
    half = 2.0 ** (power // 2), 2.0 ** (power - power // 2)
    composed = reference.compose(first.double().numpy() / half[0], second.double().numpy() / half[1])
    target = weight.double().numpy() / half[0] / half[1]
    border = [((n - k) // 2, n - k - (n - k) // 2) for n, k in zip(composed.shape, target.shape, strict=True)]
    target = np.pad(target, border)
    return float(np.linalg.norm(composed - target) / np.linalg.norm(target))


@pytest.mark.parametrize("power", [-1000, -600, 600, 1000])
@pytest.mark.parametrize(("solver", "shape", "hidden", "sizes"), SOLVERS)
def test_weights_of_any_power(solver, shape, hidden, sizes, power):
    """Their squares leave float64; scaled by a power of two, the answer is that of the plain weight, bit for bit."""
    options = {"solver": solver, "allow_inexact": True}
    plain = fm.decompose(draw(*shape), hidden, sizes, generator=torch.Generator().manual_seed(0), **options)
    weight = draw(*shape) * 2.0 ** (power // 2) * 2.0 ** (power // 2)
    found = fm.decompose(weight, hidden, sizes, generator=torch.Generator().manual_seed(0), **options)
    assert bool(found.first.isfinite().all() & found.second.isfinite().all())
    assert float(found.residual) == pytest.approx(float(plain.residual), rel=1.0, abs=1e-15)
    assert missed(weight, found.first, found.second, power) <= 1e-10
    assert bool(found.converged)


@pytest.mark.parametrize("power", [1e-170, 1e170])
def test_refusals_of_weights_of_any_power_speak_of_ranks(power):
    with pytest.raises(fm.MorphError, match="rank 3"):
        fm.decompose(draw(4, 3, 3, 3) * power, 2)
    easy = draw(2, 4, 4)
    easy[0] *= power
    found = fm.decompose(easy, 6, spatial_dims=0)  # items of different powers
    for b in range(2):
        torch.testing.assert_close(
            found.second[b] @ found.first[b], easy[b], rtol=1e-12, atol=1e-13 * float(easy[b].abs().max())
        )


@pytest.mark.parametrize("power", [2.0**-600, 2.0**600])
def test_rows_and_sums_and_the_operator_of_any_power(power):
    weight, seed = draw(4, 3, 5, 5), torch.Generator().manual_seed(0)
    chain = fm.decompose_sequence(weight * power, (36, 36), (3, 3, 1), generator=seed)
    assert 0 < float(chain.residual) <= 1e-10
    whole = chain.kernels[0] / power ** (1 / 3)
    for kernel in chain.kernels[1:]:
        whole = fm.compose(whole, kernel / power ** (1 / 3))
    torch.testing.assert_close(whole, weight, rtol=1e-9, atol=1e-9)
    found = fm.decompose_sum(weight * power, [((), (5,)), ((6,), (3, 1))], generator=seed)
    assert 0 <= float(found.residual) <= 1e-10
    first = draw(1, 14, 3, 3, 3)
    expected, shown = (fm.alternate(draw(1, 4, 3, 3, 3) * p, first, (3, 3), 1) for p in (1.0, power))
    assert torch.equal(shown[1], expected[1] * power)
    assert torch.equal(shown[2], expected[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_by_every_road(dtype):
    thin = draw(6, 1, dtype=dtype) @ draw(1, 6, dtype=dtype)
    for weight, hidden, sizes in (
        (thin, 1, (1, 1)),
        (draw(4, 3, 3, 3, dtype=dtype), 9, (3, 3)),
        (draw(6, 6, 5, 5, dtype=dtype), 18, (3, 3)),
    ):
        found = fm.decompose(weight, hidden, sizes, spatial_dims=weight.ndim - 2)
        assert found.first.dtype == dtype
        assert float(found.residual) <= fm.tolerance(dtype)
    with pytest.raises(fm.MorphError, match="rank"):
        fm.decompose(draw(6, 6, dtype=dtype), 2, spatial_dims=0)


@pytest.mark.parametrize(("solver", "shape", "hidden", "sizes"), SOLVERS)
def test_autocast_rounds_nothing(solver, shape, hidden, sizes):
    weight = draw(*shape, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fm.decompose(weight, hidden, sizes, solver=solver)
        whole = fm.compose(found.first, found.second)
    assert torch.equal(whole, fm.compose(found.first, found.second))
    assert missed(weight, found.first, found.second, 0) <= fm.tolerance(torch.float32)


@pytest.mark.parametrize(("solver", "shape", "hidden", "sizes"), SOLVERS)
@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_empty_batches(solver, shape, hidden, sizes, backend):
    found = fm.decompose(torch.empty(0, *shape), hidden, sizes, solver=solver, backend=backend)
    assert found.first.shape == (0, hidden, shape[1], 3, 3)
    assert found.residual.shape == found.iterations.shape == (0,)
    assert found.density == (1.0, 1.0)


def test_compose_is_differentiable():
    first, second = draw(2, 3, 2, 2, 2).requires_grad_(), draw(2, 2, 3, 2, 1).requires_grad_()
    assert torch.autograd.gradcheck(fm.compose, (first, second))
    gradient = torch.func.grad(lambda f: fm.compose(f, second.detach()).square().sum())(first.detach())
    fm.compose(first, second).square().sum().backward()
    torch.testing.assert_close(gradient, first.grad)
    for backend in ("numpy", "triton"):
        with pytest.raises(fm.MorphError, match="no gradient flows"):
            fm.compose(first, second, backend=backend)


def test_decompose_refuses_transforms_and_detaches():
    with pytest.raises(fm.MorphError, match=r"torch.func"):
        torch.func.grad(lambda w: fm.decompose(w, 8).first.sum())(draw(4, 3, 3, 3))
    with pytest.raises(fm.MorphError, match=r"torch.func"):
        torch.vmap(lambda w: fm.decompose(w, 8).first)(draw(2, 4, 3, 3, 3))
    assert not fm.decompose(2 * draw(4, 3, 3, 3).requires_grad_(), 8).first.requires_grad


@pytest.mark.parametrize(
    ("problems", "words"),
    [
        (fm.Problem(draw(4, 3, 3, 3), 8), "pass a list"),
        ([(draw(4, 3, 3, 3), 8)], "problem 0: a tuple is not a problem"),
        ([fm.Problem(draw(4, 3, 3, 3), 8), draw(4, 3, 3, 3)], "problem 1: a Tensor is not a problem"),
        ([fm.Problem(draw(4, 3, 3, 3), 10**11)], "GB in all"),
        ([fm.Problem(draw(4, 3, 3, 3), 8, (10**9, 3))], "GB in all"),
        ([fm.Problem(draw(4, 3, 3, 3), 8, (3.0, 3))], "not a positive int"),
        ([fm.Problem(draw(4, 3, 3, 3), 8, None)], "two entries"),
        ([fm.Problem(draw(4, 3, 3, 3), 8, spatial_dims=2.0)], "spatial_dims=2.0"),
    ],
)
def test_what_is_no_problem_is_refused(problems, words):
    with pytest.raises(fm.MorphError, match=words):
        fm.decompose_many(problems, progress=False)


def test_another_default_device():
    torch.set_default_device("meta")
    try:
        found = fm.decompose(torch.ones(40, 4, 3, 3, device="cpu"), 47)
    finally:
        torch.set_default_device(None)
    assert bool(found.converged)
