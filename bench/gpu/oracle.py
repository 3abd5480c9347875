"""What answers are held to on the device: the same maps in float64 by plain PyTorch, and how far rounding may take one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmorph.equation.backends import TorchBackend
from fastmorph.equation.backends.torch_backend import pad

MAPS = TorchBackend()


def compose(first: Tensor, second: Tensor) -> Tensor:
    """F2 * F1 in float64."""
    return MAPS.compose(first.double(), second.double())


def error(weight: Tensor, before: Sequence[int], first: Tensor, second: Tensor) -> Tensor:
    """G - F2 * F1 in float64, (B, Co, Ci, *N)."""
    composed = compose(first, second)
    return pad(weight.double(), tuple(before), tuple(composed.shape[3:])) - composed


def residual(weight: Tensor, before: Sequence[int], first: Tensor, second: Tensor) -> float:
    """Largest ||G - F2 * F1|| / ||G|| of a batch."""
    left = error(weight, before, first, second).flatten(1).norm(dim=1)
    return float((left / weight.double().flatten(1).norm(dim=1)).max())


def relative(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact||."""
    return float((out.double() - exact).norm() / exact.norm())


def rounding(terms: int, dtype: torch.dtype, out: torch.dtype | None = None) -> float:
    """Largest relative error of sums of `terms` random products in `dtype`, rounded to `out`, over a whole result.

    A partial sum of k products of independent normal numbers has a size of about sqrt(k), and rounding it adds at most u = eps
    / 2 of that. These errors are independent: after n terms they have grown to u * sqrt(sum of k) = u * n / sqrt(2), which is
    u * sqrt(n / 2) of the sum's own size, sqrt(n). The bound is four times that, for the oracle's error and for what
    the tail of the distribution adds; products in tf32 are beyond it.
    """
    grown = 2.0 * terms**0.5 * torch.finfo(dtype).eps
    return grown + (torch.finfo(out).eps if out is not None else 0.0)
