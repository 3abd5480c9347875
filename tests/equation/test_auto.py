"""Auto is exact wherever it says that it can be, and says beforehand where it cannot."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Case, agrees, cases, oracle_residual

import fastmorph as fm
from fastmorph.equation.bounds import smallest_direct, smallest_exact, smallest_half_step


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(max_channels=6), data=st.data())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_auto_is_exact_or_refuses_beforehand(dtype, case, data):
    """No shape is inexact or silent, from a third above the counting bound on, and at every closed form and half-step."""
    case = Case(case.weight.to(dtype), case.frame, case.dims)
    co, ci = case.channels
    least = smallest_exact(case.frame, co, ci)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    options = {"spatial_dims": case.dims, "generator": generator}
    if least > 1 and data.draw(st.booleans()):
        with pytest.raises(fm.MorphError, match="smallest number that can be exact") as caught:
            fm.decompose(case.weight, data.draw(st.integers(1, least - 1)), case.sizes, **options)
        assert not isinstance(caught.value, fm.InexactMorphError)
        return
    easy = least in (smallest_direct(case.frame, co, ci), smallest_half_step(case.frame, co, ci))
    hidden = data.draw(st.integers(least if easy else math.ceil(1.35 * least), 3 * least))
    found = fm.decompose(case.weight, hidden, case.sizes, **options)
    assert bool(found.converged.all())
    assert oracle_residual(case, found.first, found.second) <= fm.tolerance(dtype)
    assert float(found.residual.max()) == agrees(case, found.first, found.second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "hidden"), [((32, 24, 3, 3), 36), ((16, 16, 5, 5), 48), ((16, 16, 5, 5), 32), ((24, 24, 3, 3), 72)]
)
def test_half_precision_leaves_one_rounding(dtype, shape, hidden):
    """Both kernels rounded: at most 2 eps; the residual told is that of the rounded kernels."""
    weight = torch.randn(shape).to(dtype)
    found = fm.decompose(weight, hidden, generator=torch.Generator().manual_seed(0))
    case = Case(weight, fm.equation.frame.make_frame(shape[2:], (3, 3)), 2)
    assert float(found.residual) == pytest.approx(oracle_residual(case, found.first, found.second), rel=1e-9)
    assert float(found.residual) <= fm.tolerance(dtype)


def test_the_second_kernel_makes_up_for_the_rounding_of_the_first():
    weight = torch.randn(24, 24, 3, 3).bfloat16()
    found = fm.decompose(weight, 72, solver=fm.General(max_iter=1), generator=torch.Generator().manual_seed(0))
    rounded_twice = fm.decompose(weight.double(), 72, solver=fm.General(max_iter=1), generator=torch.Generator().manual_seed(0))
    naive = fm.compose(rounded_twice.first.bfloat16().double(), rounded_twice.second.bfloat16().double())[..., 1:-1, 1:-1]
    assert float(found.residual) < 0.9 * float((naive - weight.double()).norm() / weight.double().norm())


def test_noise_that_is_nearly_singular_is_drawn_again(monkeypatch):
    """Two equal rows of noise make the square system of Claim 1's bound singular; the next draw does not."""
    draws = []
    start = fm.equation.solvers.base.Equation.start

    def unlucky(self):
        noise = start(self)
        if not draws:
            noise[0, 1] = noise[0, 0]
        draws.append(1)
        return noise

    monkeypatch.setattr(fm.equation.solvers.base.Equation, "start", unlucky)
    found = fm.decompose(torch.randn(2, 6, 6, 5, dtype=torch.float64), 10, (3, 3), spatial_dims=1)
    assert len(draws) == 2
    assert bool(found.converged.all())
    assert found.iterations.tolist() == [3, 1]  # a whole sweep, then one half-step
