"""The composition kernel against numpy float64, interpreted (or on a GPU, see conftest), and its operator."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from fastmorph_kernels import compose, support

pytest.importorskip("triton")

from fastmorph_kernels.compose import kernel
from fastmorph_kernels.compose.kernel import launch_compose
from fastmorph_kernels.compose.op import _allocate
from fastmorph_kernels.tiling import TileConfig, choose, is_wide, packed
from kernel_oracle import (
    BF16,
    F16,
    F32,
    F64,
    SHAPES,
    SHAPES_AND_DTYPES,
    assert_within,
    compose_numpy,
    every_config,
    numpy,
    permuted,
    random,
)


def assert_close(out: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    f, s = numpy(first), numpy(second)
    terms = first.shape[1] * math.prod(second.shape[3:])
    assert_within(out, compose_numpy(f, s), compose_numpy(abs(f), abs(s)), terms, first.dtype)
    assert out.dtype == first.dtype


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
    first = random(batch, hidden, inputs, *k1, dtype=dtype, device=device)
    return first, random(batch, out, hidden, *k2, dtype=dtype, device=device, seed=1)


def launch(
    first: torch.Tensor, second: torch.Tensor, config: TileConfig | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Run the kernel itself, as the operator would configure it unless told otherwise, into NaN unless `out` is given."""
    if out is None:
        out = torch.full_like(_allocate(first, second, "ieee"), torch.nan)
    config = config or choose("compose", out.dtype, "ieee", out.device, *out.shape[1:3], out[:, 0, 0].numel())
    first, second = packed(first, 1, config.pack), packed(second, 2, config.pack)
    launch_compose(*map(support.six_dimensional, (first, second, out)), precision="ieee", config=config)
    return out


@pytest.mark.parametrize(("batch", "out", "hidden", "inputs", "k1", "k2", "dtype"), SHAPES_AND_DTYPES)
def test_kernel_matches_numpy(batch, out, hidden, inputs, k1, k2, dtype, kernel_device):
    first, second = kernels(batch, out, hidden, inputs, k1, k2, dtype, kernel_device)
    assert_close(launch(first, second), first, second)


@every_config("compose")
def test_every_config_matches_numpy(entry, rows, columns, kernel_device):
    first, second = kernels(1, rows, 19, columns, (3,), (2,), entry.dtype, kernel_device)
    assert_close(launch(first, second, TileConfig(**entry.config)), first, second)


# Few channels make one tile hold several offsets, in one row, across rows and across planes.
@pytest.mark.parametrize("block_n", [4, 8, 32])
def test_tiles_of_several_offsets(block_n, kernel_device):
    first, second = kernels(1, 2, 3, 2, (2, 3, 2), (3, 2, 2), F64, kernel_device)
    assert_close(launch(first, second, TileConfig(16, block_n, 16, 4, 2, pack=0)), first, second)


def test_permuted_inputs(kernel_device):
    first, second = kernels(2, 5, 4, 3, (3, 2), (2, 3), F32, kernel_device)
    assert_close(launch(permuted(first), permuted(second)), first, second)


def test_sliced_flipped_and_expanded_inputs(kernel_device):
    first, second = kernels(3, 9, 8, 6, (3, 5), (3, 3), F32, kernel_device)
    first, second = first[:, 1::2, 1:4, :, ::2], second[:1, ::3, ::2, 1:].expand(3, -1, -1, -1, -1)
    assert_close(launch(first, second), first, second)


