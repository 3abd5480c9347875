"""Change the channel bases of G so that its channels are alike.

Invertible Lo and Li with G = Lo G' Li leave the equation as it is: F2 = Lo F2' and F1 = F1' Li. The weights of a trained
layer have channels whose strengths decay over several decades, and those would be found one after another; in G' they are
found together, and a trained G becomes as easy as a random one. Norms change with the bases, so that a least-squares answer
of the new equation is one of the old only where both are exact: whiten only where that can be expected.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmorph.equation.backends.torch_backend import frobenius
from fastmorph.equation.gauge import floored

_PASSES = 2  # whitening one side colours the other a little; a third pass gained nothing


class Whitened(NamedTuple):
    """G' (B, Co, Ci, *K) of norm 1 (0 where G is zero), Lo (B, Co, Co), products of lower factors, Li (B, Ci, Ci) of upper."""

    weight: Tensor
    left: Tensor
    right: Tensor


def whiten(weight: Tensor, roundoff: float, *, passes: int = _PASSES) -> Whitened:
    """G = Lo G' Li, (B, Co, Ci, *K), with nearly white channels; `passes=0` takes the norm out and no more.

    Directions with less than sqrt(roundoff) of the power of all are left weak. What is weak on both sides (the
    rounding errors of a G of low rank, say) is solved for like a signal, and so costs half the digits at most.
    """
    floor = roundoff**0.5
    b, co, ci = weight.shape[:3]
    left = torch.eye(co, dtype=weight.dtype, device=weight.device).repeat(b, 1, 1)
    right = torch.eye(ci, dtype=weight.dtype, device=weight.device).repeat(b, 1, 1)
    for _ in range(passes):
        rows = weight.flatten(2)
        lower = _factor(rows, floor)
        weight, left = torch.linalg.solve_triangular(lower, rows, upper=False).view(weight.shape), left @ lower
        rows = weight.transpose(1, 2).flatten(2)
        lower = _factor(rows, floor)
        rows = torch.linalg.solve_triangular(lower, rows, upper=False)
        weight, right = rows.view(b, ci, co, *weight.shape[3:]).transpose(1, 2), lower.mT @ right
    norm = frobenius(weight)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    return Whitened(weight / norm.view(-1, *(1,) * (weight.ndim - 1)), left * norm[:, None, None], right)


def mix_out(matrix: Tensor, kernel: Tensor) -> Tensor:
    """A matrix, (B, P, O), times the kernel of each tap, (B, O, I, *K) -> (B, P, I, *K)."""
    return torch.bmm(matrix, kernel.flatten(2)).view(len(kernel), -1, *kernel.shape[2:])


def mix_in(kernel: Tensor, matrix: Tensor) -> Tensor:
    """The kernel of each tap, (B, O, I, *K), times a matrix, (B, I, Q) -> (B, O, Q, *K)."""
    return mix_out(matrix.mT, kernel.transpose(1, 2)).transpose(1, 2)


def _factor(rows: Tensor, floor: float) -> Tensor:
    """Lower triangular factor, (B, C, C), of the covariance of (B, C, n) rows, floored."""
    return torch.linalg.cholesky_ex(floored(rows @ rows.mT, floor))[0]
