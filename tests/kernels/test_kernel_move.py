"""The kernel that moves the entries of many weights, bit by bit against numpy, interpreted (or on a GPU), and its operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastmorph_kernels import move, support
from numpy.typing import NDArray

pytest.importorskip("triton")

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
NOTHING = (None, None, None)
UNSCALED = (None, None)


@pytest.fixture(params=["kernel", "torch"])
def device(request, kernel_device, monkeypatch) -> torch.device:
    """Where the operator runs: by kernel, and by what a CPU without the interpreter has."""
    if request.param == "kernel":
        return kernel_device
    monkeypatch.setattr(support, "interpreted", lambda: False)
    return torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = F32, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, shape, generator=generator, dtype=dtype).to(device)
    return torch.randn(shape, generator=generator, dtype=F64).to(device, dtype)


def some(length: int, size: int, seed: int = 0) -> torch.Tensor:
    """Indices into `size` places, a fifth of them -1; repeats and any order."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(size, (length,), generator=generator)
    return torch.where(torch.rand(length, generator=generator) < 0.2, -1, index)


def array(tensor: torch.Tensor) -> NDArray[np.generic]:
    return (tensor.float() if tensor.dtype == BF16 else tensor).cpu().numpy()


def oracle(source, index, scale) -> torch.Tensor:
    """An entry at a time; each product rounded in the dtype of products, the last once more to the source's."""
    given = array(source)
    index = [np.arange(size) if one is None else one.numpy() for one, size in zip(index, source.shape, strict=True)]
    kind = np.float64 if source.dtype == F64 else np.float32
    scale = [None if one is None else array(one).astype(kind) for one in scale]
    out = np.zeros([len(one) for one in index], dtype=given.dtype if all(one is None for one in scale) else kind)
    for place in np.ndindex(*out.shape):
        origin = tuple(int(one[p]) for one, p in zip(index, place, strict=True))
        if min(origin) >= 0:
            value = given[origin]
            for one, p in zip(scale, place, strict=False):
                value = value if one is None else kind(value) * one[p]
            out[place] = value
    return torch.from_numpy(out).to(source.dtype)


def assert_moved(out, sources, indices, scales) -> None:
    assert len(out) == len(sources)
    for found, *given in zip(out, sources, indices, scales, strict=True):
        expected = oracle(*given)
        assert found.dtype == expected.dtype
        assert found.is_contiguous()
        assert found.shape == expected.shape
        assert torch.equal(found.cpu(), expected)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
def test_gathers_and_scales(dtype, device):
    source = random(5, 7, 9, dtype=dtype, device=device)
    index = (some(11, 5, 1), some(13, 7, 2), some(15, 9, 3))  # more than one tile
    scale = (random(11, dtype=dtype, device=device), random(13, dtype=F32, device=device, seed=1))
    for given in ((None, None), scale, (scale[0], None), (None, scale[1])):
        assert_moved(move([source], [index], [given]), [source], [index], [given])


@pytest.mark.usefixtures("poisoned_memory")
def test_many_weights_of_many_dtypes_and_sizes_keep_their_order(device):
    generator = torch.Generator().manual_seed(5)
    sources, indices, scales = [], [], []
    for k, dtype in enumerate([F32, F64, torch.int64, F32, torch.int16, F16, F32, torch.int32, BF16, F32, F64]):
        sizes = [int(size) for size in torch.randint(1, 9, (3,), generator=generator)]
        lengths = [int(size) for size in torch.randint(1, 14, (3,), generator=generator)]
        index = [some(lengths[d], sizes[d], 7 * k + d) if (k + d) % 3 else None for d in range(3)]
        out = [size if one is None else length for one, length, size in zip(index, lengths, sizes, strict=True)]
        scaled = dtype.is_floating_point and k % 2
        sources.append(random(*sizes, dtype=dtype, device=device, seed=k))
        indices.append(tuple(index))
        scales.append(tuple(random(n, device=device, seed=k) if scaled else None for n in out[:2]))
    assert_moved(move(sources, indices, scales), sources, indices, scales)


def test_one_large_weight_among_small_ones(device):
    sources = [random(2, 3, 1, device=device), random(50, 30, 3, device=device, seed=1), random(1, 1, 1, device=device, seed=2)]
    indices, scales = [NOTHING] * 3, [UNSCALED] * 3
    assert_moved(move(sources, indices, scales), sources, indices, scales)


def test_nothing_to_change_is_a_copy(device):
    source = random(3, 4, 5, device=device)
    (out,) = move([source], [NOTHING], [UNSCALED])
    assert torch.equal(out, source)
    assert out.data_ptr() != source.data_ptr()


def test_kernel_growth_puts_zeros_around(device):
    source = random(3, 2, 9, device=device)
    taps = torch.nn.functional.pad(torch.arange(9).view(3, 3), (1, 1, 1, 1), value=-1).flatten()
    (out,) = move([source], [(None, None, taps)], [UNSCALED])
    expected = torch.nn.functional.pad(source.view(3, 2, 3, 3), (1, 1, 1, 1))
    assert torch.equal(out.view(3, 2, 5, 5), expected)


