"""The closed form: exact in both roles, dense, of equal spread, by low rank where channels are few; and what Auto chooses."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from fastmorph_kernels.direct.mixing import mixing_matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Case, cases, oracle_residual

import fastmorph as fm
from fastmorph.equation.backends import TritonBackend
from fastmorph.equation.bounds import freedom, smallest_by_counting, smallest_exact
from fastmorph.equation.frame import make_frame
from fastmorph.equation.randomness import Noise

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(case=cases(fits_first=True, max_channels=9), extra=st.integers(0, 9), seed=st.integers(0, 2**32))
@pytest.mark.parametrize("role", ["first", "second"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_exact_in_both_roles_with_any_number_of_extras(dtype, bound, role, case, extra, seed):
    weight, frame = case.weight.to(dtype), case.frame
    if role == "second":
        cut = weight.ndim - case.dims - 2
        weight, frame = weight.transpose(cut, cut + 1), frame.transposed
    case = Case(weight, frame, case.dims)
    co, ci = case.channels
    hidden = (co if role == "first" else ci) + extra
    for backend in ("torch", "numpy"):
        found = fm.decompose(
            weight,
            hidden,
            case.sizes,
            spatial_dims=case.dims,
            solver=fm.Direct(),
            backend=backend,
            generator=torch.Generator().manual_seed(seed),
        )
        assert oracle_residual(case, found.first, found.second) <= bound
        assert bool((found.iterations == 0).all())


@pytest.mark.parametrize(
    ("co", "ci", "hidden", "kernel", "sizes"),
    [
        (64, 64, 68, (3, 3), (3, 3)),
        (61, 17, 65, (3, 3), (3, 3)),
        (96, 32, 103, (3, 3), (5, 3)),
        (32, 64, 68, (3, 3), (2, 3)),
        (16, 16, 20, (3, 3, 3), (3, 3)),
        (48, 48, 96, (5,), (5, 5)),
        (128, 128, 132, (1, 1), (3, 3)),
        (64, 64, 68, (), (1, 1)),
        (300, 20, 304, (3,), (3, 3)),
    ],
)
def test_dense_and_of_equal_spread(co, ci, hidden, kernel, sizes):
    """With four extra channels at least 97 % of each kernel's entries count, and both spreads agree within 25 %."""
    weight = torch.randn(co, ci, *kernel, dtype=torch.float64)
    for g in (weight, weight.abs()):
        found = fm.decompose(g, hidden, sizes, spatial_dims=len(kernel), generator=torch.Generator().manual_seed(0))
        assert isinstance(found.solver, fm.Direct)
        for factor in (found.first, found.second):
            assert float((factor.abs() > 1e-3 * factor.std()).double().mean()) >= 0.97
        assert float(found.first.std() / found.second.std()) == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize(("co", "ci"), [(48, 64), (64, 200), (3, 100)])
def test_the_estimated_residual_is_near_the_true_one(co, ci):
    """64 projections (8, where one side is small) of 25 taps: a standard deviation of sqrt(2 / (8 * 3 * 25)), 6 %, at most."""
    weight = torch.randn(2, co, ci, 3, 3)
    found = fm.decompose(weight, co + 6, generator=torch.Generator().manual_seed(0))
    case = Case(weight, make_frame((3, 3), (3, 3)), 2)
    assert float(found.residual.max()) == pytest.approx(oracle_residual(case, found.first, found.second), rel=0.3)


def test_the_estimate_sees_a_single_wrong_entry(monkeypatch):
    """Signs do not change the square of an error that stands in one place; here F2 spreads it over one column."""
    weight = torch.randn(40, 50, 3, 3)
    rounded = fm.equation.solve._rounded

    def spoilt(*arguments):
        first, second = rounded(*arguments)
        first[0, 7, 3, 1, 1] += 1.0
        return first, second

    monkeypatch.setattr(fm.equation.solve, "_rounded", spoilt)
    with pytest.raises(fm.InexactMorphError) as caught:
        fm.decompose(weight, 44)
    answer = caught.value.decomposition
    case = Case(weight, make_frame((3, 3), (3, 3)), 2)
    assert float(answer.residual) == pytest.approx(oracle_residual(case, answer.first, answer.second), rel=0.3)


