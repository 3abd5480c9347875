"""The correlation, the composition kernel on other strides, against numpy float64, interpreted or on a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fastmorph_kernels import compose, correlate, support

pytest.importorskip("triton")

from fastmorph_kernels import tiling
from fastmorph_kernels.compose import kernel
from fastmorph_kernels.correlate import op
from kernel_oracle import (
    BF16,
    F16,
    F32,
    F64,
    SHAPES,
    SHAPES_AND_DTYPES,
    assert_within,
    befores,
    every_config,
    framed,
    numpy,
    permuted,
    random,
    sliced,
    system_numpy,
)

Problem = tuple[torch.Tensor, tuple[int, ...], torch.Tensor, tuple[int, ...]]


def problem(batch, out, hidden, inputs, k1, k2, dtype=F32, device="cpu", *, full=False) -> Problem:
    """A target that stands somewhere in the frame of a first kernel and a second one of size `k2`."""
    frame = tuple(a + b - 1 for a, b in zip(k1, k2, strict=True))
    kernel = frame if full else tuple(max(1, n - 2) for n in frame)
    before = tuple((n - k) // 2 for n, k in zip(frame, kernel, strict=True))
    target = random(batch, out, inputs, *kernel, dtype=dtype, device=device)
    return target, before, random(batch, hidden, inputs, *k1, dtype=dtype, device=device, seed=1), k2


def assert_close(out: torch.Tensor, target: torch.Tensor, before, first: torch.Tensor, k2) -> None:
    """Against the product with the transposed system, A G^T."""
    frame = tuple(a + b - 1 for a, b in zip(first.shape[3:], k2, strict=True))
    right = np.moveaxis(framed(target, before, frame), 2, -1)  # (B, Co, *N, Ci)
    right = right.reshape(*target.shape[:2], math.prod(frame) * target.shape[2])
    system = system_numpy(numpy(first), k2)
    exact, magnitude = (
        np.moveaxis(product.reshape(*target.shape[:2], *k2, first.shape[1]), -1, 2)
        for product in (right @ system.swapaxes(1, 2), abs(right) @ abs(system).swapaxes(1, 2))
    )
    assert_within(out, exact, magnitude, target.shape[2] * math.prod(target.shape[3:]), target.dtype)
    assert out.dtype == target.dtype


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("batch", "out", "hidden", "inputs", "k1", "k2", "dtype"), SHAPES_AND_DTYPES)
def test_kernel_matches_numpy(batch, out, hidden, inputs, k1, k2, dtype, kernel_device):
    arguments = problem(batch, out, hidden, inputs, k1, k2, dtype, kernel_device)
    assert_close(correlate(*arguments), *arguments)


# Taps of the result that meet no tap of the target are zero, and must be written.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("before", befores((4, 3), (1, 1)), ids=str)
def test_target_anywhere_in_the_frame(before, kernel_device):
    target = random(1, 3, 2, 1, 1, dtype=F64, device=kernel_device)
    first = random(1, 4, 2, 2, 1, dtype=F64, device=kernel_device, seed=1)
    assert_close(correlate(target, before, first, (3, 3)), target, before, first, (3, 3))


def test_target_that_fills_the_frame(kernel_device):
    arguments = problem(2, 3, 2, 3, (3, 1), (2, 3), F32, kernel_device, full=True)
    assert_close(correlate(*arguments), *arguments)


@every_config("correlate")
def test_every_config_matches_numpy(entry, rows, columns, kernel_device, monkeypatch):
    monkeypatch.setattr(op, "choose", lambda *_: tiling.TileConfig(**entry.config))
    arguments = problem(1, rows, columns, 19, (3,), (2,), entry.dtype, kernel_device)
    assert_close(correlate(*arguments), *arguments)


# <compose(F1, F2), G> = <F2, correlate(G, F1)>, to the rounding of the sums on either side.
def test_is_the_adjoint_of_compose(kernel_device):
    target, before, first, k2 = problem(2, 5, 4, 3, (3, 2), (2, 3), F64, kernel_device, full=True)
    second = random(2, 5, 4, *k2, dtype=F64, device=kernel_device, seed=2)
    left = (compose(first, second) * target).sum()
    right = (second * correlate(target, before, first, k2)).sum()
    magnitude = (compose(first.abs(), second.abs()) * target.abs()).sum()
    terms = target.numel() + second.numel()
    assert (left - right).abs() <= terms * torch.finfo(F64).eps * magnitude


def test_permuted_sliced_and_flat_inputs(kernel_device):
    target, before, first, k2 = problem(2, 5, 4, 3, (3, 2), (2, 3), F32, kernel_device)
    for view in (permuted, sliced):
        assert_close(correlate(view(target), before, view(first), k2), target, before, first, k2)
    flat = first[..., :1, :1].expand_as(first)  # strides of 0
    assert_close(correlate(target, before, flat, k2), target, before, flat, k2)


def test_offsets_of_64_bits(kernel_device, monkeypatch):
    monkeypatch.setattr(kernel, "is_wide", lambda *_, **__: True)
    arguments = problem(2, 5, 4, 3, (3, 2), (2, 3), F32, kernel_device)
    assert_close(correlate(*arguments), *arguments)


def test_equal_inputs_give_equal_bits(kernel_device):
    arguments = problem(2, 9, 20, 17, (3,), (2,), F32, kernel_device)
    assert correlate(*arguments).equal(correlate(*arguments))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("batch", "out", "hidden", "inputs"), [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("interpreted", [True, False])
def test_small_and_empty_sizes(batch, out, hidden, inputs, interpreted, kernel_device, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(support, "interpreted", lambda: False)
    arguments = problem(batch, out, hidden, inputs, (3,), (2,), F32, kernel_device if interpreted else "cpu")
    assert_close(correlate(*arguments), *arguments)


# What a CPU without the interpreter runs.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F16, F32, F64, BF16], ids=str)
@pytest.mark.parametrize(("batch", "out", "hidden", "inputs", "k1", "k2"), SHAPES)
def test_fallback_matches_numpy(batch, out, hidden, inputs, k1, k2, dtype, monkeypatch):
    monkeypatch.setattr(support, "interpreted", lambda: False)
    arguments = problem(batch, out, hidden, inputs, k1, k2, dtype)
    assert_close(correlate(*arguments), *arguments)


@pytest.mark.parametrize("before", befores((4, 3), (1, 1)), ids=str)
def test_fallback_with_the_target_anywhere(before, monkeypatch):
    monkeypatch.setattr(support, "interpreted", lambda: False)
    target, first = random(1, 3, 2, 1, 1, dtype=F64), random(1, 4, 2, 2, 1, dtype=F64, seed=1)
    assert_close(correlate(target, before, first, (3, 3)), target, before, first, (3, 3))


@pytest.mark.parametrize("interpreted", [True, False])
def test_opcheck(interpreted, kernel_device, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(support, "interpreted", lambda: False)
    target, before, first, k2 = problem(2, 3, 4, 2, (3, 1), (2, 3), F32, kernel_device if interpreted else "cpu")
    arguments = (permuted(target), list(before), permuted(first), list(k2), "ieee")
    torch.library.opcheck(torch.ops.fastmorph_kernels.correlate.default, arguments)


# aot_eager traces as inductor does and needs no C++ compiler. Sizes that are equal by chance would become a guard.
def test_compiles_into_one_graph_for_every_shape(kernel_device):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda target, first: correlate(target, (1,), first, (2,)) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for sizes in ((9, 8, 5, 6, (4,), (2,)), (3, 2, 4, 5, (3,), (2,))):
        target, _, first, k2 = problem(*sizes, F32, kernel_device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(compiled(target, first) / 2, target, (1,), first, k2)


@pytest.mark.parametrize(
    ("target", "before", "first", "k2", "message"),
    [
        ((1, 4, 3, 3), (0,), (1, 2, 5, 3), (2,), r"same input channels .* target has shape \(1, 4, 3, 3\)"),
        ((2, 4, 5, 3), (0,), (1, 2, 5, 3), (2,), "of one batch"),
        ((1, 4, 5), (0,), (1, 2, 5, 3), (2,), "same 0 to 3 spatial dimensions"),
        ((1, 4, 5, 3), (0,), (1, 2, 5, 3), (2, 2), r"k2 of 1 numbers, .* but k2 is \(2, 2\)"),
        ((1, 4, 5, 3), (0,), (1, 2, 5, 3), (0,), r"no empty kernel, but k2 is \(0,\)"),
        ((1, 4, 5, 3), (2,), (1, 2, 5, 3), (2,), r"size \(3,\) behind \(2,\) zeros does not lie in the frame \(4,\)"),
        ((1, 4, 5, 3), (), (1, 2, 5, 3), (2,), r"behind \(\) zeros"),
    ],
)
def test_wrong_sizes_are_refused(target, before, first, k2, message):
    with pytest.raises(ValueError, match=message):
        correlate(torch.zeros(target), before, torch.zeros(first), k2)


def test_wrong_dtypes_and_precisions_are_refused():
    target, first = torch.zeros(1, 4, 5, 3), torch.zeros(1, 2, 5, 3)
    with pytest.raises(TypeError, match=r"target has torch.float32 and first has torch.float64"):
        correlate(target, (0,), first.double(), (2,))
    with pytest.raises(ValueError, match="precision must be one of ieee"):
        correlate(target, (0,), first, (2,), precision="fp8")