@pytest.mark.parametrize("dtype", [F32, torch.int64], ids=str)
def test_permuted_sliced_and_expanded_sources(dtype, device):
    whole = random(9, 5, 8, dtype=dtype, device=device)
    sources = [whole.permute(2, 0, 1), whole[1::2, :, ::3], whole[:1].expand(4, -1, -1), whole.mT[:, 2:]]
    indices = [(some(6, s.shape[0]), None, some(7, s.shape[2], 1)) for s in sources]
    scales = [UNSCALED] * 4
    assert_moved(move(sources, indices, scales), sources, indices, scales)


def test_absent_entries_are_zero_whatever_their_scale(device):
    source = torch.full((2, 1, 1), torch.inf, device=device)
    scale = torch.tensor([torch.nan, 2.0, torch.inf], device=device)
    (out,) = move([source], [(torch.tensor([-1, 1, -1]), None, None)], [(scale, None)])
    assert out.flatten().tolist() == [0.0, torch.inf, 0.0]


def test_bits_are_kept_without_a_scale(device):
    bits = torch.tensor([-(2**31), 0x7FC00001, 0x7F800001, 1, -1], dtype=torch.int32, device=device).view(5, 1, 1)
    floats, integers = move([bits.view(F32), bits], [NOTHING] * 2, [UNSCALED] * 2)
    assert torch.equal(floats.view(torch.int32), bits)
    assert torch.equal(integers, bits)


@pytest.mark.usefixtures("poisoned_memory")
def test_empty_lists_sources_and_outputs(device):
    assert move([], [], []) == []
    sources = [torch.zeros(0, 3, 2, device=device), torch.ones(2, 0, 1, device=device), torch.ones(2, 3, 4, device=device)]
    absent, none = torch.tensor([-1, -1]), torch.zeros(0, dtype=torch.int64)
    indices = [(absent, None, None), NOTHING, (none, None, torch.tensor([3]))]
    out = move(sources, indices, [UNSCALED] * 3)
    assert torch.equal(out[0].cpu(), torch.zeros(2, 3, 2))
    assert [x.shape for x in out[1:]] == [(2, 0, 1), (0, 3, 1)]


@pytest.mark.parametrize(("place", "bad"), [(0, 3), (1, -2), (2, 9)])
def test_indices_outside_the_source_are_refused(place, bad, device):
    index = [None, None, None]
    index[place] = torch.tensor([0, bad, -1])
    with pytest.raises(IndexError, match=f"index_{'oit'[place]} of source 1 runs .* between -1 and {2 + place}"):
        move([random(3, 4, 5, device=device)] * 2, [NOTHING, tuple(index)], [UNSCALED] * 2)


def test_opcheck(device):
    sources = [random(3, 4, 5, device=device).mT, random(2, 2, 1, device=device)]
    assert not sources[0].is_contiguous()
    indices = [some(4, 3), None, some(6, 4), None, None, None]
    scales = [None, random(5, device=device), random(2, device=device), None]
    torch.library.opcheck(torch.ops.fastmorph_kernels.move.default, (sources, indices, scales))


# aot_eager traces as inductor does and needs no C++ compiler. Sizes that are equal by chance would become a guard.
def test_compiles_into_one_graph_for_every_shape(kernel_device):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda source, index, scale: move([source, source * 2], [(index, None, None), NOTHING], [(scale, None), UNSCALED]),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for sizes, length in (((4, 5, 6), 7), ((3, 2, 8), 9)):
        source, scale = random(*sizes, device=kernel_device), random(length, device=kernel_device)
        index = some(length, sizes[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(source, index, scale)
        assert_moved(out, [source, source * 2], [(index, None, None), NOTHING], [(scale, None), UNSCALED])


ONE = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([ONE], [], [UNSCALED]), "1 sources, 0 indices and 1 scales"),
        (([ONE[0]], [NOTHING], [UNSCALED]), r"source 0 has shape \(3, 4\): view it"),
        (([ONE], [(torch.zeros(1), None, None)], [UNSCALED]), "index_o of source 0 .* int64 on the CPU"),
        (([ONE], [(None, torch.zeros(1, 1, dtype=torch.int64), None)], [UNSCALED]), "index_i of source 0 as one dimension"),
        (([ONE], [(None, None, torch.zeros(1, dtype=torch.int64, device="meta"))], [UNSCALED]), "on meta: use .*cpu"),
        (([ONE], [NOTHING], [(torch.ones(3), None)]), "scale_o of source 0 with 2 entries on cpu"),
        (([ONE], [(None, torch.zeros(5, dtype=torch.int64), None)], [(None, torch.ones(3))]), "scale_i of source 0 with 5"),
        (([torch.ones(1, 1, 1).expand(1, 2**15, 2**15)], [NOTHING], [UNSCALED]), "2\\^30 are too many"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        move(*arguments)


def test_wrong_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"source 0, of torch\.bool"):
        move([torch.ones(1, 1, 1, dtype=torch.bool)], [NOTHING], [UNSCALED])
    with pytest.raises(TypeError, match=r"source 0 has torch\.int32 and its scale torch\.float32"):
        move([torch.ones(1, 1, 1, dtype=torch.int32)], [NOTHING], [(torch.ones(1), None)])
