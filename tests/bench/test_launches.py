"""What calls ask a GPU for, counted with no GPU; and that to wait only at the end changes no answer and no refusal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmorph as fm
from fastmorph.equation import arrays, problem
from fastmorph.equation.solvers import steihaug
from fastmorph.equation.solvers.steihaug import Linearised, direction

pytest.importorskip("triton")

from bench.launches import CALLS, Count, Counting, count, counting

# Launches and waits at most, by the kernels and by PyTorch alone.
CEILINGS = {
    "Direct 2048 -> 4096": (Count(7, 1), Count(303, 1)),
    "Direct 64 -> 128": (Count(7, 1), Count(50, 1)),
    "half-step 64 -> 192": (Count(60, 1), Count(80, 1)),
    "half-step 64 -> 228, 2052 unknowns": (Count(64, 1), Count(80, 1)),
    "Gauss-Newton, 6 problems": (Count(1081, 22), Count(1085, 22)),
    "Anderson, 6 problems": (Count(2259, 70), Count(2131, 70)),
    "Practical, 6 problems": (Count(239, 6), Count(244, 6)),
    "VGG-16's 13 convolutions": (Count(10, 1), Count(640, 1)),
    "100 alike layers": (Count(8, 1), Count(68, 1)),
    "100 unlike layers": (Count(10, 1), None),  # PyTorch alone, a batch for each, would take long
    "deepen all of VGG-16": (Count(42, 1), Count(490, 1)),
    "widen all of VGG-16": (Count(3, 1), Count(151, 1)),
}


def test_every_ceiling_is_one_of_a_call_that_is_counted():
    assert CEILINGS.keys() <= {call.name for call in CALLS}


@pytest.mark.parametrize("call", [call for call in CALLS if call.name in CEILINGS], ids=lambda call: call.name)
def test_no_call_asks_for_more_than_its_ceiling(call):
    for backend, most in zip(("triton", "torch"), CEILINGS[call.name], strict=True):
        if most is None:
            continue
        found = count(call, backend).count
        assert 0 < found.launches <= most.launches
        assert 0 < found.waits <= most.waits


def test_a_step_of_conjugate_gradients_is_twelve_operators_and_a_look_waits_once(monkeypatch):
    monkeypatch.setattr(steihaug, "_SETTLED", 0.0)  # so that it goes on to the last step
    draw = torch.Generator().manual_seed(0)
    across1, across2 = (torch.linalg.qr(torch.randn(2, 40, 12, generator=draw))[0].mT for _ in range(2))
    lower = torch.eye(12).expand(2, 12, 12)
    error = torch.nn.functional.normalize(torch.randn(2, 160, generator=draw)).view(2, 4, 4, 10)
    about = Linearised(error, np.ones(2), across1, across2, lower)
    found = []
    for steps in (4, 8):
        with counting("cpu") as mode:
            taken = direction(about, (3,), np.full(2, 1e-9), np.full(2, 1e9), np.full(2, steps)).steps
        assert taken.tolist() == [steps, steps]
        found.append(mode.count)
    assert found[1].launches - found[0].launches <= 4 * 12 + 1  # and what was told put together
    assert found[1].waits - found[0].waits == 1


def counted(run) -> Counting:
    x = torch.arange(12.0).view(3, 4)
    with counting("cpu") as mode:
        run(x)
    return mode


@pytest.mark.parametrize(
    ("run", "launches", "waits"),
    [
        (lambda x: x.T.reshape(4, 3), 0, 0),  # views
        (lambda x: x.new_empty(3), 0, 0),
        (lambda x: x + 1, 1, 0),
        (lambda x: (x * 2).sum(), 2, 0),
        (lambda x: x[0, 0].item(), 0, 1),
        (lambda x: bool(x.any()), 1, 1),
        (lambda x: float(x.sum()), 1, 1),
        (lambda x: x.tolist(), 0, 1),
        (lambda x: x.cpu(), 0, 1),
        (lambda x: x.numpy(), 0, 1),
        (lambda x: x.nonzero(), 1, 1),
        (lambda x: x[x > 3], 2, 1),
        (lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(3)), 4, 1),
        (lambda x: torch.linalg.eigh(x @ x.T), 2, 1),
    ],
)
def test_what_is_a_launch_and_what_a_wait(run, launches, waits):
    assert counted(run).count == Count(launches, waits)


def test_tables_of_the_host_do_not_count_beside_a_network():
    weight, table = torch.ones(3), torch.arange(3)
    with counting("cpu", [weight]) as mode:
        assert table.tolist() == [0, 1, 2]
        assert int(table.max()) == 2
        taken = torch.nn.Parameter(weight * 2, requires_grad=False)[table]
        assert float(taken.sum()) == 6.0
    assert mode.count == Count(3, 1)


def test_an_operator_of_the_kernels_is_the_launches_that_its_launcher_makes():
    from fastmorph_kernels import residual

    mode = counted(lambda x: residual(x[None], x.T[None].contiguous(), x.new_zeros(1, 4, 4), ()))
    assert mode.launches["_residual_kernel"] == mode.launches["_sum_kernel"] == 1


# --- a GPU's path, on the CPU ----------------------------------------------------------------------------------------------


@pytest.fixture
def queued(monkeypatch):
    """As if work on the CPU were queued: nothing is read before the end."""
    monkeypatch.setattr(arrays, "_AT_HAND", frozenset())


def weight(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


CASES = [
    (fm.Direct(), (40, 50, 3, 3), 46),  # an estimated residual, sums of channels that eight does not divide
    (fm.Direct(), (6, 5, 3, 3), 9),
    (fm.General(), (6, 6, 3, 3), 18),  # one half-step by columns
    (fm.General(), (20, 6, 3, 3), 17),  # one by rows is not exact on this side
    (fm.General(), (6, 6, 5, 5), 12),  # iterations
    (fm.General(acceleration="anderson"), (6, 6, 5, 5), 12),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("solver", "shape", "hidden"), CASES)
def test_to_wait_only_at_the_end_changes_no_answer(monkeypatch, solver, shape, hidden, dtype):
    given = weight(*shape, dtype=dtype)
    eager = fm.decompose(given, hidden, solver=solver, generator=0)
    monkeypatch.setattr(arrays, "_AT_HAND", frozenset())
    late = fm.decompose(given, hidden, solver=solver, generator=0)
    assert bool(late.converged)
    composed = fm.compose(late.first.double(), late.second.double())
    behind = (composed.shape[-1] - shape[-1]) // 2
    placed = torch.nn.functional.pad(given.double(), [behind] * 4)
    assert float((composed - placed).norm() / placed.norm()) <= fm.tolerance(dtype)
    assert late.iterations == eager.iterations or shape[-1] == 5
    if isinstance(solver, fm.Direct):
        assert torch.equal(late.first, eager.first)
        assert float(late.residual) == pytest.approx(float(eager.residual), rel=1e-3)


@pytest.mark.parametrize("solver", [fm.General(9, 1e-3, None), fm.Practical(tol=1e-9), fm.Practical(3, 1e-9)])
def test_an_alternation_that_seldom_looks_goes_the_same_way(monkeypatch, solver):
    """Items that end at different steps, and one whose systems are singular."""
    given = weight(5, 6, 6, 3, 3, dtype=torch.float64)
    given[1] = 0
    given[2] = torch.einsum("or,rikl->oikl", given[2, :, :2, 0, 0], given[3, :2])
    given[4, 3:] *= 1e-3
    hidden = 8 if isinstance(solver, fm.General) else 6
    options = {"solver": solver, "generator": 0, "allow_inexact": True, "backend": "torch"}
    eager = fm.decompose(given, hidden, (2, 3) if isinstance(solver, fm.General) else (3, 3), **options)
    monkeypatch.setattr(arrays, "_AT_HAND", frozenset())
    late = fm.decompose(given, hidden, (2, 3) if isinstance(solver, fm.General) else (3, 3), **options)
    assert torch.equal(late.iterations, eager.iterations)
    assert len({int(count) for count in eager.iterations}) > 1
    # Rounding differs, and each half-step multiplies it by its system's condition.
    torch.testing.assert_close(late.residual, eager.residual, rtol=1e-5, atol=1e-11)
    torch.testing.assert_close(late.trace.nan_to_num(-1.0), eager.trace.nan_to_num(-1.0), rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**90])
def test_weights_out_of_range_are_solved_in_range_after_all(queued, monkeypatch, scale):
    measured = []
    in_range = problem._in_range
    monkeypatch.setattr(problem, "_in_range", lambda w: measured.append(len(w)) or in_range(w))
    problems = [fm.Problem(weight(6, 5, 3, 3) * s, 9) for s in (1.0, scale)] * 2
    found = fm.decompose_many(problems, generator=0, progress=False)
    assert measured == [1, 1]  # those two alone
    plain = fm.decompose_many([fm.Problem(weight(6, 5, 3, 3), 9)] * 4, generator=0, progress=False)
    for one, other, given in zip(found, plain, problems, strict=True):
        assert bool(one.converged)
        left = fm.compose(one.first.double(), one.second.double())[..., 1:-1, 1:-1] - given.weight.double()
        assert float(left.norm() / given.weight.double().norm()) <= fm.tolerance(torch.float32)
        assert torch.equal(one.first / one.first.norm(), other.first / other.first.norm())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("solver", "hidden"), [(fm.Direct(), 9), (fm.General(), 18)])
def test_what_is_no_number_is_refused_as_ever(queued, solver, hidden, bad):
    wrong = weight(6, 6, 3, 3)
    wrong[1, 2, 0, 1] = bad
    with pytest.raises(fm.MorphError, match="problem 1: weight has 1 entries that are NaN or infinite"):
        fm.decompose_many(
            [fm.Problem(weight(6, 6, 3, 3), hidden), fm.Problem(wrong, hidden)], solver=solver, generator=0, progress=False
        )


def test_an_item_whose_noise_is_singular_is_drawn_again(queued, monkeypatch):
    """One half-step from an F1 of rank 1: nothing is read then, and the residual tells."""
    start = fm.equation.solvers.base.Equation.start
    drawn = []

    def singular_at_first(equation):
        drawn.append(len(equation.weight))
        noise = start(equation)
        return noise[:, :1].expand_as(noise).clone() if len(drawn) == 1 else noise

    monkeypatch.setattr(fm.equation.solvers.base.Equation, "start", singular_at_first)
    found = fm.decompose(weight(6, 6, 3, 3), 18, solver=fm.General(), generator=0)
    assert bool(found.converged)
    assert drawn == [1, 1]


def test_an_answer_that_is_not_exact_is_refused_as_ever(queued, monkeypatch):
    rounded = fm.equation.solve._rounded

    def spoilt(*arguments):
        first, second = rounded(*arguments)
        first[0, 7, 3, 1, 1] += 1.0
        return first, second

    monkeypatch.setattr(fm.equation.solve, "_rounded", spoilt)
    with pytest.raises(fm.InexactMorphError, match="left a relative residual"):
        fm.decompose(weight(40, 50, 3, 3), 44, generator=0)
