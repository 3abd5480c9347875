"""The residual of a pair of kernels as a registered operator, and the validated function in front of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import Precision, check_pair, check_place, check_precision, check_tensors
from ..compose.op import compose_torch
from ..register import register
from ..support import frame_size, six_dimensional, three
from ..tiling import choose, packed


def residual(
    first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], *, precision: Precision = "ieee"
) -> tuple[Tensor, Tensor]:
    """Return what is left of a weight when the composition of two kernels is taken from it, and its squared norm.

        error[b, o, i, u] = weight[b, o, i, u - before] - compose(first, second)[b, o, i, u]      u in [0, K1 + K2 - 1)

    The weight stands behind `before` zeros in the frame of the composition, which is never stored: error and norm come in
    the pass that composes. Squares are of the errors before they are rounded to the tensors' dtype, and summed in float64.
    Sums are otherwise those of `compose`. Not differentiable.

    Args:
        first: (B, Ch, Ci, *K1), the kernel of the layer that runs first; float32, float64, bfloat16 or float16.
        second: (B, Co, Ch, *K2), the kernel of the layer that runs second.
        weight: (B, Co, Ci, *K), the kernel that the two replace. All three have one dtype and are on one device.
        before: zeros in front of the weight, one count for each spatial dimension; before + K <= K1 + K2 - 1.
        precision: how float32 products are taken; other dtypes take theirs in full.

    Returns:
        error (B, Co, Ci, *(K1 + K2 - 1)), contiguous, of the inputs' dtype, and its squared Frobenius norm (B,), float64.

    Raises:
        TypeError: the dtypes differ or are not supported.
        ValueError: the shapes do not fit, the devices differ, or `precision` is unknown.
    """
    check_tensors("residual", first=first, second=second, weight=weight)
    check_pair("residual", first, second)
    if weight.ndim != first.ndim or weight.shape[:3] != (first.shape[0], second.shape[1], first.shape[2]):
        raise ValueError(
            "residual needs a weight (B, Co, Ci, *K) with the batch, the output channels of second and the input channels "
            f"of first, {(first.shape[0], second.shape[1], first.shape[2])} here, but it has shape {tuple(weight.shape)}."
        )
    check_place("weight", weight, before, first, second.shape[3:])
    error, squared = _residual_op(first, second, weight, list(before), check_precision(precision, first.dtype))
    return error, squared


def _allocate(first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], precision: str) -> tuple[Tensor, Tensor]:
    error = weight.new_empty((*weight.shape[:3], *frame_size(first, second.shape[3:])))
    return error, weight.new_empty(weight.shape[:1], dtype=torch.float64)


def _launch(
    out: tuple[Tensor, Tensor], first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], precision: str
) -> None:
    error, squared = out
    if error.numel() == 0:  # an empty grid is an error
        squared.zero_()
        return
    from .kernel import launch_residual, launch_sum, tiles_of

    first, second, weight, error = map(six_dimensional, (first, second, weight, error))
    config = choose("residual", error.dtype, precision, error.device, error.shape[1], error.shape[2], error[:, 0, 0].numel())
    partial = squared.new_empty((len(error), tiles_of(error, config)))
    first, second = packed(first, 1, config.pack), packed(second, 2, config.pack)
    launch_residual(first, second, weight, three(before), error, partial, precision=precision, config=config)
    launch_sum(partial, squared)


def _plain(
    out: tuple[Tensor, Tensor], first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], precision: str
) -> None:
    exact = compose_torch(six_dimensional(first), six_dimensional(second)).neg_()
    weight = six_dimensional(weight)
    (x, y, z), (size_x, size_y, size_z) = three(before), weight.shape[3:]
    exact[..., x : x + size_x, y : y + size_y, z : z + size_z] += weight.double()
    error, squared = out
    error.copy_(exact.view(error.shape))
    squared.copy_(exact.square().sum(dim=tuple(range(1, 6))))


_residual_op = register("residual", allocate=_allocate, launch=_launch, plain=_plain)
