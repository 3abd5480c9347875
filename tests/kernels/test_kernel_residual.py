"""The residual kernel, its error and its squared norm, against numpy float64, interpreted or on a GPU, and its operators."""

from __future__ import annotations

import math

import pytest
import torch
from fastmorph_kernels import residual, support

pytest.importorskip("triton")

from fastmorph_kernels import tiling
from fastmorph_kernels.residual import kernel, op
from kernel_oracle import (
    BF16,
    F16,
    F32,
    F64,
    SHAPES,
    SHAPES_AND_DTYPES,
    assert_within,
    befores,
    compose_numpy,
    every_config,
    framed,
    numpy,
    permuted,
    random,
    sliced,
)

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]


def problem(batch, out, hidden, inputs, k1, k2, dtype=F32, device="cpu", *, full=False) -> Problem:
    """A pair of kernels and a weight that stands somewhere in their frame: in its middle, or all over it."""
    first = random(batch, hidden, inputs, *k1, dtype=dtype, device=device)
    second = random(batch, out, hidden, *k2, dtype=dtype, device=device, seed=1)
    frame = tuple(a + b - 1 for a, b in zip(k1, k2, strict=True))
    kernel = frame if full else tuple(max(1, n - 2) for n in frame)
    weight = random(batch, out, inputs, *kernel, dtype=dtype, device=device, seed=2)
    return first, second, weight, tuple((n - k) // 2 for n, k in zip(frame, kernel, strict=True))


def assert_error(error: torch.Tensor, first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor, before) -> None:
    target = framed(weight, before, tuple(error.shape[3:]))
    exact = target - compose_numpy(numpy(first), numpy(second))
    magnitude = abs(target) + compose_numpy(abs(numpy(first)), abs(numpy(second)))
    terms = first.shape[1] * math.prod(second.shape[3:]) + 1
    assert_within(error, exact, magnitude, terms, first.dtype)
    assert error.dtype == first.dtype


def assert_squared(squared: torch.Tensor, first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor, before) -> None:
    """The square of an error e + d is off by 2 |e| |d| + d^2; the float64 sums on both sides by less than d^2."""
    frame = tuple(a + b - 1 for a, b in zip(first.shape[3:], second.shape[3:], strict=True))
    target = framed(weight, before, frame)
    exact = abs(target - compose_numpy(numpy(first), numpy(second)))
    magnitude = abs(target) + compose_numpy(abs(numpy(first)), abs(numpy(second)))
    terms = first.shape[1] * math.prod(second.shape[3:]) + 1
    off = 2 * terms * torch.finfo(F64 if first.dtype == F64 else F32).eps * magnitude
    axes = tuple(range(1, exact.ndim))
    bound = (2 * exact * off + off**2).sum(axes) + exact.size * torch.finfo(F64).eps * (exact**2).sum(axes)
    assert squared.dtype == F64
    assert squared.shape == first.shape[:1]
    assert (abs(numpy(squared) - (exact**2).sum(axes)) <= bound).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("batch", "out", "hidden", "inputs", "k1", "k2", "dtype"), SHAPES_AND_DTYPES)
def test_error_and_squared_norm_match_numpy(batch, out, hidden, inputs, k1, k2, dtype, kernel_device):
    arguments = problem(batch, out, hidden, inputs, k1, k2, dtype, kernel_device)
    error, squared = residual(*arguments)
    assert_error(error, *arguments)
    assert_squared(squared, *arguments)


@pytest.mark.parametrize("before", befores((4, 3), (2, 2)), ids=str)
def test_weight_anywhere_in_the_frame(before, kernel_device):
    first, second, _, _ = problem(1, 3, 2, 3, (3, 1), (2, 3), F64, kernel_device)
    weight = random(1, 3, 3, 2, 2, dtype=F64, device=kernel_device, seed=2)
    assert_error(residual(first, second, weight, before)[0], first, second, weight, before)


def test_weight_that_fills_the_frame(kernel_device):
    arguments = problem(2, 3, 2, 3, (3, 1), (2, 3), F32, kernel_device, full=True)
    assert_error(residual(*arguments)[0], *arguments)


@every_config("residual")
def test_every_config_matches_numpy(entry, rows, columns, kernel_device, monkeypatch):
    monkeypatch.setattr(op, "choose", lambda *_: tiling.TileConfig(**entry.config))
    arguments = problem(1, rows, 19, columns, (3,), (2,), entry.dtype, kernel_device)
    error, squared = residual(*arguments)
    assert_error(error, *arguments)
    assert_squared(squared, *arguments)


# A composition that is the weight leaves rounding alone, and nothing where all numbers are small integers.
def test_exact_composition_leaves_nothing(kernel_device):
    first = torch.arange(2 * 3 * 2 * 3, device=kernel_device).remainder(5).sub(2).float().view(2, 3, 2, 3)
    second = torch.arange(2 * 4 * 3 * 2, device=kernel_device).remainder(3).sub(1).float().view(2, 4, 3, 2)
    weight = torch.from_numpy(compose_numpy(numpy(first), numpy(second))).to(first)
    error, squared = residual(first, second, weight, (0,))
    assert error.eq(0).all()
    assert squared.eq(0).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norm_neither_underflows_nor_overflows(size, kernel_device):
    first, second, weight, before = problem(1, 3, 2, 3, (3,), (2,), F32, kernel_device)
    error, squared = residual(first * size, second, weight * size, before)
    expected = error.double().square().sum()
    torch.testing.assert_close(squared[0], expected, rtol=1e-6, atol=0)  # float32 rounding of the stored error
    assert 0 < squared.item() < math.inf


