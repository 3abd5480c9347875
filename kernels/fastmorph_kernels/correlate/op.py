"""The adjoint of the composition as a registered operator, and the validated function in front of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from ..checks import Precision, check_place, check_precision, check_sizes, check_tensors
from ..compose.op import compose_torch
from ..register import register
from ..support import six_dimensional, three
from ..tiling import choose, packed


def correlate(
    target: Tensor, before: Sequence[int], first: Tensor, k2: Sequence[int], *, precision: Precision = "ieee"
) -> Tensor:
    """Return the adjoint of `compose` in its second kernel, applied to a target: the right-hand side of a half-step.

        out[b, o, h, v] = sum over i, w of target[b, o, i, v + w - before] * first[b, h, i, w]      v in [0, K2)

    The target is zero outside [0, K): it stands behind `before` zeros in a frame of size K1 + K2 - 1, and products with
    the zeros around it are not taken. There are 0 to 3 spatial dimensions; strides are free; a batch of 0 and channels of
    0 are allowed. Sums are taken in float32, those of float64 tensors in float64, and rounded once. Not differentiable.

    Args:
        target: (B, Co, Ci, *K); float32, float64, bfloat16 or float16.
        before: zeros in front of the target, one count for each spatial dimension; before + K <= K1 + K2 - 1.
        first: (B, Ch, Ci, *K1); of the dtype and on the device of `target`.
        k2: kernel size of the result.
        precision: how float32 products are taken; other dtypes take theirs in full.

    Returns:
        (B, Co, Ch, *K2), contiguous, of the dtype and on the device of the inputs.

    Raises:
        TypeError: the dtypes differ or are not supported.
        ValueError: the shapes do not fit, the devices differ, or `precision` is unknown.
    """
    check_tensors("correlate", target=target, first=first)
    taken = check_precision(precision, first.dtype)
    if target.ndim != first.ndim or not 3 <= first.ndim <= 6 or target.shape[::2][:2] != first.shape[::2][:2]:
        raise ValueError(
            "correlate needs target (B, Co, Ci, *K) and first (B, Ch, Ci, *K1) of one batch, with the same input channels "
            f"and the same 0 to 3 spatial dimensions, but target has shape {tuple(target.shape)} and first "
            f"{tuple(first.shape)}: check that the arguments are not swapped."
        )
    check_sizes("correlate", first, k2)
    check_place("target", target, before, first, k2)
    out: Tensor = _correlate_op(target, list(before), first, list(k2), taken)
    return out


def _allocate(target: Tensor, before: Sequence[int], first: Tensor, k2: Sequence[int], precision: str) -> Tensor:
    return target.new_empty((*target.shape[:2], first.shape[1], *k2))


def _launch(out: Tensor, target: Tensor, before: Sequence[int], first: Tensor, k2: Sequence[int], precision: str) -> None:
    if out.numel() == 0:  # an empty grid is an error
        return
    from ..compose.kernel import launch_correlate

    config = choose("correlate", out.dtype, precision, out.device, out.shape[1], out.shape[2], out[:, 0, 0].numel())
    target, first = packed(six_dimensional(target), 2, config.pack), packed(six_dimensional(first), 2, config.pack)
    launch_correlate(target, three(before), first, six_dimensional(out), precision=precision, config=config)


def _plain(out: Tensor, target: Tensor, before: Sequence[int], first: Tensor, k2: Sequence[int], precision: str) -> None:
    exact = correlate_torch(six_dimensional(target), three(before), six_dimensional(first), three(k2, 1))
    out.copy_(exact.view(out.shape))


def correlate_torch(target: Tensor, before: Sequence[int], first: Tensor, k2: Sequence[int]) -> Tensor:
    """The correlation of kernels with three spatial dimensions, in float64, (B, Co, Ch, *K2)."""
    whole = compose_torch(first.transpose(1, 2).flip(3, 4, 5), target)  # offset K1 - 1 - before is the first of the result
    widths: list[int] = []
    for k1, zeros, size, n in zip(first.shape[3:], before, k2, whole.shape[3:], strict=True):
        start = k1 - 1 - zeros
        widths = [-start, start + size - n, *widths]
    return pad(whole, widths)


_correlate_op = register("correlate", allocate=_allocate, launch=_launch, plain=_plain)
