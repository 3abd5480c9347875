"""The kernels for Anderson's memory against numpy float64, interpreted (or on a GPU), and their operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fastmorph_kernels import anderson_gram as gram
from fastmorph_kernels import anderson_update as update
from fastmorph_kernels import support
from fastmorph_kernels.anderson.op import MOST
from numpy.typing import NDArray

pytest.importorskip("triton")

from fastmorph_kernels.anderson.kernel import AndersonConfig, launch_gram, launch_total, launch_update, stretches_of
from fastmorph_kernels.configs import shipped

F32, F64 = torch.float32, torch.float64
SMALL = AndersonConfig(block_n=16, num_warps=4, num_stages=1, tiles=2)
# batch, m, N: within a tile, ragged, several stretches, and more of them than one tile of their addition holds
SHAPES = [(1, 1, 1), (2, 3, 33), (3, 20, 65), (1, 32, 31), (1, 2, 2100)]


def random(*shape: int, dtype: torch.dtype = F64, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(device, dtype)


def memories(batch: int, memory: int, size: int, dtype: torch.dtype = F64, device: torch.device | str = "cpu"):
    """images, moves, image, move."""
    shapes = [(batch, memory, size)] * 2 + [(batch, size)] * 2
    return [random(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)]


def doubles(*tensors: torch.Tensor) -> list[NDArray[np.float64]]:
    return [x.detach().cpu().double().numpy() for x in tensors]


def assert_gram(out: torch.Tensor, moves: torch.Tensor, move: torch.Tensor) -> None:
    """Sums of N products in any order are off by at most N u |moves| |moves|^T, u = eps / 2; twice that, for the oracle's."""
    rows, last = doubles(moves, move)
    both = np.concatenate([rows, last[:, None]], 1).swapaxes(1, 2)
    bound = max(1, rows.shape[2]) * torch.finfo(out.dtype).eps * (abs(rows) @ abs(both))
    assert out.shape == bound.shape
    error = abs(out.cpu().double().numpy() - rows @ both)
    assert (error <= bound).all(), f"off by {np.nanmax(error / bound)} times the bound (or nan)"  # a nan fails too


def assert_update(out: torch.Tensor, image: torch.Tensor, images: torch.Tensor, share: torch.Tensor) -> None:
    """As above: m products and one term more."""
    first, rows, weights = doubles(image, images, share)
    error = abs(out.cpu().double().numpy() - (first - np.einsum("bm,bmn->bn", weights, rows)))
    magnitude = abs(first) + np.einsum("bm,bmn->bn", abs(weights), abs(rows))
    bound = (images.shape[1] + 1) * torch.finfo(out.dtype).eps * magnitude
    assert out.shape == image.shape
    assert (error <= bound).all(), f"off by {np.nanmax(error / bound)} times the bound (or nan)"


def run_gram(moves, move, config=SMALL, accumulate=None) -> torch.Tensor:
    """The kernels themselves, through NaN."""
    batch, memory, _ = moves.shape
    shape, dtype = (batch, stretches_of(moves, config), memory, memory + 1), accumulate or moves.dtype
    partial = torch.full(shape, torch.nan, dtype=dtype, device=moves.device)
    launch_gram(moves, move, partial, config=config)
    out = torch.full_like(partial[:, 0], torch.nan)
    launch_total(partial, out)
    return out


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("batch", "memory", "size"), SHAPES)
def test_gram_matches_numpy(batch, memory, size, dtype, kernel_device):
    _, moves, _, move = memories(batch, memory, size, dtype, kernel_device)
    assert_gram(run_gram(moves, move), moves, move)


def test_float64_sums_of_float32(kernel_device):
    _, moves, _, move = memories(1, 3, 70, F32, kernel_device)
    assert_gram(run_gram(moves, move, accumulate=F64), moves, move)  # to float64's bound


@pytest.mark.parametrize("entry", [pytest.param(e, id=f"{e.device}-{e.dtype}-{e.variant}") for e in shipped("anderson")])
def test_every_config(entry, kernel_device):
    config = AndersonConfig(**entry.config)
    images, moves, image, move = memories(1, 20, 1100, entry.dtype, kernel_device)
    if entry.variant == "gram":
        assert_gram(run_gram(moves, move, config), moves, move)
    else:
        share, out = random(1, 20, dtype=entry.dtype, device=kernel_device), torch.full_like(image, torch.nan)
        launch_update(image, images, share, out, config=config)
        assert_update(out, image, images, share)


def test_gram_does_not_depend_on_the_batch(kernel_device):
    _, moves, _, move = memories(3, 4, 70, F32, kernel_device)
    whole = run_gram(moves, move)
    assert torch.equal(whole[1:2], run_gram(moves[1:2], move[1:2]))
    assert torch.equal(whole[:, :, :4], whole[:, :, :4].mT)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("batch", "memory", "size"), SHAPES)
