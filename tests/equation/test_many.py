"""`decompose_many`: the answers of one-by-one calls, in order, whatever the buckets and the budget."""

from __future__ import annotations

import pytest
import torch

import fastmorph as fm


def problems():
    torch.manual_seed(0)
    thin = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    return [
        fm.Problem(torch.randn(4, 3, 3, 3), 8),
        fm.Problem(torch.randn(6, 5), 6, spatial_dims=0),
        fm.Problem(torch.randn(4, 3, 3, 3), 8),
        fm.Problem(torch.randn(2, 3, 5, 5), 10),
        fm.Problem(torch.randn(8, 1, 1, 3, 3), 2),
        fm.Problem(torch.randn(2, 2, 4, 3, 3, 3), 8),
        fm.Problem(torch.randn(4, 3, 3, 3, dtype=torch.float64), 8),
        fm.Problem(torch.randn(2, 3, 5, 5), 10),
        fm.Problem(thin, 2, spatial_dims=0),
        fm.Problem(thin[:, :1] @ thin[:1], 2, spatial_dims=0),
    ]


@pytest.mark.parametrize("budget", [2**31, 1])
@pytest.mark.parametrize("solver", [fm.Auto(), fm.General(max_iter=1)])
def test_answers_are_those_of_single_calls_in_order(budget, solver):
    todo = problems()
    if solver != fm.Auto():
        todo = [p for p in todo if p.kernel_sizes == (3, 3) and p.spatial_dims == 2 and p.weight.shape[-1] == 5]
    many = fm.decompose_many(
        todo, solver=solver, generator=torch.Generator().manual_seed(7), memory_budget=budget, progress=False
    )
    generator = torch.Generator().manual_seed(7)
    for problem, found in zip(todo, many, strict=True):
        one = fm.decompose(
            problem.weight,
            problem.hidden_channels,
            problem.kernel_sizes,
            spatial_dims=problem.spatial_dims,
            solver=solver,
            generator=generator,
        )
        assert found.solver == one.solver
        assert found.residual.shape == one.residual.shape
        assert bool(found.converged.all())
        for name in ("first", "second"):
            torch.testing.assert_close(getattr(found, name), getattr(one, name), rtol=1e-5, atol=1e-5)


def test_alike_problems_share_a_solve(monkeypatch):
    calls = []
    solve = fm.equation.many.solve_alike
    monkeypatch.setattr(fm.equation.many, "solve_alike", lambda part, *a, **k: calls.append(len(part)) or solve(part, *a, **k))
    fm.decompose_many([fm.Problem(torch.randn(4, 3, 3, 3), 8) for _ in range(20)], progress=False)
    assert calls == [20]
    calls.clear()
    item = 8 * fm.Direct().memory(4, 3, 8, fm.equation.frame.make_frame((3, 3), (3, 3)))
    fm.decompose_many([fm.Problem(torch.randn(4, 3, 3, 3), 8) for _ in range(20)], memory_budget=8 * item, progress=False)
    assert calls == [8, 8, 4]


def test_the_failing_problem_is_named():
    with pytest.raises(fm.MorphError, match="problem 1: hidden_channels"):
        fm.decompose_many([problems()[0], fm.Problem(torch.randn(4, 4), 2, spatial_dims=0)])
    easy, hard = (fm.Problem(weight, 16) for weight in (torch.zeros(8, 8, 5, 5), torch.randn(8, 8, 5, 5)))
    with pytest.raises(fm.InexactMorphError, match="problem 1: ") as caught:
        fm.decompose_many([easy, hard, easy], solver=fm.General(max_iter=1), progress=False)
    assert caught.value.decomposition.first.shape == (16, 8, 3, 3)


def test_nothing_to_do_and_silence(capsys):
    assert fm.decompose_many([]) == []
    fm.decompose_many(problems()[:2], progress=False)
    assert capsys.readouterr().err == ""
    fm.decompose_many(problems()[:2], progress=True)
    assert "2/2" in capsys.readouterr().err


def test_a_weight_gives_the_same_bits_in_any_layout():
    weight = torch.randn(7, 16, 1, 1, dtype=torch.float64)
    wide = torch.randn(7, 40, 1, 1, dtype=torch.float64)
    wide[:, 5:21] = weight
    turned = weight[:, :, 0, 0].t().contiguous().t()[..., None, None]
    expected = fm.decompose(weight, 20, (1, 1), generator=0)
    for other in (wide[:, 5:21], turned):
        found = fm.decompose(other, 20, (1, 1), generator=0)
        assert torch.equal(found.first, expected.first)
        assert torch.equal(found.second, expected.second)