def test_no_channel_is_a_copy_of_another():
    found = fm.decompose(torch.randn(16, 16, 3, 3, dtype=torch.float64), 32, solver=fm.Direct())
    for rows in (found.first.flatten(1), found.second.transpose(0, 1).flatten(1)):
        unit = rows / rows.norm(dim=1, keepdim=True)
        off = (unit @ unit.T).abs() - torch.eye(32, dtype=torch.float64)
        assert float(off.max()) < 0.99


def test_density_sets_the_outer_taps():
    weight = torch.randn(32, 32, 3, 3, dtype=torch.float64)
    for density in (0.1, 1.0):
        second = fm.decompose(weight, 64, solver=fm.Direct(density=density)).second
        centre = second[..., 1, 1].square().mean().sqrt()
        outer = second.square().sum().sub(second[..., 1, 1].square().sum()).div(second.numel() * 8 / 9).sqrt()
        assert float(outer / centre) == pytest.approx(density / (1 + density**2) ** 0.5, rel=0.15)  # the centre has both


@pytest.mark.parametrize("pairs", [0, 1, 2, 5, 20])
@pytest.mark.parametrize("hidden", [1, 2, 7, 8, 9, 30, 32, 33, 64, 67, 130])
def test_the_mixing_matrix_is_orthogonal_and_spreads_the_noise(hidden, pairs):
    noisy = min(2 * pairs, hidden // 2 * 2)
    p = mixing_matrix(hidden, hidden - noisy)
    torch.testing.assert_close(p @ p.T, torch.eye(hidden, dtype=torch.float64), rtol=0, atol=1e-13)
    assert noisy == 0 or bool((p[:, hidden - noisy :].abs() > 1e-6).any(-1).all())


@pytest.mark.parametrize("role", ["first", "second"])
@pytest.mark.parametrize(("co", "hidden"), [(5, 13), (40, 40), (66, 69), (70, 140)])
@pytest.mark.parametrize("seed", [0, 5])
def test_backends_give_one_answer_for_one_seed(co, hidden, seed, role):
    """64 terms at most, about as large as the largest entries; where kernels work in float32, to its rounding."""
    weight = torch.randn(1, co, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = (2, 2) if role == "first" else (1, 2)
    frame = make_frame((2,), sizes)
    for dtype in (torch.float64, torch.float32):
        given = weight.to(dtype) if role == "first" else weight.to(dtype).transpose(1, 2)
        options = {"kernel_sizes": sizes, "spatial_dims": 1, "solver": fm.Direct(), "generator": seed}
        one, other = (fm.decompose(given, hidden, backend=name, **options) for name in ("torch", "numpy"))
        answers = [(one.first, one.second), (other.first, other.second)]
        if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
            keys = Noise([seed], [1], given.device, dtype).keys(2)
            backend = TritonBackend("ieee" if dtype == torch.float32 else None)
            answers.append(backend.direct(given, hidden, frame, keys, None, density=0.5, into_first=role == "first"))
        for answer in answers[1:]:
            for found, expected in zip(answer, answers[0], strict=True):
                atol = 64 * torch.finfo(dtype).eps * float(expected.abs().max())
                torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("role", ["first", "second"])
def test_backends_give_one_answer_by_low_rank(role):
    """Singular vectors, whose signs differ, are as large as their gaps let them: to 1e-10."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((40, 3), (3, 20, 3, 3)))
    weight = torch.tensordot(left, right, dims=1)
    weight = weight if role == "first" else weight.transpose(0, 1)
    one, other = (fm.decompose(weight, 3, solver=fm.Direct(), backend=name, generator=1) for name in ("torch", "numpy"))
    norms = [found.first.flatten(1).norm() * found.second.norm() for found in (one, other)]
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-10)


@QUICK
@given(case=cases(fits_first=True, max_channels=5), rank=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_low_rank_weights_need_no_more_channels_than_their_rank(case, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    co, ci = 6, 6
    left = torch.randn(co, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, ci, *case.frame.kernel, generator=generator, dtype=torch.float64)
    weight = torch.tensordot(left, right, dims=1)
    case = Case(weight, case.frame, case.dims)
    for backend in ("torch", "numpy"):
        found = fm.decompose(weight, rank, case.sizes, spatial_dims=case.dims, backend=backend, generator=generator)
        assert oracle_residual(case, found.first, found.second) <= 1e-12
    if rank > 1:
        with pytest.raises(fm.MorphError, match=f"rank {rank}"):
            fm.decompose(weight, rank - 1, case.sizes, spatial_dims=case.dims)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("co", "ci", "hidden"), [(768, 1024, 1032), (1024, 512, 520)])  # the weight into F1, and into F2
def test_a_wide_layer_takes_inputs_and_outputs_and_a_tenth(co, ci, hidden):
    """Its own process: what other tests have held would hide a peak."""
    script = f"""
import torch, fastmorph as fm
def status(key):  # in bytes
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
torch.set_num_threads(1)
fm.decompose(torch.randn(64, 64, 3, 3), 72)
weight = torch.randn({co}, {ci}, 3, 3)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
resident = status("VmRSS")
found = fm.decompose(weight, {hidden})
assert isinstance(found.solver, fm.Direct)
made, held = (4 * sum(t.numel() for t in kernels) for kernels in ([found.first, found.second], [weight]))
print(status("VmHWM") - resident, made, held)
"""
    # Every tensor of a size is its own mapping: what is freed is gone, whatever the allocator would keep.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken, made, held = map(int, done.stdout.split())
    assert made <= taken <= made + 0.1 * (made + held)


def test_direct_refuses_what_fits_into_neither_kernel():
    with pytest.raises(fm.MorphError, match="neither"):
        fm.decompose(torch.randn(4, 4, 5, 5), 30, (3, 3), solver=fm.Direct())


# --- Auto ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "hidden", "sizes", "solver", "words"),
    [
        ((6, 4, 3, 3), 6, (3, 3), fm.Direct, "K1 >= K and C_hid >= C_out"),
        ((6, 4, 3, 3), 4, (2, 3), fm.Direct, "K2 >= K and C_hid >= C_in"),
        ((6, 4, 5, 5), 12, (3, 3), fm.General, "one half-step for F2"),
        ((4, 6, 5, 5), 12, (3, 3), fm.General, "one half-step for F1"),
        ((6, 6, 5, 5), 14, (3, 3), fm.General, "below Claim 1"),
    ],
)
def test_auto_tells_what_it_chose_why_and_at_what_cost(shape, hidden, sizes, solver, words):
    found = fm.decompose(torch.randn(shape, dtype=torch.float64), hidden, sizes, generator=torch.Generator().manual_seed(0))
    assert isinstance(found.solver, solver)
    assert words in found.reason
    assert found.cost > 0
    assert bool(found.converged)


@settings(max_examples=150, deadline=None)
@given(case=cases(max_channels=9))
def test_the_smallest_exact_number_of_channels_is_where_refusal_ends(case):
    co, ci = case.channels
    least = smallest_exact(case.frame, co, ci)
    fm.Auto().choose(case.weight.reshape(-1, co, ci, *case.frame.kernel), least, case.frame, allow_inexact=False)
    if least > 1:
        with pytest.raises(fm.MorphError, match=rf"smallest number that can be exact.* {least}\b"):
            fm.decompose(case.weight, least - 1, case.sizes, spatial_dims=case.dims)


def test_the_counting_bound_counts():
    frame = make_frame((5, 5), ((3, 3), (3, 3)))
    bound = smallest_by_counting(frame, 16, 16)
    assert bound == 25
    assert freedom(frame, 16, 16, bound) >= 0 > freedom(frame, 16, 16, bound - 1)
