"""The composition as a registered operator, and the validated function in front of it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..checks import Precision, check_pair, check_precision, check_tensors
from ..register import register
from ..support import frame_size, six_dimensional
from ..tiling import choose, packed


def compose(first: Tensor, second: Tensor, *, precision: Precision = "ieee") -> Tensor:
    """Return the kernel of one layer that computes what two linear layers compute: their full convolution.

        out[b, o, i, u] = sum over h, v of second[b, o, h, v] * first[b, h, i, u - v]      u in [0, K1 + K2 - 1)

    This is the morphism equation of Wei et al., "Network Morphism", ICML 2016. There are 0 (linear layers) to 3
    spatial dimensions; strides are free; a batch of 0 and channels of 0 are allowed. Sums are taken in float32, those
    of float64 tensors in float64, and rounded once to the tensors' dtype. Not differentiable.

    Args:
        first: (B, Ch, Ci, *K1), the kernel of the layer that runs first; float32, float64, bfloat16 or float16.
        second: (B, Co, Ch, *K2), the kernel of the layer that runs second; of the dtype and on the device of `first`.
        precision: how float32 products are taken; other dtypes take theirs in full.

    Returns:
        (B, Co, Ci, *(K1 + K2 - 1)), contiguous, of the dtype and on the device of the inputs.

    Raises:
        TypeError: the dtypes differ or are not supported.
        ValueError: the shapes do not fit, the devices differ, or `precision` is unknown.
    """
    check_tensors("compose", first=first, second=second)
    taken = check_precision(precision, first.dtype)
    check_pair("compose", first, second)
    out: Tensor = _compose_op(first, second, taken)
    return out


def _allocate(first: Tensor, second: Tensor, precision: str) -> Tensor:
    return first.new_empty((first.shape[0], second.shape[1], first.shape[2], *frame_size(first, second.shape[3:])))


def _launch(out: Tensor, first: Tensor, second: Tensor, precision: str) -> None:
    if out.numel() == 0:  # an empty grid is an error
        return
    from .kernel import launch_compose

    config = choose("compose", out.dtype, precision, out.device, out.shape[1], out.shape[2], out[:, 0, 0].numel())
    first, second = packed(six_dimensional(first), 1, config.pack), packed(six_dimensional(second), 2, config.pack)
    launch_compose(first, second, six_dimensional(out), precision=precision, config=config)


def _plain(out: Tensor, first: Tensor, second: Tensor, precision: str) -> None:
    out.copy_(compose_torch(six_dimensional(first), six_dimensional(second)).view(out.shape))


def compose_torch(first: Tensor, second: Tensor) -> Tensor:
    """The composition of kernels with three spatial dimensions, in float64.

    One batched matrix product for each tap of `second`, added to the part of the result to which it shifts `first`.
    """
    frame = frame_size(first, second.shape[3:])
    total = first.new_zeros((first.shape[0], second.shape[1], first.shape[2], *frame), dtype=torch.float64)
    columns = first.double().flatten(2)  # (B, Ch, Ci * |K1|)
    size_x, size_y, size_z = first.shape[3:]
    for x, y, z in itertools.product(*map(range, second.shape[3:])):
        tap = second[..., x, y, z].double()  # (B, Co, Ch)
        product = (tap @ columns).reshape(*tap.shape[:2], *first.shape[2:])  # (B, Co, Ci, *K1)
        total[..., x : x + size_x, y : y + size_y, z : z + size_z] += product
    return total


_compose_op = register("compose", allocate=_allocate, launch=_launch, plain=_plain)