# In the parts of a tile that lie outside the output an infinity meets zeros, of which numpy warns where interpreted.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_infinite_errors_have_an_infinite_squared_norm(kernel_device):
    first, second, weight, before = problem(1, 3, 2, 3, (3,), (2,), F32, kernel_device)
    first[0, 0, 0, 0] = torch.inf
    assert residual(first.abs(), second.abs(), weight, before)[1].item() == torch.inf


def test_permuted_and_sliced_inputs(kernel_device):
    first, second, weight, before = problem(2, 5, 4, 3, (3, 2), (2, 3), F32, kernel_device)
    for view in (permuted, sliced):
        error, squared = residual(view(first), view(second), view(weight), before)
        assert_error(error, first, second, weight, before)
        assert_squared(squared, first, second, weight, before)


def test_offsets_of_64_bits(kernel_device, monkeypatch):
    monkeypatch.setattr(kernel, "is_wide", lambda *_, **__: True)
    arguments = problem(2, 5, 4, 3, (3, 2), (2, 3), F32, kernel_device)
    assert_error(residual(*arguments)[0], *arguments)


def test_equal_inputs_give_equal_bits(kernel_device):
    arguments = problem(2, 9, 20, 17, (3,), (2,), F32, kernel_device)
    for one, two in zip(residual(*arguments), residual(*arguments), strict=True):
        assert one.equal(two)


# An item's norm owes nothing to the items beside it.
def test_norm_of_an_item_is_that_of_a_batch_of_one(kernel_device):
    first, second, weight, before = problem(3, 9, 5, 17, (3,), (2,), F32, kernel_device)
    alone = [residual(first[i : i + 1], second[i : i + 1], weight[i : i + 1], before)[1] for i in range(3)]
    assert residual(first, second, weight, before)[1].equal(torch.cat(alone))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("batch", "out", "hidden", "inputs"), [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 3, 0), (2, 2, 0, 4), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("interpreted", [True, False])
def test_small_and_empty_sizes(batch, out, hidden, inputs, interpreted, kernel_device, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(support, "interpreted", lambda: False)
    arguments = problem(batch, out, hidden, inputs, (3,), (2,), F32, kernel_device if interpreted else "cpu")
    error, squared = residual(*arguments)
    assert_error(error, *arguments)
    assert_squared(squared, *arguments)


# What a CPU without the interpreter runs.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F16, F32, F64, BF16], ids=str)
@pytest.mark.parametrize(("batch", "out", "hidden", "inputs", "k1", "k2"), SHAPES)
def test_fallback_matches_numpy(batch, out, hidden, inputs, k1, k2, dtype, monkeypatch):
    monkeypatch.setattr(support, "interpreted", lambda: False)
    arguments = problem(batch, out, hidden, inputs, k1, k2, dtype)
    error, squared = residual(*arguments)
    assert_error(error, *arguments)
    assert_squared(squared, *arguments)


@pytest.mark.parametrize("interpreted", [True, False])
def test_opcheck(interpreted, kernel_device, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(support, "interpreted", lambda: False)
    first, second, weight, before = problem(2, 3, 4, 2, (3, 1), (2, 3), F32, kernel_device if interpreted else "cpu")
    arguments = (permuted(first), second, permuted(weight), list(before), "ieee")
    torch.library.opcheck(torch.ops.fastmorph_kernels.residual.default, arguments)


# aot_eager traces as inductor does and needs no C++ compiler. Sizes that are equal by chance would become a guard.
def test_compiles_into_one_graph_for_every_shape(kernel_device):
    torch._dynamo.reset()

    def both(first, second, weight):
        error, squared = residual(first, second, weight, (1,))
        return error * 2, squared

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((9, 8, 5, 6, (4,), (2,)), (2, 3, 4, 2, (3,), (3,))):
        first, second, weight, _ = problem(*sizes, F32, kernel_device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            error, squared = compiled(first, second, weight)
        assert_error(error / 2, first, second, weight, (1,))
        assert_squared(squared, first, second, weight, (1,))


@pytest.mark.parametrize(
    ("weight", "before", "message"),
    [
        ((1, 4, 3, 2), (0,), r"with the batch, .*, \(1, 4, 5\) here, but it has shape \(1, 4, 3, 2\)"),
        ((1, 4, 5), (), r"weight \(B, Co, Ci, \*K\) .* shape \(1, 4, 5\)"),
        ((1, 4, 5, 5), (0,), r"size \(5,\) behind \(0,\) zeros does not lie in the frame \(4,\)"),
        ((1, 4, 5, 3), (2,), "before \\+ K must be at most"),
        ((1, 4, 5, 3), (-1,), "before \\+ K must be at most"),
        ((1, 4, 5, 3), (0, 0), r"behind \(0, 0\) zeros"),
        ((1, 4, 5, 0), (0,), r"size \(0,\) behind"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weight, before, message):
    with pytest.raises(ValueError, match=message):
        residual(torch.zeros(1, 2, 5, 3), torch.zeros(1, 4, 2, 2), torch.zeros(weight), before)


def test_other_wrong_arguments_are_refused():
    first, second, weight = torch.zeros(1, 2, 5, 3), torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 5, 3)
    with pytest.raises(TypeError, match=r"residual needs tensors of one dtype.* weight has torch.float64"):
        residual(first, second, weight.double(), (0,))
    with pytest.raises(ValueError, match="precision must be one of ieee"):
        residual(first, second, weight, (0,), precision="fp8")
    with pytest.raises(ValueError, match="not swapped"):
        residual(second, first, weight, (0,))
