"""The registered operators and the validated functions in front of them.

An operator runs its Triton kernel on CUDA tensors. On CPU tensors it runs the same kernel where Triton's interpreter is
on (`TRITON_INTERPRET=1`), and plain PyTorch elsewhere. Triton is imported at the first call that needs it: on a machine
without it, CPU tensors still work.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from typing import Literal, get_args

import torch
from torch import Tensor

Precision = Literal["ieee", "tf32", "tf32x3"]
"""How float32 products are taken: `ieee` in full, `tf32` with 10 bits of mantissa, `tf32x3` as three of those."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    if first.dtype != second.dtype or first.dtype not in _DTYPES:
        raise TypeError(
            "compose needs two tensors of one dtype, float32, float64, bfloat16 or float16, but first has "
            f"{first.dtype} and second has {second.dtype}: convert them with .to()."
        )
    if first.device != second.device:
        raise ValueError(
            f"compose needs both tensors on one device, but first is on {first.device} and second on {second.device}: "
            "move one of them with .to()."
        )
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, but it is {precision!r}.")
    if first.ndim != second.ndim or not 3 <= first.ndim <= 6:
        raise ValueError(
            "compose needs first (B, Ch, Ci, *K1) and second (B, Co, Ch, *K2) with the same 0 to 3 spatial dimensions, "
            f"but first has shape {tuple(first.shape)} and second {tuple(second.shape)}: "
            "add the missing dimensions with unsqueeze()."
        )
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"first has a batch of {first.shape[0]} and second one of {second.shape[0]} (dimension 0), but compose "
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
    out: Tensor = _compose_op(first, second, precision)
    return out


@torch.library.custom_op("fastmorph_kernels::compose", mutates_args=(), device_types="cuda")
def _compose_op(first: Tensor, second: Tensor, precision: str) -> Tensor:
    out = _empty_out(first, second)
    with torch.cuda.device(first.device):  # Triton launches on the current device, wherever its arguments are
        _launch_compose(first, second, out, precision)
    return out


@_compose_op.register_kernel("cpu")
def _compose_cpu(first: Tensor, second: Tensor, precision: str) -> Tensor:
    out = _empty_out(first, second)
    if _interpreted() and out.dtype != torch.bfloat16:  # the interpreter's bfloat16 products are wrong: triton#11584
        _launch_compose(first, second, out, precision)
    else:
        _compose_torch(_six_dimensional(first), _six_dimensional(second), _six_dimensional(out))
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
    from .compose_kernel import config_for, launch_compose

    config = config_for(out.dtype, out.shape[1], out.shape[2])
    first, second, out = _six_dimensional(first), _six_dimensional(second), _six_dimensional(out)
    launch_compose(first, second, out, precision=precision, config=config)


def _compose_torch(first: Tensor, second: Tensor, out: Tensor) -> None:
    """One batched matrix product for each tap of `second`, added to the part of `out` to which it shifts `first`."""
    accumulate = torch.float64 if out.dtype == torch.float64 else torch.float32
    total = torch.zeros_like(out, dtype=accumulate)
    columns = first.to(accumulate).flatten(2)  # (B, Ch, Ci * |K1|)
    size_x, size_y, size_z = first.shape[3:]
    for x, y, z in itertools.product(*map(range, second.shape[3:])):
        tap = second[..., x, y, z].to(accumulate)  # (B, Co, Ch)
        product = (tap @ columns).reshape(*tap.shape[:2], *first.shape[2:])  # (B, Co, Ci, *K1)
        total[..., x : x + size_x, y : y + size_y, z : z + size_z] += product
    out.copy_(total)


def _six_dimensional(kernel: Tensor) -> Tensor:
    """A view with three spatial dimensions, the missing ones in front and of size 1."""
    for _ in range(6 - kernel.ndim):
        kernel = kernel.unsqueeze(3)
    return kernel


@functools.cache
def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, which are then able to take CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        return False
    from .compose_kernel import INTERPRETED

    return INTERPRETED
