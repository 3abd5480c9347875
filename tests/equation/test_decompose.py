"""`compose` and `decompose`: the backends against the numpy float64 oracle, Claim 1, Algorithm 2's promise, and refusals."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import Case, agrees, cases, oracle_residual

import fastmorph as fm
from fastmorph.equation import reference
from fastmorph.equation.bounds import half_step_is_exact, smallest_half_step
from fastmorph.equation.frame import make_frame, tap_count

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


# --- compose ---------------------------------------------------------------------------------------------------------


@QUICK
@given(case=cases(), hidden=st.integers(1, 5), seed=st.integers(0, 2**32))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compose_agrees_with_the_oracle(dtype, case, hidden, seed):
    """|fl(F2 * F1) - F2 * F1| <= n u |F2| * |F1| for sums of n products, plus one rounding of the result."""
    generator = torch.Generator().manual_seed(seed)
    co, ci = case.channels
    first = torch.randn(2, hidden, ci, *case.frame.first, generator=generator).to(dtype)
    second = torch.randn(2, co, hidden, *case.frame.second, generator=generator).to(dtype)
    found = fm.compose(first, second, spatial_dims=case.dims, backend="torch")
    assert found.dtype == dtype
    working = torch.float32 if dtype == torch.bfloat16 else dtype
    terms = hidden * min(tap_count(case.frame.first), tap_count(case.frame.second)) + 1
    for b in range(2):
        one, two = first[b].double().numpy(), second[b].double().numpy()
        exact = reference.compose(one, two)
        bound = terms * unit_roundoff(working) * reference.compose(abs(one), abs(two)) + unit_roundoff(dtype) * abs(exact)
        assert (abs(found[b].double().numpy() - exact) <= 1.01 * bound).all()


@pytest.mark.parametrize("backend", ["numpy", "torch", "triton"])
def test_every_backend_composes_and_keeps_the_kind(backend):
    first, second = np.random.default_rng(0).normal(size=(2, 3, 4, 3, 3)), np.random.default_rng(1).normal(size=(2, 5, 3, 2, 2))
    found = fm.compose(first, second, backend=backend)
    assert isinstance(found, np.ndarray)
    assert found.shape == (2, 5, 4, 4, 4)
    expected = np.stack([reference.compose(a, b) for a, b in zip(first, second, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


def test_composition_is_what_two_convolutions_do():
    """The equation itself, against PyTorch's own convolutions."""
    first, second = torch.randn(5, 3, 3, 2, dtype=torch.float64), torch.randn(4, 5, 2, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    conv = torch.nn.functional.conv2d
    torch.testing.assert_close(conv(conv(x, first), second), conv(x, fm.compose(first, second)), rtol=1e-12, atol=1e-12)


# --- decompose -------------------------------------------------------------------------------------------------------


@QUICK
@given(case=cases(), extra=st.integers(0, 3), seed=st.integers(0, 2**32))
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_one_half_step_is_exact_under_claim_1(dtype, bound, case, extra, seed):
    """Claim 1, both ways, and the few-channel shapes for which its count is not enough."""
    co, ci = case.channels
    hidden = smallest_half_step(case.frame, co, ci) + extra
    found = fm.decompose(
        case.weight.to(dtype),
        hidden,
        case.sizes,
        spatial_dims=case.dims,
        solver=fm.General(max_iter=1),
        generator=torch.Generator().manual_seed(seed),
    )
    assert bool((found.iterations <= 5).all())  # 1, unless the noise was nearly singular and drawn again
    case = Case(case.weight.to(dtype), case.frame, case.dims)
    assert oracle_residual(case, found.first, found.second) <= bound
    assert float(found.residual.max()) == agrees(case, found.first, found.second)


@pytest.mark.parametrize("side", ["second", "first"])
def test_claim_1_is_tight(side):
    """One hidden channel fewer and the half-step has a loss, on either side."""
    frame = make_frame((3,), ((3,), (3,)))
    co, ci = (9, 6) if side == "second" else (6, 9)
    hidden = -(-6 * 5 // 3)
    assert half_step_is_exact(frame, co, ci, hidden, side=side)
    assert not half_step_is_exact(frame, co, ci, hidden - 1, side=side)
    rng = np.random.default_rng(0)
    for count, exact in ((hidden, True), (hidden - 1, False)):
        weight = rng.normal(size=(co, ci, 3))
        weight = weight if side == "second" else weight.swapaxes(0, 1)
        noise = rng.normal(size=(count, weight.shape[1], 3))
        assert (reference.half_step(weight, noise, frame).trace[0] < 1e-12) == exact


def test_claim_1_counts_too_much_for_one_channel_in_two_dimensions():
    """27 unknowns face 25 equations, but kernels of one channel commute: 3 of the 27 are spent on F1_a F1_b - F1_b F1_a = 0."""
    frame = make_frame((4, 3), ((3, 3), (3, 3)))
    system = reference.dense_system(np.random.default_rng(0).normal(size=(3, 1, 3, 3)), (3, 3))
    assert system.shape == (27, 25)
    assert np.linalg.matrix_rank(system) == 24
    assert not half_step_is_exact(frame, 4, 1, 3)
    assert half_step_is_exact(frame, 4, 1, 4)


@QUICK
@given(case=cases(fits_first=True), extra=st.integers(0, 2), seed=st.integers(0, 2**32))
def test_practical_always_ends(case, extra, seed):
    """Algorithm 2 reaches loss 0 wherever K1 >= K and C_hid >= C_out, by both implementations."""
    co, _ = case.channels
    for backend in ("torch", "numpy"):
        generator = torch.Generator().manual_seed(seed)
        found = fm.decompose(
            case.weight,
            co + extra,
            case.sizes,
            spatial_dims=case.dims,
            solver=fm.Practical(tol=1e-8),
            backend=backend,
            generator=generator,
            allow_inexact=True,
        )
        assert oracle_residual(case, found.first, found.second) <= 1e-8


@QUICK
@given(case=cases(max_channels=4), hidden=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_plain_als_follows_the_reference(case, hidden, seed):
    """From the same noise, the batched torch backend walks the path of the dense numpy algorithm."""
    solver = fm.General(max_iter=3, acceleration=None)
    traces, conditions = [], []

    def dense_system(*arguments):
        system = plain(*arguments)
        conditions.append(float(np.linalg.cond(system)))
        return system

    plain = reference.dense_system
    with mock.patch.object(reference, "dense_system", dense_system):
        for backend in ("torch", "numpy"):
            found = fm.decompose(
                case.weight,
                hidden,
                case.sizes,
                spatial_dims=case.dims,
                solver=solver,
                backend=backend,
                generator=torch.Generator().manual_seed(seed),
                allow_inexact=True,
            )
            traces.append(found.trace.nan_to_num(nan=0.0).reshape(len(found.trace), -1))
    assume(max(conditions) < 1e6)  # in a system of deficient rank, rounding decides which way the next steps go
    steps = min(map(len, traces))
    # The half-steps' systems have conditions of some thousands; residuals near rounding carry no digits.
    torch.testing.assert_close(traces[0][:steps], traces[1][:steps], rtol=1e-5, atol=1e-9)


def test_half_step_is_the_reference_to_rounding():
    """The same noise gives the same minimum-norm kernels, not merely some exact ones."""
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    one, two = (
        fm.decompose(weight, 14, solver=fm.General(max_iter=1), backend=b, generator=torch.Generator().manual_seed(3))
        for b in ("torch", "numpy")
    )
    assert int(one.iterations) == int(two.iterations) == 1
    torch.testing.assert_close(one.first, two.first, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.second, two.second, rtol=1e-9, atol=1e-9)


def test_overdetermined_half_steps_are_least_squares():
    """Where nothing is exact, the torch half-step is still lstsq's, on both Gram sides."""
    for co, ci, hidden in ((5, 4, 6), (5, 4, 3)):
        weight = torch.randn(2, co, ci, 3, 3, dtype=torch.float64)
        solver = fm.General(max_iter=1, acceleration=None)
        found = [
            fm.decompose(
                weight, hidden, solver=solver, backend=b, generator=torch.Generator().manual_seed(0), allow_inexact=True
            )
            for b in ("torch", "numpy")
        ]
        assert bool((found[0].residual > 1e-3).all())
        torch.testing.assert_close(found[0].second, found[1].second, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [fm.Auto(), fm.Practical(), fm.General(max_iter=1)])
@pytest.mark.parametrize("backend", ["numpy", "torch", "triton"])
def test_zero_and_rank_deficient_weights(backend, solver):
    generator = torch.Generator().manual_seed(0)
    thin = torch.einsum("or,rikl->oikl", torch.randn(4, 1, generator=generator), torch.randn(1, 2, 3, 3, generator=generator))
    for weight in (torch.zeros(4, 2, 3, 3), thin):
        found = fm.decompose(weight, 6, solver=solver, backend=backend, generator=generator)
        assert bool(found.converged)
        assert found.first.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_are_solved_in_better(dtype):
    weight = torch.randn(8, 8, 3, 3).to(dtype)
    found = fm.decompose(weight, 24, solver=fm.General(max_iter=1))
    assert found.first.dtype == found.second.dtype == dtype
    assert float(found.residual) <= fm.tolerance(dtype)


@pytest.mark.parametrize("solver", [fm.Practical(), fm.General(max_iter=1)])
def test_both_kernels_have_one_standard_deviation(solver):
    found = fm.decompose(torch.randn(3, 8, 6, 3, 3, dtype=torch.float64), 18, solver=solver)
    first, second = (kernel.flatten(1).std(1, correction=0) for kernel in (found.first, found.second))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0.0)


def test_the_same_seed_gives_the_same_answer():
    weight = torch.randn(4, 4, 3, 3)
    runs = [fm.decompose(weight, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0].first, runs[1].first)
    assert not torch.equal(runs[0].first, runs[2].first)
    torch.manual_seed(5)
    one = fm.decompose(weight, 8)
    torch.manual_seed(5)
    assert torch.equal(one.first, fm.decompose(weight, 8).first)
    numpy = [fm.decompose(weight, 8, generator=np.random.default_rng(0)) for _ in range(2)]
    assert torch.equal(numpy[0].second, numpy[1].second)


def test_batches_of_none():
    found = fm.decompose(torch.empty(0, 4, 3, 3, 3), 5)
    assert found.first.shape == (0, 5, 3, 3, 3)
    assert found.residual.shape == (0,)
    assert fm.compose(torch.empty(0, 5, 3, 3, 3), torch.empty(0, 4, 5, 1, 1)).shape == (0, 4, 3, 3, 3)


def test_parameters_and_strides_are_taken_as_they_are():
    weight = torch.nn.Parameter(torch.randn(3, 3, 6, 8).permute(3, 2, 1, 0)[::2])
    before = weight.detach().clone()
    found = fm.decompose(weight, 8)
    assert not found.first.requires_grad
    assert torch.equal(weight, before)
    assert float(found.residual) <= fm.tolerance(torch.float32)


# --- kinds of arrays -------------------------------------------------------------------------------------------------


class Exporter:
    """A DLPack exporter of another library, reduced to what the protocol asks for."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self):
        return Exporter

    @staticmethod
    def from_dlpack(tensor):
        return Exporter(np.from_dlpack(tensor))


def test_numpy_and_dlpack_come_back_as_they_went_in():
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    weight.flags.writeable = False
    found = fm.decompose(weight, 8)
    assert isinstance(found.first, np.ndarray)
    assert found.first.dtype == np.float32
    assert isinstance(found.residual, np.ndarray)
    flipped = fm.decompose(weight[::-1], 8)
    np.testing.assert_allclose(fm.compose(flipped.first, flipped.second)[:, :, 1:-1, 1:-1], weight[::-1], rtol=0, atol=1e-5)
    exported = fm.decompose(Exporter(weight.copy()), 8)
    assert isinstance(exported.first, Exporter)
    assert exported.second.array.shape == (4, 8, 3, 3)


# --- refusals --------------------------------------------------------------------------------------------------------

GOOD = torch.ones(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((GOOD.long(), 4), {}, "dtype torch.int64"),
        ((GOOD.to(torch.complex64), 4), {}, "dtype torch.complex64"),
        ((np.ones((4, 3, 3, 3), dtype="c16"), 4), {}, "complex128"),
        (([[1.0]], 4), {}, "list"),
        ((GOOD[0, 0], 4), {}, "too few dimensions"),
        ((GOOD, 4), {"spatial_dims": 4}, "spatial_dims=4"),
        ((GOOD * torch.nan, 4), {}, "NaN or infinite"),
        ((GOOD / 0, 4), {}, "NaN or infinite"),
        ((GOOD, 4, (1, 2)), {}, "smaller than the weight"),
        ((GOOD, 4, (3, 0)), {}, "not a positive int"),
        ((GOOD, 4, (3, (3, 3, 3))), {}, "spatial dimension"),
        ((GOOD, 4, (3, 3, 3)), {}, "two entries"),
        ((GOOD, 4, 3), {}, "two entries"),
        ((GOOD, 0), {}, "positive int"),
        ((GOOD, 2.0), {}, "positive int"),
        ((torch.randn(4, 3, 3, 3), 2), {}, "smallest number that can be exact is 3"),
        ((torch.randn(4, 3, 3, 3), 2), {"solver": fm.General()}, "rank 3"),
        ((torch.randn(9, 9, 5, 5), 12), {}, "unknowns"),
        ((GOOD, 4), {"backend": "jax"}, "backend='jax'"),
        ((GOOD, 4), {"solver": "general"}, "not a solver"),
        ((GOOD, 4), {"generator": True}, "generator=True"),
        ((GOOD, 4), {"generator": -1}, "generator=-1"),
        ((torch.empty(4, 0, 3, 3), 4), {}, "no entries"),
    ],
)
def test_unusable_input_is_refused_in_a_sentence(arguments, options, words):
    with pytest.raises(fm.MorphError, match=r"\.$") as caught:
        fm.decompose(*arguments, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (GOOD, GOOD.double(), "convert one"),
        (GOOD, torch.ones(4, 5, 3, 3), "do not chain"),
        (GOOD.expand(2, 4, 3, 3, 3), torch.ones(3, 5, 4, 3, 3), "do not chain"),
        (GOOD[0], GOOD, "too few dimensions"),
    ],
)
def test_compose_refuses_what_does_not_chain(first, second, words):
    with pytest.raises(fm.MorphError, match=words):
        fm.compose(first, second)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fm.General(max_iter=0),
        lambda: fm.General(tol=0.0),
        lambda: fm.General(acceleration="x"),
        lambda: fm.Direct(density=0.0),
        lambda: fm.Practical(max_iter=0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(fm.MorphError):
        make()


def test_an_inexact_answer_raises_and_is_carried():
    weight = torch.randn(8, 8, 5, 5, dtype=torch.float64)
    with pytest.raises(fm.InexactMorphError, match="relative residual") as caught:
        fm.decompose(weight, 16, solver=fm.General(max_iter=2))
    answer = caught.value.decomposition
    assert not bool(answer.converged)
    assert float(answer.residual) > 1e-10
    again = fm.decompose(weight, 16, solver=fm.General(max_iter=2), allow_inexact=True)
    assert again.first.shape == answer.first.shape