def test_update_matches_numpy(batch, memory, size, dtype, kernel_device):
    images, _, image, _ = memories(batch, memory, size, dtype, kernel_device)
    share = random(batch, memory, dtype=dtype, device=kernel_device, seed=9)
    out = torch.full_like(image, torch.nan)
    launch_update(image, images, share, out, config=SMALL)
    assert_update(out, image, images, share)


def test_strided_tensors(kernel_device):
    def strided(tensor: torch.Tensor) -> torch.Tensor:
        """Equal, its dimensions in memory in reverse and with gaps."""
        wide = torch.full((*tensor.shape[:0:-1], 2 * len(tensor)), torch.nan, dtype=tensor.dtype, device=tensor.device)
        view = wide.permute(*range(tensor.ndim - 1, -1, -1))[1::2]
        return view.copy_(tensor)

    images, moves, image, move = memories(2, 3, 37, F64, kernel_device)
    assert not strided(images).is_contiguous()
    assert torch.equal(run_gram(strided(moves), strided(move)), run_gram(moves, move))
    share = random(2, 3, device=kernel_device)
    around = torch.full((37, 5), torch.nan, dtype=F64, device=kernel_device)
    launch_update(strided(image), strided(images), strided(share), around.mT[1:4:2], config=SMALL)
    assert_update(around.mT[1:4:2], image, images, share)
    assert int(around.isfinite().sum()) == 2 * 37


@pytest.fixture(params=["kernel", "torch"])
def device(request, kernel_device, monkeypatch) -> torch.device:
    """Where the operators run: by kernel, and by what a CPU without the interpreter has."""
    if request.param == "kernel":
        return kernel_device
    monkeypatch.setattr(support, "interpreted", lambda: False)
    return torch.device("cpu")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("batch", "memory", "size"), [(0, 2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1), (2, 20, 33)])
def test_operators_with_small_and_empty_sizes(batch, memory, size, dtype, device):
    images, moves, image, move = memories(batch, memory, size, dtype, device)
    assert_gram(gram(moves, move), moves, move)
    assert_gram(gram(moves, move, accumulate=F64), moves, move)
    share = random(batch, memory, dtype=dtype, device=device, seed=9)
    assert_update(update(image, images, share), image, images, share)


def test_opcheck(device):
    images, moves, image, move = memories(2, 3, 8, F32, device)
    moves, images = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (moves, images))  # dense, and not contiguous
    assert not moves.is_contiguous()
    share = random(3, 2, dtype=F32, device=device).mT
    torch.library.opcheck(torch.ops.fastmorph_kernels.anderson_gram.default, (moves, move, F64))
    torch.library.opcheck(torch.ops.fastmorph_kernels.anderson_update.default, (image.mT.contiguous().mT, images, share))


# aot_eager traces as inductor does and needs no C++ compiler. Sizes that are equal by chance would become a guard.
def test_compiles_into_one_graph_for_every_shape(kernel_device):
    def step(images, moves, image, move):
        return update(image, images, gram(moves, move)[:, :, -1])

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, memory, size in ((3, 5, 8), (2, 4, 6)):
        given = memories(batch, memory, size, F64, kernel_device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            out = compiled(*given)
        assert torch.equal(out, step(*given))


def zeros(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gram(*zeros((1, 33, 4), (1, 4))), r"at most 32 differences, but has shape \(1, 33, 4\)"),
        (lambda: gram(*zeros((1, 3), (1, 4))), r"memory \(B, m, N\)"),
        (lambda: gram(*zeros((1, 3, 4), (1, 5))), r"gram needs move \(B, N\) for a memory \(1, 3, 4\)"),
        (lambda: gram(torch.zeros(1, 3, 4), torch.zeros(1, 4, device="meta")), "on meta"),
        (lambda: update(*zeros((1, 4), (1, 3, 4), (1, 2))), r"a share for each of the differences \(1, 3\)"),
    ],
)
def test_wrong_tensors_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"torch\.float32, torch\.float64: convert"):
        gram(torch.zeros(1, 3, 4), torch.zeros(1, 4, dtype=F64))
    with pytest.raises(TypeError, match=r"accumulate is torch\.float32"):
        gram(torch.zeros(1, 3, 4, dtype=F64), torch.zeros(1, 4, dtype=F64), accumulate=F32)
    with pytest.raises(TypeError, match=r"a share of dtype torch\.float32"):
        update(torch.zeros(1, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=F64))


def test_a_memory_fits_into_one_tile():
    assert MOST == 32
