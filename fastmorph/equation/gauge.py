"""The freedom that the equation leaves: F2 * F1 does not change when an invertible T maps F1 to T F1 and F2 to F2 T^-1.

Line 8 of Algorithm 1 uses one number of it, to give both kernels one standard deviation. An ill-conditioned F1 (noise that is
nearly square, say) makes F2 large in some hidden directions and F1 small there, and rounding either to a short dtype then costs
more than its share: relative errors of size u |F2| |F1| / |G|. `balance` uses all of T to make that product smallest.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fastmorph.equation.arrays import host_waits

# Directions in which a kernel has less than this of its power are left as they are: any invertible T is exact, and this one's
# condition stays far below what float64 can carry.
_FLOOR = 1e-8
# log t of the points of `_inverse_root`, from the largest eigenvalue down to 1e-9 of it.
_STEP, _POINTS = 2.4, 6


def balance(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Change the hidden basis so that both kernels have nearly the same covariance between hidden channels.

    Of all T those with P = T^T T for which P A P = B, where A = F1 F1^T and B = F2^T F2, make |F1|^2 + |F2|^2 least, and
    |F1| |F2| with it: then T A T^T and T^-T B T^-1 are equal, up to a rotation that changes no norm. With A = L L^T,
    P^-1 = L (L^T B L)^(-1/2) L^T, and T^-1 is taken as its lower triangular factor.

    Args:
        first: (B, Ch, Ci, *K1) in float64.
        second: (B, Co, Ch, *K2) in float64.

    Returns:
        The kernels in the new basis.
    """
    rows, columns = first.flatten(2), second.transpose(1, 2).flatten(2)  # (B, Ch, Ci*|K1|), (B, Ch, Co*|K2|)
    # Without a look at whether it succeeded: kernels that are no numbers stay so, and are told by the residual.
    lower, _ = torch.linalg.cholesky_ex(floored(rows @ rows.mT, _FLOOR))
    mixed = lower.mT @ columns
    inverse = lower @ torch.linalg.cholesky_ex(_inverse_root(mixed @ mixed.mT))[0]  # T^-1
    rows = torch.linalg.solve_triangular(inverse, rows, upper=False)
    columns = inverse.mT @ columns
    return rows.view(first.shape), columns.view(second.transpose(1, 2).shape).transpose(1, 2)


def _inverse_root(matrix: Tensor) -> Tensor:
    """M^(-1/2) of positive semidefinite M of trace 1, given times their traces, (B, n, n); roughly, and bounded below 1e-9.

    Where it costs nothing to wait, from eigenvalues. Else by the trapezoidal rule, from one batch of factors:
    M^(-1/2) = 2 / pi * integral of (M + t^2)^-1 dt, with t = e^u (Hale, Higham and Trefethen 2008 have better points; a basis
    that is off by some per cent of the best is as good).
    """
    tiny, points = torch.finfo(matrix.dtype).tiny, _points(matrix.dtype, matrix.device)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    if not host_waits(matrix.device):
        power = diagonal.sum(-1).clamp_min(tiny)
        values, basis = torch.linalg.eigh(torch.nan_to_num(matrix))
        basis = basis / (values / power[:, None]).maximum(points[-1] ** 2).sqrt().sqrt()[:, None, :]
        return basis @ basis.mT
    b, n, _ = matrix.shape
    power = (diagonal @ points.expand(n, -1)).clamp_min(tiny)  # (B, points), times these
    scaled = matrix[:, None] / power[:, :, None, None]  # (B, points, n, n)
    scaled.diagonal(dim1=-2, dim2=-1).add_(points[:, None])  # (M + t^2) / t
    factor, _ = torch.linalg.cholesky_ex(scaled)
    inverses = torch.linalg.solve_triangular(
        factor.mT, _unit(n, matrix.dtype, matrix.device).expand_as(factor), upper=True
    ).mT.reshape(b, -1, n)
    return inverses.mT @ inverses


@lru_cache(maxsize=64)
def _points(dtype: torch.dtype, device: torch.device) -> Tensor:
    """t of the trapezoidal rule, largest first."""
    return torch.tensor([math.exp(1 - _STEP * k) for k in range(_POINTS)], dtype=dtype).to(device, non_blocking=True)


@lru_cache(maxsize=4)
def _unit(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The unit matrix."""
    return torch.eye(n, dtype=dtype, device=device)


def equalise(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale both kernels to one standard deviation (Algorithm 1, line 8), item by item, and round; a zero kernel keeps its."""
    ratio = (_spread(second) / _spread(first)).sqrt_().nan_to_num_(1.0, 1.0)
    scale = torch.threshold_(ratio, 0.0, 1.0)
    rounded = torch.empty_like(first, dtype=dtype), torch.empty_like(second, dtype=dtype)
    torch.mul(first, scale.view(-1, *(1,) * (first.ndim - 1)), out=rounded[0])
    torch.div(second, scale.view(-1, *(1,) * (second.ndim - 1)), out=rounded[1])
    return rounded


def _spread(kernel: Tensor) -> Tensor:
    """Standard deviation of each item, (B,)."""
    if host_waits(kernel.device):
        return kernel.std(tuple(range(1, kernel.ndim)), correction=0)
    entries = kernel.flatten(1)
    mean, power = entries.mean(1), entries.norm(dim=1).square() / max(1, entries.shape[1])
    variance = power - mean.square()  # quick, and right to all digits that matter unless the mean outweighs the rest
    if bool((variance <= 1e-6 * power).any()):
        variance = (entries - mean[:, None]).square().mean(1)
    return variance.sqrt()


def floored(covariance: Tensor, share: float) -> Tensor:
    """Matrices, (B, n, n), in place, with a share of their trace under their directions; that of 1 where they are zero."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    trace = torch.threshold_(diagonal.sum(-1), 0.0, 1.0)
    diagonal.add_(trace[:, None], alpha=share)
    return covariance
