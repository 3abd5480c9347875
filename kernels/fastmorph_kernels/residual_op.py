"""The residual of a pair of kernels as registered operators, and the validated functions in front of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compose_op import check_pair, compose_torch
from .support import Precision, accumulator, check_precision, check_tensors, interprets, six_dimensional, three
from .tiling import choose, packed


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
    taken = _check("residual", first, second, weight, before, precision)
    error, squared = _residual_op(first, second, weight, list(before), taken)
    return error, squared


def residual_norm(
    first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], *, precision: Precision = "ieee"
) -> Tensor:
    """Return the Frobenius norm (B,), float64, of the error that `residual` returns, without ever storing that error.

    Arguments and errors raised are those of `residual`. Large inputs are copied once, as every operator does that packs
    them for its kernel; nothing of the size of the frame is allocated.
    """
    taken = _check("residual_norm", first, second, weight, before, precision)
    norm: Tensor = _residual_norm_op(first, second, weight, list(before), taken)
    return norm


def _check(operator: str, first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], precision: str) -> str:
    """Raise TypeError or ValueError unless all fits; return how products are taken."""
    check_tensors(operator, first=first, second=second, weight=weight)
    check_pair(operator, first, second)
    if weight.ndim != first.ndim or weight.shape[:3] != (first.shape[0], second.shape[1], first.shape[2]):
        raise ValueError(
            f"{operator} needs a weight (B, Co, Ci, *K) with the batch, the output channels of second and the input channels "
            f"of first, {(first.shape[0], second.shape[1], first.shape[2])} here, but it has shape {tuple(weight.shape)}."
        )
    frame = tuple(one + two - 1 for one, two in zip(first.shape[3:], second.shape[3:], strict=True))
    if len(before) != len(frame) or not all(
        k > 0 and 0 <= b <= n - k for b, k, n in zip(before, weight.shape[3:], frame, strict=True)
    ):
        raise ValueError(
            f"a weight of kernel size {tuple(weight.shape[3:])} behind {tuple(before)} zeros does not lie in the frame "
            f"{frame} of the composition: before + K must be at most K1 + K2 - 1."
        )
    return check_precision(precision, first.dtype)


@torch.library.custom_op("fastmorph_kernels::residual", mutates_args=(), device_types="cuda")
def _residual_op(first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], precision: str) -> tuple[Tensor, Tensor]:
    error = _empty_error(first, second, weight)
    with torch.cuda.device(first.device):  # Triton launches on the current device, wherever its arguments are
        return error, _launch(first, second, weight, before, error, precision)


@_residual_op.register_kernel("cpu")
def _residual_cpu(
    first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], precision: str
) -> tuple[Tensor, Tensor]:
    error = _empty_error(first, second, weight)
    if interprets(weight.dtype):
        return error, _launch(first, second, weight, before, error, precision)
    exact = _residual_torch(first, second, weight, before)
    return error.copy_(exact.view(error.shape)), exact.double().square().sum(dim=tuple(range(1, 6)))


@_residual_op.register_fake
def _residual_fake(
    first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], precision: str
) -> tuple[Tensor, Tensor]:
    return _empty_error(first, second, weight), _empty_sums(weight)


@torch.library.custom_op("fastmorph_kernels::residual_norm", mutates_args=(), device_types="cuda")
def _residual_norm_op(first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], precision: str) -> Tensor:
    with torch.cuda.device(first.device):
        return _launch(first, second, weight, before, None, precision)


@_residual_norm_op.register_kernel("cpu")
def _residual_norm_cpu(first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], precision: str) -> Tensor:
    if interprets(weight.dtype):
        return _launch(first, second, weight, before, None, precision)
    return _residual_torch(first, second, weight, before).double().square().sum(dim=tuple(range(1, 6))).sqrt()


@_residual_norm_op.register_fake
def _residual_norm_fake(first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], precision: str) -> Tensor:
    return _empty_sums(weight)


def _empty_error(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    sizes = [k1 + k2 - 1 for k1, k2 in zip(first.shape[3:], second.shape[3:], strict=True)]
    return weight.new_empty((*weight.shape[:3], *sizes))


def _empty_sums(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[:1], dtype=torch.float64)


def _launch(
    first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int], error: Tensor | None, precision: str
) -> Tensor:
    """Fill `error`, and return its squared norm; or return the norm alone if there is none to fill."""
    out = _empty_sums(weight)
    if weight.numel() == 0:  # an empty grid is an error
        return out.zero_()
    from .residual_kernel import launch_residual, launch_sum, tiles_of

    first, second, weight = six_dimensional(first), six_dimensional(second), six_dimensional(weight)
    offsets = [k1 + k2 - 1 for k1, k2 in zip(first.shape[3:], second.shape[3:], strict=True)]
    batch, rows, columns = weight.shape[:3]
    frames = batch * offsets[0] * offsets[1] * offsets[2]
    config = choose("residual", weight.dtype, precision, weight.device, rows, columns, frames)
    partial = out.new_empty((batch, tiles_of(first, second, config)))
    launch_residual(
        packed(first, 1, config.pack),
        packed(second, 2, config.pack),
        weight,
        three(before),
        None if error is None else six_dimensional(error),
        partial,
        precision=precision,
        config=config,
    )
    launch_sum(partial, out, root=error is None)
    return out


def _residual_torch(first: Tensor, second: Tensor, weight: Tensor, before: Sequence[int]) -> Tensor:
    """The error, with three spatial dimensions, in what its sums are taken in."""
    error = compose_torch(six_dimensional(first), six_dimensional(second)).neg_()
    weight = six_dimensional(weight)
    (x, y, z), (size_x, size_y, size_z) = three(before), weight.shape[3:]
    error[..., x : x + size_x, y : y + size_y, z : z + size_z] += weight.to(accumulator(weight.dtype))
    return error
