"""What is decided before a solve: one factorisation at most, solvers of others, and what a problem that fails is called."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from strategies import Case, oracle_residual

import fastmorph as fm
from fastmorph.equation.frame import make_frame
from fastmorph.equation.solvers import Equation, Solution


def low_rank(co, ci, rank, kernel, *, turned=False):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(co, rank, generator=generator, dtype=torch.float64)
    weight = torch.tensordot(left, torch.randn(rank, ci, *kernel, generator=generator, dtype=torch.float64), dims=1)
    return weight.transpose(0, 1) if turned else weight


@pytest.mark.parametrize(
    ("weight", "hidden", "sizes", "solver", "exact"),
    [
        pytest.param(low_rank(24, 20, 2, (3, 3)), 3, (3, 3), fm.Auto(), True, id="low rank"),
        pytest.param(low_rank(24, 20, 2, (3, 3), turned=True), 3, (3, 3), fm.Auto(), True, id="low rank across the inputs"),
        pytest.param(low_rank(24, 20, 2, (3, 3)), 3, (3, 3), fm.Direct(), True, id="low rank, asked for"),
        pytest.param(low_rank(9, 2, 2, ()), 3, (1, 1), fm.Auto(), True, id="by the rank that the sizes allow"),
        pytest.param(low_rank(24, 20, 20, (3, 3)), 3, (3, 3), fm.Auto(), False, id="below the rank"),
        pytest.param(low_rank(24, 20, 20, (3, 3)), 3, (3, 3), fm.General(), False, id="below the rank, asked for"),
        pytest.param(low_rank(9, 8, 8, (3, 3)), 12, (3, 3), fm.Auto(), True, id="closed form"),
        pytest.param(low_rank(6, 6, 6, (5, 5)), 14, (3, 3), fm.Auto(), True, id="general"),
    ],
)
def test_a_weight_is_factored_once_at_most(weight, hidden, sizes, solver, exact, monkeypatch):
    calls = []
    for name in ("svd", "svdvals"):
        function = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda *a, f=function, **k: calls.append(1) or f(*a, **k))
    dims = weight.ndim - 2
    options = {"solver": solver, "spatial_dims": dims, "generator": torch.Generator().manual_seed(0)}
    if exact:
        found = fm.decompose(weight, hidden, sizes, **options)
        case = Case(weight, make_frame(weight.shape[2:], sizes), dims)
        assert oracle_residual(case, found.first, found.second) <= 1e-10
    else:
        with pytest.raises(fm.MorphError, match="rank 20"):
            fm.decompose(weight, hidden, sizes, **options)
    assert len(calls) <= 1


# --- a solver of somebody else ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves(fm.Solver):
    """F1 = [G; G; 0] and F2 = [share I | (1 - share) I | 0] with K2 = 1."""

    share: float = 0.5

    def solve(self, equation: Equation) -> Solution:
        (batch, co, ci), weight, hidden = equation.sizes, equation.weight, equation.hidden
        first = weight.new_zeros(batch, hidden, ci, *equation.frame.first)
        first[:, : 2 * co] = torch.cat([weight, weight], 1)
        second = weight.new_zeros(batch, co, hidden, *equation.frame.second)
        for start, share in ((0, self.share), (co, 1 - self.share)):
            corner = (..., slice(start, start + co), *(0,) * (weight.ndim - 3))
            second[corner] = share * torch.eye(co).to(weight)
        return Solution.without_steps(first, second)


def test_a_solver_from_outside():
    weight = torch.randn(3, 2, 3, 3)
    found = fm.decompose(weight, 7, (3, 1), solver=Halves(0.25))
    assert found.solver == Halves(0.25)
    assert oracle_residual(Case(weight, make_frame((3, 3), (3, 1)), 2), found.first, found.second) <= 1e-6
    assert bool(found.converged)
    many = fm.decompose_many([fm.Problem(weight, 7, (3, 1))] * 3, solver=Halves(), progress=False)
    assert all(bool(each.converged) for each in many)
    x, conv = torch.randn(2, 2, 6, 6), torch.nn.Conv2d(2, 3, 3)
    child = fm.deepen(torch.nn.Sequential(conv), "0", hidden_channels=6, kernel_sizes=(3, 1), solver=Halves())
    torch.testing.assert_close(child(x), conv(x), rtol=1e-5, atol=1e-5)


def test_a_solver_from_outside_is_not_trusted():
    with pytest.raises(fm.InexactMorphError, match="Halves"):
        fm.decompose(torch.randn(3, 2, 3, 3), 6, (3, 3), solver=Halves())  # its delta stands in a corner
    with pytest.raises(fm.MorphError, match="no numpy reference"):
        fm.decompose(torch.randn(3, 2, 3, 3), 6, (3, 1), solver=Halves(), backend="numpy")


# --- errors and figures -----------------------------------------------------------------------------------------------------


def test_an_error_carries_its_problem():
    good, bad = fm.Problem(torch.randn(4, 4), 4, spatial_dims=0), fm.Problem(torch.randn(4, 4), 2, spatial_dims=0)
    with pytest.raises(fm.MorphError) as caught:
        fm.decompose_many([good, bad], progress=False)
    assert caught.value.problem == 1
    assert str(caught.value) == f"problem 1: {caught.value.inner}"
    hard = fm.Problem(torch.randn(8, 8, 5, 5), 16)
    with pytest.raises(fm.InexactMorphError) as caught:
        fm.decompose_many([good, good, hard], solver=fm.General(max_iter=1), progress=False)
    assert caught.value.problem == 2
    assert caught.value.decomposition.first.shape == (16, 8, 3, 3)
    with pytest.raises(fm.MorphError) as caught:
        fm.decompose(torch.randn(4, 4), 2, spatial_dims=0)
    assert caught.value.problem is None


def test_density_and_whether_the_residual_is_an_estimate_are_told():
    few = fm.decompose(torch.randn(8, 8, 3, 3), 8)
    assert few.density == (1.0, pytest.approx(1 / 9))  # as many hidden channels as outputs: centre taps alone
    assert not few.estimated
    wide = fm.decompose(torch.randn(33, 8, 3, 3).numpy(), 40)
    assert min(wide.density) > 0.97
    assert wide.estimated
    assert not fm.decompose(torch.randn(33, 8, 3, 3), 40, solver=fm.General(max_iter=1)).estimated
