"""The Cholesky kernels and their solves by backward error in numpy float64, interpreted (or on a GPU), and their operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastmorph_kernels import cholesky, cholesky_preferred, cholesky_solve, configs, support
from numpy.typing import NDArray

pytest.importorskip("triton")

from fastmorph_kernels.cholesky import op
from fastmorph_kernels.cholesky.kernel import CholeskyConfig, launch_single, launch_spread
from fastmorph_kernels.cholesky.solve_kernel import launch_solve
from fastmorph_kernels.configs import shipped

F32, F64 = torch.float32, torch.float64
SMALL = CholeskyConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
SHAPES = [(1, 1), (2, 2), (1, 33), (1, 65)]  # batch, n


def positive(batch: int, size: int, dtype: torch.dtype = F64, device: torch.device | str = "cpu") -> torch.Tensor:
    """Positive definite, of condition about 1e5 to 1e7, its rows scaled apart; symmetric."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn((batch, size, size), generator=generator, dtype=F64)
    columns, rows = torch.logspace(0, -2, size, dtype=F64), torch.logspace(1, -1, size, dtype=F64)
    matrix = (root * columns) @ root.mT * rows * rows[:, None] + 1e-3 * torch.diag(rows.square())
    return matrix.to(device, dtype)


def right_sides(
    batch: int, size: int, columns: int, dtype: torch.dtype = F64, device: torch.device | str = "cpu"
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((batch, size, columns), generator=generator, dtype=F64).to(device, dtype)


def unread(matrix: torch.Tensor) -> torch.Tensor:
    """NaN in the strict upper triangle."""
    return matrix + torch.full_like(matrix, torch.nan).triu(1)


def run(matrix: torch.Tensor, kind: str, config: CholeskyConfig = SMALL) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels themselves, into a lower triangle of NaN and with NaN to work in."""
    lower = torch.full_like(matrix, torch.nan, memory_format=torch.contiguous_format).tril()
    info = torch.zeros(len(matrix), dtype=torch.int32, device=matrix.device)
    if kind == "single":
        launch_single(matrix, lower, info.fill_(-1), config=config)
    else:
        launch_spread(matrix, lower, info, torch.full_like(lower, torch.nan), config=config)
    return lower, info


def run_solve(lower: torch.Tensor, right: torch.Tensor, config: CholeskyConfig = SMALL) -> torch.Tensor:
    out = torch.full_like(right, torch.nan, memory_format=torch.contiguous_format)
    launch_solve(lower, right, out, config=config)
    return out


def doubles(*tensors: torch.Tensor) -> list[NDArray[np.float64]]:
    return [x.detach().cpu().double().numpy() for x in tensors]


def assert_factor(lower: torch.Tensor, matrix: torch.Tensor) -> None:
    """Hold a factor to the backward error of any order of its sums (Higham, Accuracy and Stability, theorem 10.3).

    |matrix - L L^T| <= (n + 1) u |L| |L|^T entry by entry, u = eps / 2. Twice that leaves room for divisions and roots
    that a GPU rounds to eps, and for the oracle's own product.
    """
    size = matrix.shape[-1]
    found, given = doubles(lower, matrix)
    given = np.tril(given) + np.tril(given, -1).swapaxes(1, 2)
    bound = (size + 1) * torch.finfo(lower.dtype).eps * (abs(found) @ abs(found).swapaxes(1, 2))
    assert lower.shape == matrix.shape
    assert (np.triu(found, 1) == 0).all()
    error = abs(found @ found.swapaxes(1, 2) - given)
    assert (error <= bound).all(), f"off by {np.nanmax(error / bound)} times the bound (or nan)"  # a nan fails too


def assert_solution(out: torch.Tensor, lower: torch.Tensor, right: torch.Tensor) -> None:
    """Two substitutions: |right - L L^T x| <= 2 n u |L| |L|^T |x| and terms of second order; twice that, as above."""
    size = lower.shape[-1]
    x, factor_, given = doubles(out, lower, right)
    factor_ = np.tril(factor_)
    transposed = factor_.swapaxes(1, 2)
    bound = 2 * (size + 1) * torch.finfo(out.dtype).eps * (abs(factor_) @ (abs(transposed) @ abs(x)))
    assert out.shape == right.shape
    error = abs(factor_ @ (transposed @ x) - given)
    assert (error <= bound).all(), f"off by {np.nanmax(error / bound)} times the bound (or nan)"


@pytest.mark.parametrize("kind", ["single", "spread"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("batch", "size"), SHAPES)
def test_factor_has_the_backward_error_of_its_sums(batch, size, dtype, kind, kernel_device):
    matrix = positive(batch, size, dtype, kernel_device)
    lower, info = run(unread(matrix), kind)
    assert info.tolist() == [0] * batch
    assert_factor(lower, matrix)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("batch", "size", "columns"), [(1, 1, 1), (2, 2, 3), (1, 33, 17), (1, 65, 2)])
def test_solution_has_the_backward_error_of_two_substitutions(batch, size, columns, dtype, kernel_device):
    lower = torch.linalg.cholesky(positive(batch, size)).to(kernel_device, dtype)
    right = right_sides(batch, size, columns, dtype, kernel_device)
    assert_solution(run_solve(unread(lower), right), lower, right)


@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=f"{e.device}-{e.dtype}-{e.variant}") for e in shipped("cholesky") if "block_m" in e.config]
)
def test_every_config(entry, kernel_device):
    config, matrix = CholeskyConfig(**entry.config), positive(1, 67, entry.dtype, kernel_device)
    if entry.variant == "solve":
        lower = torch.linalg.cholesky(matrix.double()).to(entry.dtype)
        right = right_sides(1, 67, 5, entry.dtype, kernel_device)
        assert_solution(run_solve(lower, right, config), lower, right)
    else:
        assert_factor(run(matrix, entry.variant, config)[0], matrix)


@pytest.mark.parametrize("kind", ["single", "spread"])
@pytest.mark.parametrize(("order", "value"), [(1, -1.0), (3, torch.nan), (16, 0.0), (17, torch.nan), (18, 0.0)])
def test_info_is_the_first_bad_pivot_and_touches_no_other_matrix(order, value, kind, kernel_device):
    good = positive(2, 20, F64, kernel_device)
    bad = good.clone()
    bad[1, :, order - 1] = bad[1, order - 1] = 0  # a block by itself, so that 0 is a pivot of 0
    bad[1, order - 1, order - 1] = value
    bad[1, 19, 19] = -1  # not the first
    lower, info = run(bad, kind)
    assert info.tolist() == [0, order]
    assert_factor(lower[:1], good[:1])


@pytest.mark.parametrize("kind", ["single", "spread"])
def test_info_agrees_with_lapack_on_indefinite_matrices(kind, kernel_device):
    generator = torch.Generator().manual_seed(3)
    shift = torch.tensor([0.0, 6.0, 9.0], dtype=F64)[:, None, None]
    noise = torch.randn((3, 20, 20), generator=generator, dtype=F64)
    matrix = (noise + noise.mT) / 2 + shift * torch.eye(20, dtype=F64)
    expected = torch.linalg.cholesky_ex(matrix).info.tolist()
    assert len(set(expected)) > 1
    assert run(matrix.to(kernel_device), kind)[1].tolist() == expected


@pytest.mark.parametrize("kind", ["single", "spread"])
def test_permuted_sliced_and_expanded_matrices(kind, kernel_device):
    wide = torch.zeros(20, 3, 40, dtype=F64, device=kernel_device)
    wide.permute(1, 2, 0)[1:2, ::2] = positive(1, 20, F64, kernel_device)
    matrix = wide.permute(1, 2, 0)[1:2, ::2].expand(2, -1, -1)  # strides 0, 2 and 120
    lower, info = run(matrix, kind)
    assert info.tolist() == [0, 0]
    assert_factor(lower, matrix)


@pytest.mark.parametrize("kind", ["single", "spread"])
def test_writes_a_strided_lower_triangle_and_nothing_around_it(kind, kernel_device):
    matrix = positive(2, 20, F64, kernel_device)
    around = torch.full((44, 2, 22), torch.nan, dtype=F64, device=kernel_device)
    lower = around[1:41:2, :, 1:21].permute(1, 2, 0)
    info = torch.zeros(2, dtype=torch.int32, device=kernel_device)
    if kind == "single":
        launch_single(matrix, lower, info, config=SMALL)
    else:
        launch_spread(matrix, lower, info, torch.full_like(matrix, torch.nan), config=SMALL)
    assert int(around.isfinite().sum()) == 2 * 20 * 21 // 2
    assert_factor(lower.tril(), matrix)


def test_solves_with_strided_tensors(kernel_device):
    lower = torch.linalg.cholesky(positive(1, 18, F64, kernel_device)).mT.contiguous().mT.expand(2, -1, -1)
    right = right_sides(4, 5, 36, F64, kernel_device)[::2, :, ::2].mT
    around = torch.full((18, 2, 9), torch.nan, dtype=F64, device=kernel_device)
    out = around[:, :, 2:7].permute(1, 0, 2)
    launch_solve(lower, right, out, config=SMALL)
    assert_solution(out, lower, right)
    assert int(around.isfinite().sum()) == out.numel()


@pytest.fixture(params=["kernel", "torch"])
def device(request, kernel_device, monkeypatch) -> torch.device:
    """Where the operators run: by kernel, and by what a CPU without the interpreter has."""
    if request.param == "kernel":
        return kernel_device
    monkeypatch.setattr(support, "interpreted", lambda: False)
    return torch.device("cpu")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("single", [0, 256])
@pytest.mark.parametrize(("batch", "size", "dtype"), [(0, 3, F32), (2, 0, F32), (1, 1, F32), (2, 9, F64)])
def test_operators_factor_and_solve(batch, size, dtype, single, device, monkeypatch):
    sizes = configs.lookup("cholesky", dtype, "sizes", device) | {"single": single}
    monkeypatch.setattr(op, "lookup", lambda *_: sizes)
    matrix, right = positive(batch, size, dtype, device), right_sides(batch, size, 3, dtype, device)
    lower, info = cholesky(unread(matrix))
    assert info.dtype == torch.int32
    assert info.tolist() == [0] * batch
    assert_factor(lower, matrix)
    out = cholesky_solve(unread(lower), right)
    assert_solution(out, lower, right)
    assert lower.is_contiguous()
    assert out.is_contiguous()
    assert cholesky_solve(lower, right[:, :, :0]).shape == (batch, size, 0)


def test_operator_says_which_matrix_failed(device):
    matrix = positive(2, 5, F64, device)
    matrix[1, 3, 3] = -1
    assert cholesky(matrix)[1].tolist() == [0, 4]


def test_opcheck(device):
    matrix = positive(2, 6, F32, device)
    permuted = matrix.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # dense, and not contiguous
    assert not permuted.is_contiguous()
    torch.library.opcheck(torch.ops.fastmorph_kernels.cholesky.default, (permuted,))
    lower = torch.linalg.cholesky(matrix)
    right = right_sides(2, 6, 3, F32, device).mT.contiguous().mT
    torch.library.opcheck(torch.ops.fastmorph_kernels.cholesky_solve.default, (lower, right))


# aot_eager traces as inductor does and needs no C++ compiler. Sizes that are equal by chance would become a guard.
def test_compiles_into_one_graph_for_every_shape(kernel_device):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda matrix, right: cholesky_solve(cholesky(matrix)[0], right) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch, size, columns in ((3, 6, 4), (2, 5, 7)):
        matrix, right = positive(batch, size, F64, kernel_device), right_sides(batch, size, columns, F64, kernel_device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(matrix, right) / 2
        assert torch.equal(out, cholesky_solve(cholesky(matrix)[0], right))


def test_linear_algebra_of_the_vendor_is_preferred_unless_a_range_is_configured(monkeypatch):
    cpu = torch.device("cpu")
    assert not any(cholesky_preferred(n, 1000, dtype, cpu) for n in (1, 64, 2000) for dtype in (F32, F64))
    monkeypatch.setattr(op, "lookup", lambda *_: {"prefer_from": 33, "prefer_to": 500, "prefer_batch": 8})
    assert cholesky_preferred(33, 8, F32, cpu)
    assert cholesky_preferred(500, 9, F64, cpu)
    assert not cholesky_preferred(32, 8, F32, cpu)
    assert not cholesky_preferred(501, 8, F32, cpu)
    assert not cholesky_preferred(33, 7, F32, cpu)
    assert not cholesky_preferred(33, 8, torch.bfloat16, cpu)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4)])
def test_matrices_that_are_not_square_are_refused(shape):
    with pytest.raises(ValueError, match=r"square matrices \(B, n, n\)"):
        cholesky(torch.zeros(shape))


@pytest.mark.parametrize(("lower", "right"), [((2, 3, 3), (2, 3)), ((2, 3, 3), (1, 3, 1)), ((2, 3, 4), (2, 3, 1))])
def test_right_hand_sides_that_do_not_fit_are_refused(lower, right):
    with pytest.raises(ValueError, match=r"lower \(B, n, n\) and right \(B, n, m\)"):
        cholesky_solve(torch.zeros(lower), torch.zeros(right))


def test_wrong_dtypes_and_devices_are_refused():
    with pytest.raises(TypeError, match=r"cholesky needs float32 or float64, but has torch\.bfloat16"):
        cholesky(torch.zeros(1, 2, 2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"lower has torch\.float32 and right torch\.float64"):
        cholesky_solve(torch.zeros(1, 2, 2), torch.zeros(1, 2, 1, dtype=F64))
    with pytest.raises(ValueError, match="lower is on cpu, right on meta"):
        cholesky_solve(torch.zeros(1, 2, 2), torch.zeros(1, 2, 1, device="meta"))
