"""The kernel that writes many grown tensors, bit by bit against one entry at a time, interpreted (or on a GPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastmorph_kernels import support
from fastmorph_kernels.fill import CONSTANT, DRAWN, MIRRORED, OLD, Dimension, fill
from fastmorph_kernels.fill import op as fill_op
from fastmorph_kernels.noise import SCALE, words_on_host
from fastmorph_kernels.register import OPERATORS

pytest.importorskip("triton")

from fastmorph_kernels.fill import kernel

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16


@pytest.fixture(params=["kernel", "torch"])
def device(request, kernel_device, monkeypatch) -> torch.device:
    """Where the operator runs: by kernel, and by what a CPU without the interpreter has."""
    if request.param == "kernel":
        return kernel_device
    monkeypatch.setattr(support, "interpreted", lambda: False)
    return torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = F32, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype).to(device)


def grown(dim: int, size: int, seed: int, *, leads: bool = False, shared: bool = False) -> Dimension:
    """A dimension with old indices in any order, some twice, that draw, that mirror some of these, and constants."""
    draw = np.random.default_rng(seed)
    kind = draw.permuted(np.repeat([OLD, OLD, DRAWN, MIRRORED, CONSTANT], [size, 2, 3, 2, 2]))
    place, row, shares = np.zeros_like(kind), np.zeros_like(kind), {}
    old, drawn, mirrored = (np.flatnonzero(kind == one) for one in (OLD, DRAWN, MIRRORED))
    rows = draw.permutation(size)
    place[old] = np.append(draw.permutation(size), draw.integers(0, size, 2))
    row[old] = rows[place[old]]
    place[drawn], place[mirrored], row[mirrored] = np.arange(3), np.arange(2), drawn[:2]
    if shared and not leads:
        balance = np.full(len(kind), -1)
        balance[old[:2]], balance[old[-2:]] = np.arange(2), 2**30 + np.arange(2)
        shares = {"balance": balance, "copies": 2}
    if shared:
        shares["divisor"] = draw.integers(1, 4, len(kind))
    own = {"key": int(draw.integers(2**63)) * 2 + 1, "scale": 0.3, "sign": 1 if leads else -1, "value": 0.25}
    return Dimension(dim, kind, place, row, 3, **own, leads=leads, follows=not leads, **shares)


def rounded(value, dtype: torch.dtype) -> float:
    return float(torch.tensor(float(value), dtype=F64).to(dtype))


def entry(source: torch.Tensor, dims: Sequence[Dimension], first: int, at: tuple[int, ...]) -> float:
    """One entry, from the definition; every step is taken in the dtype of products and rounded to the source's."""
    wide = np.float64 if source.dtype == F64 else np.float32

    def noise(given: Dimension, sizes: list[int], place: list[int], scale: float, copy: int = 0, copies: int = 1) -> float:
        order = [first] * (first >= 0) + [dim for dim in range(len(sizes)) if dim != first]
        sizes, place = [sizes[dim] for dim in order], [place[dim] for dim in order]
        sizes.insert(first >= 0, copies)
        place.insert(first >= 0, copy)
        number = int(np.ravel_multi_index(place, sizes))
        half = np.array(words_on_host(given.key, number // 2, number // 2 + 1)).view(np.int16)[number % 2]
        return rounded((wide(half) + wide(0.5)) * wide(SCALE * scale), source.dtype)

    def before(count: int, at: list[int]) -> float:
        """The entry when the first `count` dimensions are filled; along later ones its place is a row."""
        now = [*source.shape]
        for given in dims[: max(0, count - 1)]:
            now[given.dim] = len(given.kind)
        if not count:
            there = list(at)
            for given in dims:
                there[given.dim] = int(given.place[(given.kind == OLD) & (given.row == at[given.dim])][0])
            return float(source[tuple(there)])
        given = dims[count - 1]
        i = at[given.dim]
        there = list(at)
        if given.kind[i] == OLD:
            there[given.dim] = int(given.row[i])
            value = before(count - 1, there)
            if given.divisor is not None:
                value = rounded(wide(value) / wide(rounded(given.divisor[i], source.dtype)), source.dtype)
            if given.balance is not None and given.balance[i] >= 0:
                copy, there[given.dim] = divmod(int(given.balance[i]), 2**30)
                scale = given.scale / given.copies
                each = [noise(given, now, there, scale, c, given.copies) for c in range(given.copies)]
                total = wide(0)
                for one in each:
                    total += wide(one)
                mean = rounded(total / wide(given.copies), source.dtype)
                added = rounded(wide(each[copy]) - wide(mean), source.dtype)
                value = rounded(wide(value) + wide(added), source.dtype)
            return value
        if given.kind[i] == CONSTANT:
            return rounded(given.value, source.dtype)
        there[given.dim], now[given.dim] = int(given.place[i]), given.drawn
        sign = given.sign if given.kind[i] == MIRRORED else 1
        for other in reversed(dims[: count - 1] if given.leads else ()):
            j = there[other.dim]
            if other.follows and other.kind[j] == CONSTANT:
                return sign * rounded(other.value, source.dtype)
            if other.follows and other.kind[j] == MIRRORED:
                sign, there[other.dim] = sign * other.sign, int(other.row[j])
        return sign * noise(given, now, there, given.scale)

    return before(len(dims), list(at))


def expected(source: torch.Tensor, dims: Sequence[Dimension], first: int) -> torch.Tensor:
    sizes = list(source.shape)
    for given in dims:
        sizes[given.dim] = len(given.kind)
    values = [entry(source.cpu(), dims, first, at) for at in np.ndindex(*sizes)]
    return torch.tensor(values, dtype=F64).view(sizes).to(source.dtype)


def assert_filled(sources: Sequence[torch.Tensor], dims: Sequence[Sequence[Dimension]], first: Sequence[int]) -> None:
    out = fill(sources, dims, first)
    assert len(out) == len(sources)
    for found, source, *given in zip(out, sources, dims, first, strict=True):
        assert found.is_contiguous()
        assert found.dtype == source.dtype
        wanted = expected(source, *given)
        assert torch.equal(found.cpu(), wanted)
        assert torch.equal(found.cpu().signbit(), wanted.signbit())  # a zero has a sign


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_every_kind_of_index_in_one_dimension_and_two(dtype, device):
    source = random(3, 4, 5, dtype=dtype, device=device)
    inner, leading = grown(1, 4, 1, shared=True), grown(0, 3, 2, leads=True, shared=True)
    assert_filled([source] * 3, [[inner], [leading], [inner, leading]], [0, 0, 0])


@pytest.mark.usefixtures("poisoned_memory")
def test_many_tensors_of_many_shapes_and_dtypes_keep_their_order(device):
    sources, dims, first = [], [], []
    for k, (dtype, shape) in enumerate([(F32, (3,)), (F64, (2, 3)), (F32, (2, 3, 2)), (F32, (1, 2, 2, 3)), (F64, (7,))]):
        sources.append(random(*shape, dtype=dtype, device=device, seed=k))
        last = len(shape) - 1
        dims.append([grown(last, shape[last], k, shared=k == 2)])
        first.append(0 if last else -1)
        if k == 1:
            dims[-1].append(grown(0, 2, 20 + k, leads=True))
    assert_filled(sources, dims, first)


def test_noise_is_counted_through_any_dimension_first(device):
    source = random(2, 3, 4, device=device)
    one, two = grown(2, 4, 1, shared=True), grown(0, 2, 2, shared=True)
    both, dims = [one, two], grown(1, 3, 3, leads=True)
    assert_filled([source] * 4, [both, both, [*both, dims], [one, dims]], [-1, 1, 1, 1])


def test_permuted_sliced_and_expanded_sources(device):
    whole = random(6, 4, 5, device=device)
    sources = [whole.permute(2, 0, 1), whole[1::2, :, ::3], whole[:1].expand(3, -1, -1), whole.mT[:, 2:]]
    dims = [[grown(1, source.shape[1], 3), grown(0, len(source), 4, leads=True)] for source in sources]
    assert_filled(sources, dims, [0] * 4)


def test_several_tiles_among_small_tensors(device, monkeypatch):
    sources = [random(2, device=device), random(30, 40, 3, device=device, seed=1), random(1, 2, device=device, seed=2)]
    dims = [[grown(0, 2, 0)], [grown(1, 40, 1), grown(0, 30, 2, leads=True)], [grown(1, 2, 3)]]
    out = fill(sources, dims, [-1, 0, 0])
    monkeypatch.setattr(support, "interpreted", lambda: False)
    plain = fill([source.cpu() for source in sources], dims, [-1, 0, 0])
    assert all(torch.equal(one.cpu(), other) for one, other in zip(out, plain, strict=True))


def test_bits_of_old_entries_are_kept(device):
    bits = torch.tensor([-(2**31), 0x7FC00001, 0x7F800000, 1, -1], dtype=torch.int32, device=device)
    kind, place = np.full(6, OLD), np.array([4, 3, 2, 1, 0, 0])
    (out,) = fill([bits.view(F32)], [[Dimension(0, kind, place, place)]])
    assert torch.equal(out.view(torch.int32), bits[torch.from_numpy(place).to(device)])


def test_products_are_rounded_before_they_are_added_up(monkeypatch):
    """A compiler that joined both would give a GPU other bits; the interpreter does not show it."""
    given = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **options: given.update(options)

    monkeypatch.setattr(kernel, "_fill_kernel", Kernel())
    source, dims = random(3, 4), [grown(1, 4, 1, shared=True)]
    OPERATORS["fill"].launch([source.new_empty(3, 13)], [source], *fill_op.flat([(0, dims)]))
    assert given["enable_fp_fusion"] is False


@pytest.mark.usefixtures("poisoned_memory")
def test_empty_lists_sources_and_outputs(device):
    assert fill([], []) == []
    new = Dimension(0, np.full(2, CONSTANT), np.zeros(2, int), np.zeros(2, int), value=0.25)
    out = fill([torch.zeros(0, 3, device=device), torch.ones(0, 0, device=device)], [[new], [new]])
    assert torch.equal(out[0].cpu(), torch.full((2, 3), 0.25))
    assert out[1].shape == (2, 0)


def test_opcheck(device):
    sources = [random(3, 4, 5, device=device).mT, random(2, 2, device=device)]
    assert not sources[0].is_contiguous()
    flat = fill_op.flat([(0, [grown(1, 5, 1, shared=True)]), (0, [grown(1, 2, 2), grown(0, 2, 3, leads=True)])])
    torch.library.opcheck(torch.ops.fastmorph_kernels.fill.default, (sources, *flat))


ONE, GROWN = torch.ones(2, 3), grown(1, 3, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([ONE], []), "1 sources, 0 lists of dimensions"),
        (([ONE], [[]]), r"dimensions of source 0, 2 in all, once each, but these grow: \[\]"),
        (([ONE], [[GROWN, GROWN]]), r"these grow: \[1, 1\]"),
        (([ONE], [[replace(GROWN, dim=2)]]), r"these grow: \[2\]"),
        (([ONE], [[GROWN]], [2]), "one of its 2 dimensions, but it is 2"),
        (([ONE], [[replace(GROWN, divisor=np.ones(3, int))]]), "arrays of one size for dimension 1 of source 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fill(*arguments)


def test_indices_outside_and_wrong_dtypes_are_refused():
    with pytest.raises(IndexError, match="places of dimension 1 of source 1 run from 0 to 2, but must stay between 0 and 1"):
        fill([ONE, ONE[:, :2]], [[GROWN], [GROWN]])
    with pytest.raises(IndexError, match="between 0 and 1"):
        fill([ONE], [[replace(GROWN, drawn=2)]])
    with pytest.raises(TypeError, match=r"source 0, of torch\.int64"):
        fill([ONE.long()], [[GROWN]])
