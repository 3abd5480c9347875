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

_PASSES = 2  # whitening one side colours the other a little; a third pass gained nothing


class Whitened(NamedTuple):
    """G' (B, Co, Ci, *K) of norm 1 (0 where G is zero), Lo (B, Co, Co) and Li (B, Ci, Ci), symmetric products."""

    weight: Tensor
    left: Tensor
    right: Tensor


def whiten(weight: Tensor, roundoff: float, *, passes: int = _PASSES) -> Whitened:
    """G = Lo G' Li, (B, Co, Ci, *K), with nearly white channels; `passes=0` takes the norm out and no more.

    Directions with less than sqrt(roundoff) of the power of the strongest are left weak. What is weak on both sides (the
    rounding errors of a G of low rank, say) is solved for like a signal, and so costs half the digits at most.
    """
    floor = roundoff**0.5
    b, co, ci = weight.shape[:3]
    left = torch.eye(co, dtype=weight.dtype, device=weight.device).repeat(b, 1, 1)
    right = torch.eye(ci, dtype=weight.dtype, device=weight.device).repeat(b, 1, 1)
    for _ in range(passes):
        half, inverse = _roots(weight.flatten(2), floor)
        weight, left = mix_out(inverse, weight), left @ half
        half, inverse = _roots(weight.transpose(1, 2).flatten(2), floor)
        weight, right = mix_in(weight, inverse), half @ right
    norm = frobenius(weight)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    return Whitened(weight / norm.view(-1, *(1,) * (weight.ndim - 1)), left * norm[:, None, None], right)


def mix_out(matrix: Tensor, kernel: Tensor) -> Tensor:
    """A matrix, (B, P, O), times the kernel of each tap, (B, O, I, *K) -> (B, P, I, *K)."""
    return torch.einsum("bpo,boi...->bpi...", matrix, kernel)


def mix_in(kernel: Tensor, matrix: Tensor) -> Tensor:
    """The kernel of each tap, (B, O, I, *K), times a matrix, (B, I, Q) -> (B, O, Q, *K)."""
    return torch.einsum("boi...,biq->boq...", kernel, matrix)


def _roots(rows: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Square root of the covariance of (B, C, n) rows, scaled to norm 1 and floored, and its inverse; (B, C, C) each."""
    covariance = rows @ rows.mT
    home = covariance.device
    if home.type == "mps":  # Apple's GPUs have no eigenvalue solver
        covariance = covariance.cpu()
    values, basis = (x.to(home) for x in torch.linalg.eigh(covariance))
    values = values / values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny)
    root = values.clamp(floor, 1.0).sqrt()[:, None, :]
    return (basis * root) @ basis.mT, (basis / root) @ basis.mT
