"""The composition as a registered operator, and the validated function in front of it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .support import Precision, accumulator, check_precision, check_tensors, interprets, six_dimensional
from .tiling import choose, packed


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


def check_pair(operator: str, first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless the shapes are those of two kernels that follow each other."""
    if first.ndim != second.ndim or not 3 <= first.ndim <= 6:
        raise ValueError(
            f"{operator} needs first (B, Ch, Ci, *K1) and second (B, Co, Ch, *K2) with the same 0 to 3 spatial dimensions, "
            f"but first has shape {tuple(first.shape)} and second {tuple(second.shape)}: "
            "add the missing dimensions with unsqueeze()."
        )
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"first has a batch of {first.shape[0]} and second one of {second.shape[0]} (dimension 0), but {operator} "
            "pairs them up: expand() the smaller one."
        )
    if first.shape[1] != second.shape[2]:
        raise ValueError(
            f"first makes {first.shape[1]} hidden channels (its dimension 1) but second takes {second.shape[2]} (its "
            "dimension 2), and the two must be equal: check that the kernels are not swapped."
        )
    if 0 in first.shape[3:] or 0 in second.shape[3:]:
        raise ValueError(
            f"first has kernel size {tuple(first.shape[3:])} and second {tuple(second.shape[3:])}, but an empty kernel "
            "has no composition: kernel sizes must be at least 1."
        )


@torch.library.custom_op("fastmorph_kernels::compose", mutates_args=(), device_types="cuda")
def _compose_op(first: Tensor, second: Tensor, precision: str) -> Tensor:
    out = _empty_out(first, second)
    with torch.cuda.device(first.device):  # Triton launches on the current device, wherever its arguments are
        _launch_compose(first, second, out, precision)
    return out


@_compose_op.register_kernel("cpu")
def _compose_cpu(first: Tensor, second: Tensor, precision: str) -> Tensor:
    out = _empty_out(first, second)
    if interprets(out.dtype):
        _launch_compose(first, second, out, precision)
    else:
        out.copy_(compose_torch(six_dimensional(first), six_dimensional(second)).view(out.shape))
    return out


@_compose_op.register_fake
def _compose_fake(first: Tensor, second: Tensor, precision: str) -> Tensor:
    return _empty_out(first, second)


def _empty_out(first: Tensor, second: Tensor) -> Tensor:
    sizes = [k1 + k2 - 1 for k1, k2 in zip(first.shape[3:], second.shape[3:], strict=True)]
    return first.new_empty((first.shape[0], second.shape[1], first.shape[2], *sizes))


def _launch_compose(first: Tensor, second: Tensor, out: Tensor, precision: str) -> None:
    if out.numel() == 0:  # an empty grid is an error
        return
    from .compose_kernel import launch_compose

    config = choose("compose", out.dtype, precision, out.device, out.shape[1], out.shape[2], out[:, 0, 0].numel())
    first, second = packed(six_dimensional(first), 1, config.pack), packed(six_dimensional(second), 2, config.pack)
    launch_compose(first, second, six_dimensional(out), precision=precision, config=config)


def compose_torch(first: Tensor, second: Tensor) -> Tensor:
    """The composition of kernels with three spatial dimensions, not rounded to their dtype.

    One batched matrix product for each tap of `second`, added to the part of the result to which it shifts `first`.
    """
    dtype = accumulator(first.dtype)
    sizes = [k1 + k2 - 1 for k1, k2 in zip(first.shape[3:], second.shape[3:], strict=True)]
    total = first.new_zeros((first.shape[0], second.shape[1], first.shape[2], *sizes), dtype=dtype)
    columns = first.to(dtype).flatten(2)  # (B, Ch, Ci * |K1|)
    size_x, size_y, size_z = first.shape[3:]
    for x, y, z in itertools.product(*map(range, second.shape[3:])):
        tap = second[..., x, y, z].to(dtype)  # (B, Co, Ch)
        product = (tap @ columns).reshape(*tap.shape[:2], *first.shape[2:])  # (B, Co, Ci, *K1)
        total[..., x : x + size_x, y : y + size_y, z : z + size_z] += product
    return total