def test_writes_a_strided_output_and_nothing_around_it(kernel_device):
    first, second = kernels(2, 5, 4, 3, (3,), (2,), F32, kernel_device)
    around = torch.full((4, 8, 2, 9), torch.nan, device=kernel_device)  # (u, o, b, i)
    out = around[:, 1:6, :, 1:7:2].permute(2, 1, 3, 0)
    assert_close(launch(first, second, out=out), first, second)
    assert int(around.isfinite().sum()) == out.numel()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("batch", "out", "hidden", "inputs"),
    [(0, 2, 3, 4), (1, 2, 3, 4), (2, 0, 3, 4), (2, 2, 3, 0), (2, 2, 0, 4), (1, 1, 1, 1)],
)
@pytest.mark.parametrize("interpreted", [True, False])
def test_operator_with_small_and_empty_sizes(batch, out, hidden, inputs, interpreted, kernel_device, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(support, "interpreted", lambda: False)
    first, second = kernels(batch, out, hidden, inputs, (3,), (2,), F32, kernel_device if interpreted else "cpu")
    assert_close(compose(first, second), first, second)


# What a CPU without the interpreter runs.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F16, F32, F64, BF16], ids=str)
@pytest.mark.parametrize(("batch", "out", "hidden", "inputs", "k1", "k2"), SHAPES)
def test_fallback_matches_numpy(batch, out, hidden, inputs, k1, k2, dtype, monkeypatch):
    monkeypatch.setattr(support, "interpreted", lambda: False)
    first, second = kernels(batch, out, hidden, inputs, k1, k2, dtype)
    assert_close(compose(first, second), first, second)


def test_bfloat16_on_a_cpu_avoids_the_interpreter():
    first, second = kernels(1, 5, 20, 3, (3,), (2,), BF16)
    assert_close(compose(first, second), first, second)


@pytest.mark.parametrize("interpreted", [True, False])
def test_opcheck(interpreted, kernel_device, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(support, "interpreted", lambda: False)
    first, second = kernels(2, 3, 4, 2, (3, 1), (2, 3), F32, kernel_device if interpreted else "cpu")
    torch.library.opcheck(torch.ops.fastmorph_kernels.compose.default, (permuted(first), second, "ieee"))


def test_a_cpu_needs_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not support.interpreted.__wrapped__()  # past its cache


# aot_eager traces as inductor does and needs no C++ compiler. Sizes that are equal by chance would become a guard.
def test_compiles_into_one_graph_for_every_shape(kernel_device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda f, s: compose(f, s) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, out, hidden, inputs, k1, k2 in ((3, 8, 5, 6, 4, 2), (2, 3, 4, 2, 3, 3)):
        first, second = kernels(batch, out, hidden, inputs, (k1,), (k2,), F32, kernel_device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(compiled(first, second) / 2, first, second)


def test_config_follows_the_channels():
    sizes = ((64, 64), (64, 3), (3, 64), (129, 129))
    block = {size: choose("compose", F32, "ieee", torch.device("cpu"), *size, 1).block_m for size in sizes}
    assert block[64, 3] == block[3, 64] < block[64, 64] < block[129, 129]


# Offsets of 64 bits, which only items of more than 2^31 elements need otherwise.
def test_wide_offsets(kernel_device, monkeypatch):
    first, second = kernels(2, 5, 4, 3, (3, 2), (2, 3), F32, kernel_device)
    monkeypatch.setattr(kernel, "is_wide", lambda *_, **__: True)
    assert_close(launch(first, second), first, second)


def test_items_of_two_billion_elements_are_wide():
    empty = torch.empty(1, device="meta")
    near, far = (empty.as_strided((2, 3, 1, 1, 1, 2), (2**40, step, 1, 0, 0, 1)) for step in (2**30 - 1, 2**30))
    assert not is_wide(near, first=near, offsets=(0, 0, 1))
    assert is_wide(near, first=far, offsets=(0, 0, 1))
    assert is_wide(far, first=near, offsets=(0, 0, 1))


def test_a_window_that_reaches_two_billion_elements_is_wide():
    first = torch.empty(1, device="meta").as_strided((1, 2, 2, 1, 1, 2), (0, 2, 1, 0, 0, 2**29))
    assert not is_wide(first=first, offsets=(0, 0, 3))
    assert is_wide(first=first, offsets=(0, 0, 4))


@pytest.mark.parametrize("hidden", [1, 2])
@pytest.mark.parametrize("pack", [1, 2])
def test_packed_inputs_are_the_same_and_zero_around(hidden, pack):
    kernel = torch.randn(2, 5, 20, 3, 1)
    copy = packed(kernel, hidden, pack)
    inner = hidden if pack == 1 else 3 - hidden
    assert copy.shape == (2, 16, 32, 3, 1)
    assert copy.stride(inner) == 1
    assert copy[:, :5, :20].equal(kernel)
    assert copy.count_nonzero() == kernel.count_nonzero()
    assert packed(copy, hidden, pack) is copy


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
        ((torch.zeros(1, 2, 3), torch.zeros(1, 4, 2, device="meta")), "first is on cpu and second is on meta"),
    ],
)
def test_wrong_tensors_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        compose(*arguments)


@pytest.mark.parametrize("dtypes", [(F32, F64), (torch.int64, torch.int64), (torch.complex64, torch.complex64)])
def test_wrong_dtypes_are_refused(dtypes):
    with pytest.raises(TypeError, match=f"first has {dtypes[0]} and second has {dtypes[1]}: convert with"):
        compose(torch.zeros(1, 2, 3, dtype=dtypes[0]), torch.zeros(1, 4, 2, dtype=dtypes[1]))


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="one of ieee, tf32, tf32x3, but it is 'fp8'"):
        compose(torch.zeros(1, 2, 3), torch.zeros(1, 4, 2), precision="fp8")
