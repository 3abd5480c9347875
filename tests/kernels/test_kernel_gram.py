"""The kernels of the two Gram matrices against numpy float64, interpreted or on a GPU, and their operators."""

from __future__ import annotations

import math

import pytest
import torch
from fastmorph_kernels import column_gram, row_gram, support

pytest.importorskip("triton")

from fastmorph_kernels import tiling
from fastmorph_kernels.column_gram import kernel as column_kernel
from fastmorph_kernels.column_gram import op as column_op
from fastmorph_kernels.row_gram import kernel as row_kernel
from fastmorph_kernels.row_gram import op as row_op
from kernel_oracle import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    assert_within,
    every_config,
    numpy,
    permuted,
    random,
    sliced,
    system_numpy,
)

# batch, Ch, Ci, K1, K2
SHAPES = [
    pytest.param(2, 33, 17, (), (), id="linear"),
    pytest.param(2, 7, 9, (3,), (2,), id="1d"),
    pytest.param(1, 3, 2, (2,), (4,), id="1d-lags-without-overlap"),
    pytest.param(2, 1, 1, (1, 2), (2, 2), id="2d-one-channel"),
    pytest.param(1, 19, 21, (2, 2), (2, 1), id="2d-ragged"),
    pytest.param(1, 3, 2, (1, 1, 2), (2, 2, 1), id="3d"),
]
SHAPES_AND_DTYPES = [pytest.param(*shape.values, F64, id=shape.id) for shape in SHAPES]
SHAPES_AND_DTYPES += [pytest.param(*SHAPES[2].values, dtype, id=f"1d-{dtype}") for dtype in DTYPES if dtype != F64]
MATRICES = [pytest.param(row_gram, id="rows"), pytest.param(column_gram, id="columns")]


