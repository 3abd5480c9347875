"""What the tests of the product kernels share: random kernels, their awkward views, numpy float64 oracles and the bound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from fastmorph_kernels import support
from fastmorph_kernels.configs import shipped
from numpy.typing import NDArray

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
# The interpreter multiplies bfloat16 wrongly (triton#11584): there, compiling it is all that is checked.
DTYPES = [F16, F32, F64] if support.interpreted() else [F16, F32, F64, BF16]
Size = tuple[int, ...]

# batch, Co, Ch, Ci, K1, K2
SHAPES = [
    pytest.param(2, 63, 33, 17, (), (), id="linear"),
    pytest.param(1, 5, 7, 9, (5,), (3,), id="1d"),
    pytest.param(3, 7, 5, 3, (3, 2), (2, 3), id="2d"),
    pytest.param(2, 1, 1, 1, (1, 7), (3, 1), id="2d-one-channel"),
    pytest.param(1, 17, 35, 33, (2, 2), (2, 1), id="2d-ragged"),
    pytest.param(2, 4, 3, 5, (2, 3, 1), (2, 2, 3), id="3d"),
]
# Every shape in the dtype that hides least, every dtype in one shape.
SHAPES_AND_DTYPES = [pytest.param(*shape.values, F64, id=shape.id) for shape in SHAPES]
SHAPES_AND_DTYPES += [pytest.param(*SHAPES[2].values, dtype, id=f"2d-{dtype}") for dtype in DTYPES if dtype != F64]


def random(*sizes: int, dtype: torch.dtype = F32, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same ones in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes, generator=generator, dtype=F64).to(device, dtype)


def permuted(kernel: torch.Tensor) -> torch.Tensor:
    """The same kernel, dense, with its dimensions in another order in memory."""
    order = [*range(3, kernel.ndim), 1, 0, 2]
    back = [order.index(dim) for dim in range(kernel.ndim)]
    view = kernel.permute(order).contiguous().permute(back)
    assert not view.is_contiguous()
    return view


def sliced(kernel: torch.Tensor) -> torch.Tensor:
    """The same kernel, with gaps of NaN between its numbers."""
    around = kernel.new_full([2 * size + 1 for size in kernel.shape], torch.nan)
    view = around[tuple(slice(1, None, 2) for _ in kernel.shape)]
    return view.copy_(kernel)


def compose_numpy(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """The definition, one tap of each kernel at a time."""
    k1, k2 = first.shape[3:], second.shape[3:]
    sizes = [a + b - 1 for a, b in zip(k1, k2, strict=True)]
    out = np.zeros((first.shape[0], second.shape[1], first.shape[2], *sizes))
    for t in np.ndindex(k1):
        for v in np.ndindex(k2):
            u = tuple(a + b for a, b in zip(t, v, strict=True))
            out[(..., *u)] += np.einsum("boh,bhi->boi", second[(..., *v)], first[(..., *t)])
    return out


def system_numpy(first: NDArray[np.float64], k2: Size) -> NDArray[np.float64]:
    """The matrix A of F2 A = G, (B, |K2| * Ch, |N| * Ci), rows and columns tap by tap: `first` at each place of the frame."""
    batch, hidden, inputs = first.shape[:3]
    k1 = first.shape[3:]
    frame = [a + b - 1 for a, b in zip(k1, k2, strict=True)]
    out = np.zeros((batch, *k2, hidden, *frame, inputs))
    for v in np.ndindex(*k2):
        for w in np.ndindex(*k1):
            u = tuple(a + b for a, b in zip(v, w, strict=True))
            out[(slice(None), *v, slice(None), *u)] = first[(..., *w)]
    return out.reshape(batch, math.prod(k2) * hidden, math.prod(frame) * inputs)


def framed(weight: torch.Tensor, before: Size, frame: Size) -> NDArray[np.float64]:
    """A weight in its frame of zeros."""
    out = np.zeros((*weight.shape[:3], *frame))
    box = tuple(slice(start, start + size) for start, size in zip(before, weight.shape[3:], strict=True))
    out[(..., *box)] = numpy(weight)
    return out


def numpy(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().double().numpy()


def befores(frame: Size, kernel: Size) -> list[Size]:
    """Every count of zeros in front of a kernel that lies in a frame."""
    return list(itertools.product(*(range(n - k + 1) for n, k in zip(frame, kernel, strict=True))))


def assert_within(
    out: torch.Tensor, exact: NDArray[np.float64], magnitude: NDArray[np.float64], terms: int, dtype: torch.dtype
) -> None:
    """Hold `out` to the error bound of its sums of `terms` products of tensors of `dtype`, whatever their order.

    Such a sum, each operation rounded by at most u = eps / 2, is off by at most about terms * u * magnitude, where
    magnitude is the sum of the absolute values. The oracle may be off by as much in float64, which makes terms * eps;
    rounding to the output's dtype adds eps of that dtype times the result, or less than its smallest number.
    """
    eps = torch.finfo(F64 if dtype == F64 else F32).eps
    info = torch.finfo(out.dtype)
    bound = (terms * eps + info.eps) * magnitude + info.smallest_normal * info.eps
    assert out.shape == exact.shape
    error = abs(numpy(out) - exact)
    assert (error <= bound).all(), f"off by {np.nanmax(error / bound)} times the bound (or nan)"  # a nan fails too


def every_config(kernel: str) -> pytest.MarkDecorator:
    """Parametrise a test by `entry`, each product configuration that a kernel's table ships, at dtypes that run here.

    With channels a little off one tile, or two of the small ones, of which more would take long.
    """
    entries = [e for e in shipped(kernel) if e.dtype in DTYPES and "block_k" in e.config]
    ids = [f"{e.device}-{e.dtype}-{e.variant}" for e in entries]
    channels = [(15, 33) if e.variant == "small" else (63, 65) for e in entries]
    return pytest.mark.parametrize(
        ("entry", "rows", "columns"), [(e, *c) for e, c in zip(entries, channels, strict=True)], ids=ids
    )
