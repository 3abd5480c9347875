"""The backend and the precision of products: what is chosen, what is refused, and that each is exact where it says so."""

from __future__ import annotations

import pytest
import torch
from strategies import Case, oracle_residual

import fastmorph as fm
from fastmorph.equation.backends import TorchBackend, TritonBackend, find_backend
from fastmorph.equation.frame import make_frame

SOLVERS = {
    "direct into F1": (fm.Direct(), (2, 2, 3), 6, (3, 2)),
    "direct into F2": (fm.Direct(), (3, 2, 2), 3, (1, 3)),
    "direct by low rank": (fm.Direct(), (3, 1, 2), 1, (2, 2)),
    "one half-step": (fm.General(max_iter=1), (2, 2, 3), 5, (2, 3)),
    "practical": (fm.Practical(), (2, 2, 3), 2, (3, 2)),
    "anderson": (fm.General(acceleration="anderson"), (2, 2, 3), 3, (2, 2)),
    "gauss-newton": (fm.General(), (2, 2, 3), 3, (2, 2)),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_runs_by_kernels(name, kernel_device):
    solver, shape, hidden, sizes = SOLVERS[name]
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(kernel_device)
    found = fm.decompose(
        weight,
        hidden,
        sizes,
        spatial_dims=1,
        solver=solver,
        backend="triton",
        generator=torch.Generator(kernel_device).manual_seed(0),
    )
    shown = oracle_residual(Case(weight.cpu(), make_frame(shape[2:], sizes), 1), found.first.cpu(), found.second.cpu())
    assert shown <= fm.tolerance(torch.float64)
    assert bool(found.converged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_short_dtypes_run_by_kernels(dtype, kernel_device):
    weight = torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(3)).to(kernel_device, dtype)
    for solver, hidden in ((fm.Direct(), 7), (fm.General(max_iter=1), 5)):
        found = fm.decompose(weight, hidden, (3, 3), spatial_dims=1, solver=solver, backend="triton")
        case = Case(weight.cpu(), make_frame((3,), (3, 3)), 1)
        assert found.first.dtype == dtype
        assert oracle_residual(case, found.first.cpu(), found.second.cpu()) <= fm.tolerance(dtype)


def test_many_by_kernels_are_the_same_as_one_by_one(kernel_device):
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(*shape, generator=generator).to(kernel_device) for shape in ((2, 2, 3), (3, 2, 3), (2, 2, 3))]
    problems = [fm.Problem(weight, 5, (3, 1), 1) for weight in weights]
    together = fm.decompose_many(problems, backend="triton", generator=torch.Generator().manual_seed(1), progress=False)
    generator = torch.Generator().manual_seed(1)
    for problem, found in zip(problems, together, strict=True):
        alone = fm.decompose(problem.weight, 5, (3, 1), spatial_dims=1, backend="triton", generator=generator)
        torch.testing.assert_close(found.first, alone.first, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.second, alone.second, rtol=1e-6, atol=1e-6)


def test_anderson_by_normal_equations(kernel_device):
    """Shares of well-conditioned moves agree to the square of their condition; unused slots are zero and get none."""
    generator = torch.Generator().manual_seed(0)
    image, move = (torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in ((5, 3, 2), (30,)))
    images, moves = (torch.randn(2, 4, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    moves[:, 3] = images[:, 3] = 0
    arguments = [tensor.to(kernel_device) for tensor in (image, move, images, moves)]
    torch.testing.assert_close(
        TritonBackend().anderson_step(*arguments), TorchBackend().anderson_step(*arguments), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("solver", [fm.General(max_iter=1), fm.Direct()])
def test_float32_products_are_exact_in_full(solver):
    """The dtype's own rounding is some 1e-7; products in float32 may cost some more, within what counts as exact."""
    weight = torch.randn(12, 12, 3, 3, generator=torch.Generator().manual_seed(0))
    case = Case(weight, make_frame((3, 3), (3, 3)), 2)
    shown = []
    for precision in ("float64", "ieee"):
        found = fm.decompose(weight, 36, solver=solver, precision=precision, generator=torch.Generator().manual_seed(0))
        shown.append(oracle_residual(case, found.first, found.second))
    assert shown[0] < shown[1] <= fm.tolerance(torch.float32)


def test_what_is_chosen():
    assert find_backend(None, torch.empty(1)).name == "torch"
    assert find_backend("triton", torch.empty(1), "tf32").precision == "tf32"
    assert TorchBackend("ieee").working_dtype(torch.device("cpu")) == torch.float32
    assert TorchBackend().working_dtype(torch.device("cpu")) == torch.float64
    assert TorchBackend().working_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cuda",), "None \\(choose\\), 'numpy'"),
        ((None, "fp8"), "'tf32x3'"),
        (("torch", "tf32"), "triton"),
        (("numpy", "ieee"), "leave it out"),
        (("triton", "ieee", torch.float64), "float64 weights"),
        (("triton", None, torch.complex64), "take"),
    ],
)
def test_refusals(arguments, words):
    name, precision, dtype = (*arguments, *(None, torch.float32)[len(arguments) - 1 :])
    with pytest.raises(fm.MorphError, match=words):
        find_backend(name, torch.empty(1, dtype=dtype), precision)