def assert_close(operator, out: torch.Tensor, first: torch.Tensor, k2: tuple[int, ...]) -> None:
    """An entry is a sum of Ci * |K1| products at most, or of Ch * |K2|, some of which are added up twice."""
    system = system_numpy(numpy(first), k2)
    if operator is column_gram:
        system = system.swapaxes(1, 2)
    hidden, inputs, *k1 = first.shape[1:]
    terms = inputs * math.prod(k1) if operator is row_gram else hidden + math.prod(k2)
    exact, magnitude = system @ system.swapaxes(1, 2), abs(system) @ abs(system).swapaxes(1, 2)
    assert_within(out, exact, magnitude, terms, first.dtype)
    assert out.dtype == (F64 if first.dtype == F64 else F32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("operator", MATRICES)
@pytest.mark.parametrize(("batch", "hidden", "inputs", "k1", "k2", "dtype"), SHAPES_AND_DTYPES)
def test_kernel_matches_numpy(operator, batch, hidden, inputs, k1, k2, dtype, kernel_device):
    first = random(batch, hidden, inputs, *k1, dtype=dtype, device=kernel_device)
    assert_close(operator, operator(first, k2), first, k2)


@every_config("row_gram")
def test_every_config_of_the_rows(entry, rows, columns, kernel_device, monkeypatch):
    monkeypatch.setattr(row_op, "choose", lambda *_, **__: tiling.TileConfig(**entry.config))
    first = random(1, columns, 19, 2, dtype=entry.dtype, device=kernel_device)
    assert_close(row_gram, row_gram(first, (2,)), first, (2,))


@every_config("column_gram")
def test_every_config_of_the_columns(entry, rows, columns, kernel_device, monkeypatch):
    monkeypatch.setattr(column_op, "choose", lambda *_, **__: tiling.TileConfig(**entry.config))
    first = random(1, 19, columns, 2, dtype=entry.dtype, device=kernel_device)
    assert_close(column_gram, column_gram(first, (2,)), first, (2,))


# Large tiles have no registers to spare for the addresses of an output that is not aligned.
def test_rows_of_an_odd_size_take_no_large_tiles(kernel_device, monkeypatch):
    chosen = []
    monkeypatch.setattr(row_op, "choose", lambda *a, **k: chosen.append(tiling.choose(*a, **k)) or chosen[-1])
    for channels in (144, 145):
        row_gram(random(1, channels, 1, device=kernel_device), ())
    assert chosen[0].block_m > chosen[1].block_m


@pytest.mark.parametrize("operator", MATRICES)
def test_is_symmetric(operator, kernel_device):
    first = random(2, 21, 19, 2, dtype=F32, device=kernel_device)
    out = operator(first, (2,))
    assert_close(operator, out.mT.contiguous(), first, (2,))
    blocks = torch.arange(out.shape[1], device=kernel_device) // (21 if operator is row_gram else 19)
    elsewhere = blocks[:, None] != blocks[None, :]
    assert (out == out.mT)[:, elsewhere].all()


@pytest.mark.parametrize("operator", MATRICES)
def test_permuted_and_sliced_input(operator, kernel_device):
    first = random(2, 5, 4, 2, 2, device=kernel_device)
    for view in (permuted, sliced):
        assert_close(operator, operator(view(first), (2, 1)), first, (2, 1))


@pytest.mark.parametrize("operator", MATRICES)
def test_offsets_of_64_bits(operator, kernel_device, monkeypatch):
    for module in (row_kernel, column_kernel):
        monkeypatch.setattr(module, "is_wide", lambda *_, **__: True)
    first = random(2, 5, 4, 2, 2, device=kernel_device)
    assert_close(operator, operator(first, (2, 1)), first, (2, 1))


@pytest.mark.parametrize("operator", MATRICES)
def test_equal_inputs_give_equal_bits(operator, kernel_device):
    first = random(2, 20, 17, 2, device=kernel_device)
    assert operator(first, (2,)).equal(operator(first, (2,)))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("operator", MATRICES)
@pytest.mark.parametrize(("batch", "hidden", "inputs"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1)])
@pytest.mark.parametrize("interpreted", [True, False])
def test_small_and_empty_sizes(operator, batch, hidden, inputs, interpreted, kernel_device, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(support, "interpreted", lambda: False)
    first = random(batch, hidden, inputs, 3, device=kernel_device if interpreted else "cpu")
    assert_close(operator, operator(first, (2,)), first, (2,))


# What a CPU without the interpreter runs.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("operator", MATRICES)
@pytest.mark.parametrize("dtype", [F16, F32, F64, BF16], ids=str)
@pytest.mark.parametrize(("batch", "hidden", "inputs", "k1", "k2"), SHAPES)
def test_fallback_matches_numpy(operator, batch, hidden, inputs, k1, k2, dtype, monkeypatch):
    monkeypatch.setattr(support, "interpreted", lambda: False)
    first = random(batch, hidden, inputs, *k1, dtype=dtype)
    assert_close(operator, operator(first, k2), first, k2)


@pytest.mark.parametrize("name", ["row_gram", "column_gram"])
@pytest.mark.parametrize("interpreted", [True, False])
def test_opcheck(name, interpreted, kernel_device, monkeypatch):
    if not interpreted:
        monkeypatch.setattr(support, "interpreted", lambda: False)
    first = random(2, 3, 4, 2, 1, device=kernel_device if interpreted else "cpu")
    torch.library.opcheck(getattr(torch.ops.fastmorph_kernels, name).default, (permuted(first), [1, 2], "ieee"))


# aot_eager traces as inductor does and needs no C++ compiler. Sizes that are equal by chance would become a guard.
@pytest.mark.parametrize("operator", MATRICES)
def test_compiles_into_one_graph_for_every_shape(operator, kernel_device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda first: operator(first, (2,)) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((2, 5, 4, 3), (3, 4, 5, 2)):
        first = random(*sizes, device=kernel_device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(operator, compiled(first) / 2, first, (2,))


@pytest.mark.parametrize("operator", MATRICES)
def test_wrong_arguments_are_refused(operator):
    name = operator.__name__
    with pytest.raises(ValueError, match=rf"{name} needs first .* it has shape \(2, 3\)"):
        operator(torch.zeros(2, 3), ())
    with pytest.raises(ValueError, match=rf"{name} needs a kernel size k2 of 1 numbers, .* but k2 is \(2, 2\)"):
        operator(torch.zeros(1, 2, 3, 3), (2, 2))
    with pytest.raises(TypeError, match=r"first has torch\.int64"):
        operator(torch.zeros(1, 2, 3, dtype=torch.int64), ())
    with pytest.raises(ValueError, match="precision must be one of ieee"):
        operator(torch.zeros(1, 2, 3), (), precision="fp8")
