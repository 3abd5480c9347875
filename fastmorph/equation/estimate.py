"""What a pair of kernels leaves of a weight: measured, or estimated from a few random sums of its channels."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fastmorph.equation.arrays import host_waits
from fastmorph.equation.frame import Size
from fastmorph.equation.randomness import signs
from fastmorph.equation.solvers.base import Equation

_SUMS = 8  # random sums of channels that estimate a residual
_LITTLE = 2**13  # numbers in a run of channels beside which a launch costs more than a copy
MEASURED = 4 * _SUMS  # channels up to which a closed form's residual is measured


def residual_of(equation: Equation, first: Tensor, second: Tensor, *, estimate: bool) -> Tensor:
    """||G - F2 * F1|| / ||G|| of the kernels as returned, (B,) float64.

    Composing costs C_out * C_in * C_hid products, more than a closed form does. To `estimate`, input and output channels are
    first added up with random signs, a few sums each: the square of what is left is then right on average (the count sketch of
    Charikar, Chen and Farach-Colton 2002), whatever the error looks like, and for rounding errors, which are many and
    independent, within a few per cent.
    """
    weight = equation.weight
    _, co, ci = equation.sizes
    if estimate and ci > MEASURED:
        weight, first = _added_up(weight, 2, equation.work), _added_up(first, 2, equation.work)
    if estimate and co > MEASURED:
        weight, second = _added_up(weight, 1, equation.work), _added_up(second, 1, equation.work)
    weight, first, second = (kernel.to(equation.work) for kernel in (weight, first, second))
    _, norm = equation.backend.error(weight, equation.frame.before, first, second)
    return (norm / equation.norm).double()


def _added_up(kernel: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Channels of `dim`, times random signs, added up to 8 of them in `dtype`, (B, C, C', *K)."""
    channels, behind = kernel.shape[dim], kernel.ndim - 1 - dim
    # Few launches; a product with a sign is exact in any dtype.
    if host_waits(kernel.device) or kernel.numel() * _SUMS <= _LITTLE * channels:
        signed = kernel * _signs(channels, kernel.dtype, kernel.device).view(-1, *(1,) * behind)
        missing = -channels % _SUMS
        signed = torch.nn.functional.pad(signed, [0, 0] * behind + [0, missing]) if missing else signed
        return signed.view(*signed.shape[:dim], -1, _SUMS, *signed.shape[dim + 1 :]).sum(dim, dtype=dtype)
    # No copy. Repeated for the taps: where channels and taps lie side by side in memory, they are then one run of products.
    taps = tuple(kernel.shape[3:])
    repeated = _repeated_signs(channels, dim, taps, dtype, kernel.device)
    runs = kernel.split(_SUMS, dim)
    out = runs[0] * repeated[0]
    for run, sign in zip(runs[1:], repeated[1:], strict=True):
        (out if len(sign) == _SUMS else out.narrow(dim, 0, len(sign))).addcmul_(run, sign)
    return out


@lru_cache(maxsize=64)
def _repeated_signs(channels: int, dim: int, taps: Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """`_signs` for each tap, in runs of 8 channels."""
    repeated = _signs(channels, dtype, device).repeat_interleave(math.prod(taps))
    return repeated.view(channels, *(1,) * (2 - dim), *taps).split(_SUMS)


@lru_cache(maxsize=256)
def _signs(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random sign for each channel, (C,), the same at every call and in kernels."""
    return signs(channels).to(dtype).to(device, non_blocking=True)
