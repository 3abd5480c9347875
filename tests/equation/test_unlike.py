"""Closed forms of unlike sizes that share launches: the answers of single calls and of PyTorch alone, and every refusal."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import fastmorph as fm
from fastmorph.equation import estimate, unlike
from fastmorph.equation.backends import TritonBackend

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None, reason="kernels run on a GPU, or interpreted"
)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def problems(dtype: torch.dtype = torch.float64) -> list[fm.Problem[Any]]:
    return [
        fm.Problem(random(5, 4, 2, dtype=dtype), 9, (2, 1), 1),
        fm.Problem(random(34, 3, dtype=dtype), 35, spatial_dims=0),
        fm.Problem(random(2, 4, 3, 1, 1, dtype=dtype), 8, (1, 2)),
        fm.Problem(random(3, 33, dtype=dtype), 4, spatial_dims=0),  # fewer than its input channels
    ]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many equations each call of the kernels gets."""
    found: list[int] = []
    many = TritonBackend.direct_many

    def counted(self: TritonBackend, equations: Any, **options: Any) -> Any:
        found.append(len(equations))
        return many(self, equations, **options)

    monkeypatch.setattr(TritonBackend, "direct_many", counted)
    return found


def solve(given: list[fm.Problem[Any]], backend: str, **options: Any) -> list[fm.Decomposition[Any]]:
    return fm.decompose_many(given, backend=backend, generator=5, progress=False, **options)


def test_answers_are_those_of_pytorch_and_of_single_calls(groups):
    given = problems()
    found, plain = solve(given, "triton"), solve(given, "torch")
    assert groups == [4]
    alone = fm.decompose_many(given[1:2], backend="triton", generator=[_seed(1)], progress=False)[0]
    assert torch.equal(alone.first, found[1].first)
    assert torch.equal(alone.residual, found[1].residual)
    for one, other in zip(found, plain, strict=True):
        assert bool(one.converged.all())
        assert one.converged.dtype == torch.bool
        assert one.worst == float(one.residual.max()) <= 1e-14
        for name in ("first", "second", "residual", "iterations", "converged", "trace"):
            # Both make the same noise and P; their products are sums of at most 32 terms of size 4.
            a, b = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(a, b, rtol=0, atol=32 * 16 * torch.finfo(torch.float64).eps)
        assert (one.reason, one.cost, one.estimated) == (other.reason, other.cost, other.estimated)


def _seed(number: int) -> int:
    return fm.equation.randomness.draw_seeds(5, 4)[number]


def test_kernels_estimate_by_as_many_sums_from_as_many_channels_on():
    from fastmorph_kernels.direct_many.op import FEW, SUMS

    assert (estimate._SUMS, estimate.MEASURED) == (SUMS, FEW)


def test_the_budget_divides_them(groups):
    solve(problems(), "triton", memory_budget=1)
    assert groups == [1, 1, 1, 1]


def test_what_takes_a_half_step_or_a_factorisation_goes_its_own_way(groups):
    thin = random(8, 2) @ random(2, 8)
    given = [fm.Problem(thin, 2, spatial_dims=0), fm.Problem(random(3, 3, 1, dtype=torch.bfloat16), 27, (1, 3), 1)]
    found = solve(given, "triton")
    assert groups == []
    assert all(bool(one.converged) for one in found)


def test_a_solver_that_is_derived_from_it_goes_its_own_way(groups):
    class Own(fm.Direct):
        pass

    found = fm.decompose(random(5, 4), 9, spatial_dims=0, solver=Own(), backend="triton", generator=0)
    assert groups == []
    assert bool(found.converged)


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if work on the CPU were queued: nothing is read before the end."""
    monkeypatch.setattr(fm.equation.arrays, "_AT_HAND", frozenset())


@pytest.mark.usefixtures("queued")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
def test_what_is_out_of_range_is_solved_in_range_and_no_number_is_refused(groups):
    given = problems(torch.float32)[:2]
    plain = solve(given, "triton")
    large = [given[0], fm.Problem(given[1].weight * 2.0**90, 35, spatial_dims=0)]
    found = solve(large, "triton")
    assert groups == [2, 2, 1]
    assert torch.equal(found[1].first, plain[1].first * 2.0**45)
    assert bool(found[1].converged)
    bad = given[1].weight.clone()
    bad[33, 2] = torch.nan
    with pytest.raises(fm.MorphError, match="problem 1: weight has 1 entries that are NaN or infinite"):
        solve([given[0], fm.Problem(bad, 35, spatial_dims=0)], "triton")


def test_what_is_not_exact_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(unlike, "tolerance", lambda dtype: 0.0)
    monkeypatch.setattr(fm.equation.solve, "tolerance", lambda dtype: 0.0)
    with pytest.raises(fm.InexactMorphError, match=r"problem 0: Direct\(density=0.5\) left a relative residual") as caught:
        solve(problems(), "triton")
    assert not bool(caught.value.decomposition.converged)
