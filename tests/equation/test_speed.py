"""Factors in float32 where a device's float64 is slow: as exact, by refinement against float64 errors or by another draw."""

from __future__ import annotations

import pytest
import torch
from strategies import Case, oracle_residual

import fastmorph as fm
from fastmorph.equation import arrays
from fastmorph.equation.frame import make_frame
from fastmorph.equation.solvers import base, general
from fastmorph.equation.speed import factors_in


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_table(monkeypatch, capability):
    quick = capability in {(8, 0), (9, 0)}  # those with a matrix unit for float64, of the devices that kernels are compiled for
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert factors_in(torch.device("cuda", 0)) == (torch.float64 if quick else torch.float32)
    assert factors_in(torch.device("cpu")) == torch.float64


@pytest.fixture
def factored(monkeypatch):
    """As on a GPU whose float64 is slow; which half-steps were factored in float32."""
    kinds = []

    class Told(general.HalfStep):
        def __init__(self, *arguments, coarse=None, **options):
            super().__init__(*arguments, coarse=coarse, **options)
            kinds.append(coarse and (coarse.name, coarse.precision))

    monkeypatch.setattr(arrays, "_AT_HAND", frozenset())
    monkeypatch.setattr(base, "factors_in", lambda device: torch.float32)
    monkeypatch.setattr(general, "HalfStep", Told)
    return kinds


def weight(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


# By columns with a condition of 3e2 to 1e8 of the Gram matrix, the last at Claim 1's bound; by rows.
@pytest.mark.parametrize(
    ("shape", "hidden"), [((4, 8, 8, 3, 3), 32), ((4, 8, 8, 3, 3), 23), ((2, 16, 16, 3, 3), 45), ((3, 4, 9, 3, 3), 12)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_exact(factored, shape, hidden, dtype):
    given = weight(*shape, dtype=dtype)
    found = fm.decompose(given, hidden, solver=fm.General(), backend="torch", generator=0)
    assert factored[0] == ("torch", None)
    shown = oracle_residual(Case(given, make_frame((3, 3), (3, 3)), 2), found.first, found.second)
    assert shown <= fm.tolerance(dtype)
    assert bool(found.converged.all())


def test_it_is_as_exact_by_kernels(factored, kernel_device):
    given = weight(1, 3, 2, 3).to(kernel_device)
    found = fm.decompose(given, 5, (3, 3), spatial_dims=1, solver=fm.General(), backend="triton", generator=0)
    assert factored == [("triton", "tf32x3")]
    shown = oracle_residual(Case(given.cpu(), make_frame((3,), (3, 3)), 1), found.first.cpu(), found.second.cpu())
    assert shown <= fm.tolerance(torch.float32)


def test_what_float32_cannot_solve_is_solved_in_float64(factored, monkeypatch):
    """Hidden channels that are nearly alike: the Gram matrix is beyond float32, not beyond float64."""
    start = base.Equation.start

    def nearly_alike(equation):
        noise = start(equation)
        return noise[:, :1] + 1e-4 * noise

    monkeypatch.setattr(base.Equation, "start", nearly_alike)
    given = weight(2, 6, 6, 3, 3)
    found = fm.decompose(given, 18, solver=fm.General(), backend="torch", generator=0)
    assert factored == [("torch", None), None]
    assert oracle_residual(Case(given, make_frame((3, 3), (3, 3)), 2), found.first, found.second) <= fm.tolerance(torch.float32)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, None), (torch.float32, "float64"), (torch.float32, "ieee")])
def test_who_asks_for_a_precision_has_it(factored, dtype, precision):
    fm.decompose(weight(6, 6, 3, 3, dtype=dtype), 20, solver=fm.General(), backend="torch", precision=precision, generator=0)
    assert set(factored) == {None}
