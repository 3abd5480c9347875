"""Closed forms of many weights in one launch a step: the bits that each has alone, and what is left of it."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fastmorph_kernels import direct, direct_many, noise, support

pytest.importorskip("triton")

from fastmorph_kernels.direct_many import table
from fastmorph_kernels.direct_many.op import FEW, SUMS
from fastmorph_kernels.direct_many.table import EndRow, FactorRow, ProductRow, ScaleRow, SketchRow, Table
from test_kernel_direct import compose, pad, permuted

F16, F32, F64 = torch.float16, torch.float32, torch.float64


def random(*shape: int, dtype: torch.dtype = F32, device: torch.device | str = "cpu") -> torch.Tensor:
    draw = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=draw, dtype=F64).to(device, dtype)


def equations(dtype: torch.dtype = F32, device: torch.device | str = "cpu") -> list[tuple[Any, ...]]:
    """Batches, shared pairs, both sides, 0 to 3 spatial dimensions, few and many channels, strides and odd addresses."""
    turned = permuted(random(2, 5, 4, 3, 2, dtype=dtype, device=device), (2, 0, 4, 1, 3))
    odd = random(1 + 7 * 3 * 2, dtype=dtype, device=device)[1:].view(1, 7, 3, 2)
    return [
        (turned, 9, (3, 2), (2, 2), (1, 1), [1, 2**62], True),
        (random(1, 35, 3, dtype=dtype, device=device), 35, (), (), (), [-5], True),
        (random(1, 34, 37, dtype=dtype, device=device), 37, (), (), (), [3], True),
        (odd, 9, (2,), (2,), (0,), [4], True),
        (random(1, 3, 33, 2, dtype=dtype, device=device), 36, (1,), (2,), (0,), [8], False),
        (random(0, 3, 4, dtype=dtype, device=device), 4, (), (), (), [], True),
        (random(1, 2, 2, 1, 2, 1, dtype=dtype, device=device), 3, (2, 2, 1), (1, 1, 2), (1, 0, 1), [6], True),
    ]


@pytest.fixture(params=["kernel", "fallback"])
def device(request, kernel_device, monkeypatch) -> torch.device:
    if request.param == "kernel":
        return kernel_device
    monkeypatch.setattr(support, "interpreted", lambda: False)
    return torch.device("cpu")


def added_up(kernel: torch.Tensor, dim: int) -> torch.Tensor:
    """Channels of one side times a matrix of signs, by its definition."""
    channels = kernel.shape[dim]
    if channels <= FEW:
        return kernel
    matrix, words = torch.zeros(SUMS, channels, dtype=F64), noise.words_on_host(channels, 0, channels // 8 + 1)
    for c in range(channels):
        matrix[c % SUMS, c] = -1.0 if int(words[c // 8]) >> c % 8 & 1 else 1.0
    return torch.tensordot(kernel, matrix, ([dim], [1])).movedim(-1, dim)


def left(weight, first, second, before) -> torch.Tensor:
    weight, first, second = (x.double().cpu() for x in (weight, first, second))
    error = pad(weight, first.shape[3:], second.shape[3:], before) - compose(first, second)
    norm = weight.flatten(1).norm(dim=1)
    return added_up(added_up(error, 2), 1).flatten(1).norm(dim=1) / torch.where(norm == 0, 1.0, norm)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
def test_each_gets_the_bits_that_it_has_alone_and_its_residual(dtype, device):
    given = equations(dtype, device)
    kernels, told, exact = direct_many(given, density=0.5, limit=1e-7)
    expected = []
    for (weight, hidden, k1, k2, before, seeds, into_first), (first, second) in zip(given, kernels, strict=True):
        own = torch.tensor(seeds, dtype=torch.int64, device=device)
        one, two = direct(weight, hidden, k1, k2, before, own, density=0.5, into_first=into_first)
        assert torch.equal(first, one)
        assert torch.equal(second, two)
        assert first.is_contiguous()
        assert second.is_contiguous()
        expected.append(left(weight, first, second, before))
    # Rounding of float64 in sums of at most 64 terms of the weight's size; of it the residual is not much more in float64.
    torch.testing.assert_close(told[0].cpu(), torch.cat(expected), rtol=0, atol=64 * torch.finfo(F64).eps)
    assert torch.equal(told[1].cpu(), torch.zeros(7, dtype=F64))
    assert torch.equal(told[2], torch.cat([weight.double().flatten(1).abs().amax(1) for weight, *_ in given if len(weight)]))
    assert torch.equal(exact, told[0] <= 1e-7)
    assert told[0].max() > 1e-5 or dtype != F16  # so that it is not rounding that is compared


def test_neighbours_change_nothing(kernel_device):
    given = equations(device=kernel_device)[:4]
    together, told, _ = direct_many(given)
    turned, _, _ = direct_many(given[::-1])
    item = 0
    for one, pair, other in zip(given, together, turned[::-1], strict=True):
        ((alone,), own, _) = direct_many([one])
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(pair, alone, other, strict=True))
        assert torch.equal(told[:, item : item + len(one[0])], own)
        item += len(one[0])


def test_a_residual_is_absolute_where_the_weight_is_zero(device):
    weight = torch.zeros(1, 4, 3, 2, dtype=F16, device=device)
    ((kernels,), told, _) = direct_many([(weight, 9, (2,), (2,), (1,), [7], True)])
    assert float(told[0]) == pytest.approx(float(left(weight, *kernels, (1,))), abs=1e-12)
    assert float(told[0]) > 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_told(bad, device):
    weights = [random(2, 5, 3, 2, device=device), random(1, 34, 3, 1, device=device)]
    weights[0][1, 2, 1, 1], weights[1][0, 33, 2, 0] = bad, bad
    given = [(weights[0], 6, (2,), (1,), (0,), [1, 2], True), (weights[1], 34, (1,), (1,), (0,), [3], True)]
    largest = direct_many(given)[1][2]
    assert math.isfinite(largest[0])
    for value in largest[1:].tolist():
        assert math.isnan(value) if math.isnan(bad) else value == math.inf


def test_no_items(kernel_device):
    (((first, second),), told, exact) = direct_many([(random(0, 3, 4, device=kernel_device), 5, (), (), (), [], True)])
    assert (first.shape, second.shape, told.shape, exact.shape) == ((0, 5, 4), (0, 3, 5), (3, 0), (0,))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda one: [], ValueError, "one equation or more"),
        (lambda one: [one, (one[0].double(), *one[1:])], TypeError, "weight 1"),
        (lambda one: [(*one[:5], [1, 2, 3], True)], ValueError, "a seed for each item"),
        (lambda one: [(one[0][:, :0], *one[1:])], ValueError, "channels on both sides"),
        (lambda one: [(one[0], 2, *one[2:])], ValueError, "hidden_channels = 2"),
    ],
)
def test_refusals(change, error, match):
    with pytest.raises(error, match=match):
        direct_many(change(equations()[0]))


def test_opcheck(device):
    weights = [permuted(random(2, 5, 3, 2, device=device), (2, 0, 3, 1)), random(1, 4, 2, 1, device=device)]
    arguments = (weights, [6, 4], [1, 1, 2, 1, 1, 1], [1, 1, 1] * 2, [0] * 6, [1, 2, 3], [True] * 2, 1.0, "ieee", 0.0)
    torch.library.opcheck(torch.ops.fastmorph_kernels.direct_many.default, arguments)


def test_rows_have_as_many_numbers_as_the_kernels_count():
    two, three, five, six = (1,) * 2, (1,) * 3, (1,) * 5, (1,) * 6
    rows = {
        table.SCALE_FIELDS: ScaleRow(0, 1, five, six, (1,) * 4),
        table.FACTOR_FIELDS: FactorRow(0, (1,) * 4, two, five, three, three, six, six),
        table.SKETCH_FIELDS: SketchRow(0, 1, two, six, three, six),
        table.PRODUCT_FIELDS: ProductRow(0, three, three, three, three, two),
        table.END_FIELDS: EndRow(0, three, three, two, three, three, three, 1),
    }
    for fields, row in rows.items():
        written = Table()
        part = written.add([row, row], [3, 4])
        assert len(written.numbers) == 2 * fields
        assert (part.programs, written.numbers[fields]) == (7, 3)


@pytest.mark.parametrize("name", ["kernel", "remainder_kernel"])
def test_no_kernel_is_compiled_anew_for_another_number_of_equations(name):
    """In a file of kernels, whatever is no pointer and not known when compiling is named as not to be specialised."""
    tree = ast.parse((Path(table.__file__).parent / f"{name}.py").read_text())
    kernels = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name.endswith("_kernel")]
    assert len(kernels) == 3
    for kernel in kernels:
        (decorator,) = kernel.decorator_list
        assert isinstance(decorator, ast.Call)
        numbers = [arg.arg for arg in kernel.args.args if arg.annotation is None and not arg.arg.endswith("_ptr")]
        assert ast.literal_eval(decorator.keywords[0].value) == numbers
