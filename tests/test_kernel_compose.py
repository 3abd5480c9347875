"""The composition kernel against numpy float64, interpreted (or on a GPU, see conftest), and its operator."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from fastmorph_kernels import compose, ops
from numpy.typing import NDArray

pytest.importorskip("triton")

from fastmorph_kernels.compose_kernel import CONFIGS, INTERPRETED, ComposeConfig, config_for, launch_compose

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
# The interpreter multiplies bfloat16 wrongly (triton#11584): there, compiling it is all that is checked.
DTYPES = [F16, F32, F64] if INTERPRETED else [F16, F32, F64, BF16]

# batch, Co, Ch, Ci, K1, K2
SHAPES = [
    pytest.param(2, 63, 33, 17, (), (), id="linear"),
    pytest.param(1, 5, 7, 9, (5,), (3,), id="1d"),
    pytest.param(3, 7, 5, 3, (3, 2), (2, 3), id="2d"),
    pytest.param(2, 1, 1, 1, (1, 7), (3, 1), id="2d-one-channel"),
    pytest.param(1, 17, 35, 33, (2, 2), (2, 1), id="2d-ragged"),
    pytest.param(2, 4, 3, 5, (2, 3, 1), (2, 2, 3), id="3d"),
]


def oracle(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """The definition, one tap of each kernel at a time, in float64."""
    k1, k2 = first.shape[3:], second.shape[3:]
    sizes = [a + b - 1 for a, b in zip(k1, k2, strict=True)]
    out = np.zeros((first.shape[0], second.shape[1], first.shape[2], *sizes))
    for t in np.ndindex(k1):
        for v in np.ndindex(k2):
            u = tuple(a + b for a, b in zip(t, v, strict=True))
            out[(..., *u)] += np.einsum("boh,bhi->boi", second[(..., *v)], first[(..., *t)])
    return out


def assert_close(out: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    """Hold `out` to the error bound of its sums, whatever their order.

    A sum of n products taken in any order, each operation rounded by at most u = eps / 2, is off by at most about
    n u (|second| * |first|). The oracle may be off by as much in float64, which makes n eps (|second| * |first|);
    rounding to the output's dtype adds eps of that dtype times the result, or less than its smallest number.
    """
    f, s = (x.detach().cpu().double().numpy() for x in (first, second))
    n = first.shape[1] * second[0, 0, 0].numel() if second.numel() else 0
    eps = torch.finfo(F64 if out.dtype == F64 else F32).eps
    info = torch.finfo(out.dtype)
    exact, magnitude = oracle(f, s), oracle(abs(f), abs(s))
    bound = (n * eps + info.eps) * magnitude + info.smallest_normal * info.eps
    assert out.shape == exact.shape
    assert out.dtype == first.dtype
    error = abs(out.cpu().double().numpy() - exact)
    assert (error <= bound).all(), f"off by {np.nanmax(error / bound)} times the bound (or nan)"  # a nan fails too


def kernels(
    batch: int,
    out: int,
    hidden: int,
    inputs: int,
    k1: tuple[int, ...],
    k2: tuple[int, ...],
    dtype: torch.dtype = F32,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn((batch, hidden, inputs, *k1), generator=generator, dtype=F64)
    second = torch.randn((batch, out, hidden, *k2), generator=generator, dtype=F64)
    return first.to(device, dtype), second.to(device, dtype)


def launch(first: torch.Tensor, second: torch.Tensor, config: ComposeConfig, out: torch.Tensor | None = None) -> torch.Tensor:
    """Run the kernel itself, into NaN unless `out` is given."""
    if out is None:
        out = torch.full_like(ops._empty_out(first, second), torch.nan)
    launch_compose(*map(ops._six_dimensional, (first, second, out)), precision="ieee", config=config)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "out", "hidden", "inputs", "k1", "k2"), SHAPES)
def test_kernel_matches_numpy(batch, out, hidden, inputs, k1, k2, dtype, kernel_device):
    first, second = kernels(batch, out, hidden, inputs, k1, k2, dtype, kernel_device)
    assert_close(launch(first, second, config_for(dtype, out, inputs)), first, second)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [pytest.param(dtype, size, id=f"{dtype}-{name}") for dtype in DTYPES for size, name in enumerate(("small", "large"))],
)
def test_every_config_matches_numpy(dtype, size, kernel_device):
    first, second = kernels(1, 63, 19, 65, (3,), (2,), dtype, kernel_device)
    assert_close(launch(first, second, CONFIGS[dtype][size]), first, second)


# Few channels make one tile hold several offsets, in one row, across rows and across planes.
@pytest.mark.parametrize("block_n", [4, 8, 32])
def test_tiles_of_several_offsets(block_n, kernel_device):
    first, second = kernels(1, 2, 3, 2, (2, 3, 2), (3, 2, 2), F64, kernel_device)
    assert_close(launch(first, second, ComposeConfig(16, block_n, 16, 4, 2)), first, second)


def test_permuted_inputs(kernel_device):
    first, second = kernels(2, 5, 4, 3, (3, 2), (2, 3), F32, kernel_device)
    first = first.permute(3, 1, 4, 0, 2).contiguous().permute(3, 1, 4, 0, 2)
    second = second.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    assert not first.is_contiguous()
    assert_close(launch(first, second, config_for(F32, 5, 3)), first, second)


def test_sliced_flipped_and_expanded_inputs(kernel_device):
    first, second = kernels(3, 9, 8, 6, (3, 5), (3, 3), F32, kernel_device)
    first, second = first[:, 1::2, 1:4, :, ::2], second[:1, ::3, ::2, 1:].expand(3, -1, -1, -1, -1)
    assert_close(launch(first, second, config_for(F32, 3, 3)), first, second)


def test_writes_a_strided_output_and_nothing_around_it(kernel_device):
    first, second = kernels(2, 5, 4, 3, (3,), (2,), F32, kernel_device)
    around = torch.full((4, 8, 2, 9), torch.nan, device=kernel_device)  # (u, o, b, i)
    out = around[:, 1:6, :, 1:7:2].permute(2, 1, 3, 0)
    assert_close(launch(first, second, config_for(F32, 5, 3), out), first, second)
    assert int(around.isfinite().sum()) == out.numel()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("batch", "out", "hidden", "inputs"),
    [(0, 2, 3, 4), (1, 2, 3, 4), (2, 0, 3, 4), (2, 2, 3, 0), (2, 2, 0, 4), (1, 1, 1, 1)],
)
@pytest.mark.parametrize("interpreted", [True, False])
def test_operator_with_small_and_empty_sizes(batch, out, hidden, inputs, interpreted, kernel_device, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(ops, "_interpreted", lambda: False)
    first, second = kernels(batch, out, hidden, inputs, (3,), (2,), F32, kernel_device if interpreted else "cpu")
    assert_close(compose(first, second), first, second)


# What a CPU without the interpreter runs.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F16, F32, F64, BF16], ids=str)
@pytest.mark.parametrize(("batch", "out", "hidden", "inputs", "k1", "k2"), SHAPES)
def test_fallback_matches_numpy(batch, out, hidden, inputs, k1, k2, dtype, monkeypatch):
    monkeypatch.setattr(ops, "_interpreted", lambda: False)
    first, second = kernels(batch, out, hidden, inputs, k1, k2, dtype)
    assert_close(compose(first, second), first, second)


def test_bfloat16_on_a_cpu_avoids_the_interpreter():
    first, second = kernels(1, 5, 20, 3, (3,), (2,), BF16)
    assert_close(compose(first, second), first, second)


@pytest.mark.parametrize("interpreted", [True, False])
def test_opcheck(interpreted, kernel_device, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(ops, "_interpreted", lambda: False)
    first, second = kernels(2, 3, 4, 2, (3, 1), (2, 3), F32, kernel_device if interpreted else "cpu")
    permuted = first.permute(3, 1, 4, 0, 2).contiguous().permute(3, 1, 4, 0, 2)  # dense, and not contiguous
    assert not permuted.is_contiguous()
    torch.library.opcheck(torch.ops.fastmorph_kernels.compose.default, (permuted, second, "ieee"))


def test_a_cpu_needs_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not ops._interpreted.__wrapped__()  # past its cache


# aot_eager traces as inductor does and needs no C++ compiler. Sizes that are equal by chance would become a guard.
def test_compiles_into_one_graph_for_every_shape(kernel_device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda f, s: compose(f, s) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, out, hidden, inputs, k1, k2 in ((3, 8, 5, 6, 4, 2), (2, 3, 4, 2, 3, 3)):
        first, second = kernels(batch, out, hidden, inputs, (k1,), (k2,), F32, kernel_device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(compiled(first, second) / 2, first, second)


def test_config_follows_the_channels():
    small, large = CONFIGS[F32]
    assert config_for(F32, 64, 64) == large
    assert config_for(F32, 64, 3) == config_for(F32, 3, 64) == small


def tensors(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(first), torch.zeros(second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (tensors((1, 2, 3, 3), (1, 4, 2)), r"same 0 to 3 spatial dimensions, but first has shape \(1, 2, 3, 3\)"),
        (tensors((2, 3), (4, 2)), r"unsqueeze\(\)"),
        (tensors((1, 2, 3, 1, 1, 1, 1), (1, 4, 2, 1, 1, 1, 1)), "0 to 3 spatial dimensions"),
        (tensors((1, 2, 3), (5, 4, 2)), r"first has a batch of 1 and second one of 5 .*: expand\(\) the smaller one"),
        (tensors((1, 2, 3), (1, 4, 3)), "first makes 2 hidden channels .* second takes 3 .* not swapped"),
        (tensors((1, 2, 3, 0), (1, 4, 2, 3)), r"first has kernel size \(0,\) .* must be at least 1"),
        ((torch.zeros(1, 2, 3), torch.zeros(1, 4, 2, device="meta")), "first is on cpu and second on meta"),
    ],
)
def test_wrong_tensors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        compose(*arguments)


@pytest.mark.parametrize("dtypes", [(F32, F64), (torch.int64, torch.int64), (torch.complex64, torch.complex64)])
def test_wrong_dtypes_are_refused(dtypes):
    with pytest.raises(TypeError, match=f"first has {dtypes[0]} and second has {dtypes[1]}: convert them"):
        compose(torch.zeros(1, 2, 3, dtype=dtypes[0]), torch.zeros(1, 4, 2, dtype=dtypes[1]))


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="one of ieee, tf32, tf32x3, but it is 'fp8'"):
        compose(torch.zeros(1, 2, 3), torch.zeros(1, 4, 2), precision="fp8")
