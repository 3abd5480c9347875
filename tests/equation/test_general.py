"""`General` below Claim 1: what each acceleration reaches in how many sweeps, and that batch items do not meddle."""

from __future__ import annotations

import pytest
import torch
from strategies import Case, oracle_residual

import fastmorph as fm
from fastmorph.equation.bounds import freedom, half_step_is_exact, smallest_by_counting
from fastmorph.equation.frame import SIDES, Frame, make_frame
from fastmorph.equation.solvers.whiten import mix_in, mix_out, whiten

ACCELERATIONS = ["gauss-newton", "anderson"]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(weight, hidden, kernel_sizes=(3, 3), *, dims=2, seed=1, backend=None, **settings):
    """Decompose in the given sweeps, whatever the residual."""
    generator = torch.Generator().manual_seed(seed)
    solver = fm.General(**settings)
    sizes = {"kernel_sizes": kernel_sizes, "spatial_dims": dims, "backend": backend}
    return fm.decompose(weight, hidden, solver=solver, generator=generator, allow_inexact=True, **sizes)


def frame_of(weight, kernel_sizes, dims):
    return make_frame(weight.shape[weight.ndim - dims :], kernel_sizes) if dims else Frame((), (), ())


def assert_below_claim_1(weight, hidden, kernel_sizes, dims):
    co, ci = weight.shape[1:3]
    frame = frame_of(weight, kernel_sizes, dims)
    assert not any(half_step_is_exact(frame, co, ci, hidden, side=side) for side in SIDES)
    assert freedom(frame, co, ci, hidden) >= 0


def assert_exact(found, weight, kernel_sizes, dims, tol):
    shown = oracle_residual(Case(weight, frame_of(weight, kernel_sizes, dims), dims), found.first, found.second)
    assert shown <= tol
    assert float(found.residual.max()) == pytest.approx(shown, rel=1e-6)


# --- how far, in how many sweeps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
@pytest.mark.parametrize(("hidden", "tol", "sweeps"), [(32, 1e-8, 60), (28, 1e-6, 150), (26, 1e-6, 400)])
def test_sweeps_from_5x5_to_two_3x3(acceleration, hidden, tol, sweeps):
    """16 channels: C_hid = 2C, 1.75C, and the counting bound of 25 and 5 percent."""
    weight = noise(2, 16, 16, 5, 5)
    assert smallest_by_counting(make_frame((5, 5), (3, 3)), 16, 16) == 25
    assert_below_claim_1(weight, hidden, (3, 3), 2)
    found = solve(weight, hidden, max_iter=sweeps, tol=tol, acceleration=acceleration)
    assert int(found.iterations.max()) <= 2 * sweeps
    assert_exact(found, weight, (3, 3), 2, tol)


def test_the_counting_bound_itself():
    weight = noise(1, 8, 8, 5, 5)
    hidden = smallest_by_counting(make_frame((5, 5), (3, 3)), 8, 8)
    found = solve(weight, hidden, max_iter=1000, tol=1e-6)
    assert_exact(found, weight, (3, 3), 2, 1e-6)


def test_plain_alternation_stalls():
    weight = noise(1, 16, 16, 5, 5)
    found = solve(weight, 28, max_iter=150, tol=1e-6, acceleration=None)
    assert int(found.iterations) == 300
    assert float(found.residual) > 1e-3


SHAPES = [
    ((12, 8, 5, 5), 20, (3, 3), 2),
    ((8, 12, 5, 5), 20, (3, 3), 2),
    ((16, 16, 3, 3), 24, (2, 2), 2),
    ((8, 8, 5, 4), 14, ((3, 2), (3, 3)), 2),
    ((8, 8, 4, 4), 18, (3, 3), 2),  # zeros around the weight
    ((16, 16, 5), 20, (3, 3), 1),
    ((16, 12, 5), 14, ((2,), (4,)), 1),
    ((4, 4, 3, 3, 3), 10, (2, 2), 3),
]


@pytest.mark.parametrize(("shape", "hidden", "kernel_sizes", "dims"), SHAPES)
def test_other_shapes(shape, hidden, kernel_sizes, dims):
    weight = noise(2, *shape)
    assert_below_claim_1(weight, hidden, kernel_sizes, dims)
    found = solve(weight, hidden, kernel_sizes, dims=dims, tol=1e-8)
    assert_exact(found, weight, kernel_sizes, dims, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_default_is_exact_for_the_dtype(dtype):
    weight = noise(2, 8, 8, 5, 5).to(dtype)
    found = fm.decompose(weight, 14, solver=fm.General(), generator=torch.Generator().manual_seed(0))
    assert bool(found.converged.all())
    assert found.first.dtype == dtype


def test_a_decaying_spectrum_is_no_harder_than_a_flat_one():
    """Channels over four decades on either side: whitened, they are found together."""
    decay = 10.0 ** -torch.linspace(0, 4, 8, dtype=torch.float64)
    flat = noise(1, 8, 8, 5, 5)
    steep = flat * decay[:, None, None, None] * decay[:, None, None]
    easy, hard = (solve(weight, 15, tol=1e-8) for weight in (flat, steep))
    assert_exact(hard, steep, (3, 3), 2, 1e-8)
    assert int(hard.iterations) <= 2 * int(easy.iterations)
    assert not bool(solve(steep, 15, tol=1e-8, acceleration="anderson").residual <= 1e-8)


def test_whitening_keeps_the_equation():
    weight = noise(3, 6, 4, 3, 2)
    weight[0] = 0
    white, left, right = whiten(weight, 1e-16)
    torch.testing.assert_close(mix_in(mix_out(left, white), right), weight, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(white.flatten(1).norm(dim=1), torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))


# --- where no answer is exact ----------------------------------------------------------------------------------------------


def test_below_the_counting_bound_the_residual_falls_and_the_work_is_bounded():
    weight = noise(2, 8, 8, 5, 5)
    assert freedom(make_frame((5, 5), (3, 3)), 8, 8, 10) < 0
    found = solve(weight, 10, max_iter=40)
    assert int(found.iterations.max()) <= 80
    assert bool((found.residual > 1e-2).all())
    assert bool((found.trace.diff(dim=0).nan_to_num(nan=0.0) <= 1e-12).all())
    final = found.trace.nan_to_num(nan=torch.inf).amin(0)
    torch.testing.assert_close(final, found.residual, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("acceleration", [*ACCELERATIONS, None])
@pytest.mark.parametrize("sweeps", [1, 2, 3, 7, 20])
def test_no_item_works_longer_than_allowed(acceleration, sweeps):
    found = solve(noise(2, 6, 6, 5, 5), 10, max_iter=sweeps, acceleration=acceleration)
    assert int(found.iterations.max()) <= 2 * sweeps
    assert bool((found.residual < 1).all())


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_without_spatial_dimensions_too_few_channels_give_the_nearest_rank(acceleration):
    weight = noise(8, 8)
    found = solve(weight, 6, dims=0, max_iter=200, acceleration=acceleration)
    values = torch.linalg.svdvals(weight)
    best = float(values[6:].norm() / values.norm())
    assert float(found.residual) == pytest.approx(best, rel=1e-3)


# --- batches ---------------------------------------------------------------------------------------------------------------


def mixed():
    """A random weight, a zero one, one of low rank, a weak one, one with few strong channels."""
    weight = noise(5, 8, 8, 5, 5)
    weight[1] = 0
    weight[2] = torch.einsum("or,rikl->oikl", noise(8, 2, seed=3), noise(2, 8, 5, 5, seed=4))
    weight[3] *= 1e-20
    weight[4, 2:] *= 1e-3
    return weight


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_an_item_is_solved_in_a_batch_as_it_is_alone(acceleration):
    """The same noise must reach both, so that the others are solved as problems beside it."""
    weight = mixed()
    options = {"solver": fm.General(60, 1e-6, acceleration), "allow_inexact": True}
    problems = [fm.Problem(item, 16) for item in weight]
    together = fm.decompose_many(problems, generator=torch.Generator().manual_seed(0), progress=False, **options)
    budget = {"memory_budget": 1, "progress": False}
    alone = fm.decompose_many(problems, generator=torch.Generator().manual_seed(0), **budget, **options)
    assert len({int(found.iterations) for found in together}) > 2
    for one, two in zip(together, alone, strict=True):
        assert one.iterations == two.iterations
        torch.testing.assert_close(one.first, two.first, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one.residual, two.residual, rtol=0.1, atol=1e-9)


def test_items_that_are_exact_stop():
    weight = mixed()
    found = solve(weight, 15, tol=1e-8)
    assert bool((found.residual <= 1e-8).all())
    assert int(found.iterations[1]) == 1
    assert int(found.iterations[2]) < int(found.iterations[0])
    assert not found.second[1].any()
    assert found.first[1].any()
    steps = (~found.trace.isnan()).sum(0)
    assert int(steps[1]) == 1 < int(steps[2]) < int(steps[0])
    assert bool(torch.isfinite(found.first).all() & torch.isfinite(found.second).all())


@pytest.mark.parametrize("acceleration", [*ACCELERATIONS, None])
def test_no_items(acceleration):
    found = solve(noise(0, 8, 6, 5, 5), 12, acceleration=acceleration)
    assert found.first.shape == (0, 12, 6, 3, 3)
    assert found.second.shape == (0, 8, 12, 3, 3)
    assert found.iterations.shape == found.residual.shape == (0,)


def test_the_noise_decides():
    weight = noise(1, 6, 6, 5, 5)
    one, again, other = (solve(weight, 11, max_iter=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.first, again.first)
    assert not torch.equal(one.first, other.first)


# --- against the oracle ----------------------------------------------------------------------------------------------------

TINY = [((4, 4, 5, 5), 7, (3, 3), 2), ((3, 4, 5, 5), 7, (3, 3), 2), ((5, 4, 5), 7, (3, 3), 1), ((6, 6, 3, 3), 9, (2, 2), 2)]


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
@pytest.mark.parametrize(("shape", "hidden", "kernel_sizes", "dims"), TINY)
def test_the_reference_is_exact_too(acceleration, shape, hidden, kernel_sizes, dims):
    weight = noise(*shape)
    for backend in ("torch", "numpy"):
        found = solve(weight, hidden, kernel_sizes, dims=dims, backend=backend, tol=1e-8, acceleration=acceleration)
        assert_exact(found, weight, kernel_sizes, dims, 1e-8)


def test_anderson_follows_the_reference():
    """From the same noise both walk one path, until rounding parts them."""
    weight = noise(4, 4, 5, 5)
    traces = [
        solve(weight, 7, max_iter=8, backend=backend, acceleration="anderson").trace.flatten() for backend in ("torch", "numpy")
    ]
    torch.testing.assert_close(traces[0], traces[1], rtol=1e-5, atol=1e-9)


def test_an_unknown_acceleration_is_refused():
    with pytest.raises(fm.MorphError, match="'gauss-newton', 'anderson' or None"):
        fm.General(acceleration="newton")
