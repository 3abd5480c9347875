"""The freedom that the equation leaves: F2 * F1 does not change when an invertible T maps F1 to T F1 and F2 to F2 T^-1.

Line 8 of Algorithm 1 uses one number of it, to give both kernels one standard deviation. An ill-conditioned F1 (noise that is
nearly square, say) makes F2 large in some hidden directions and F1 small there, and rounding either to a short dtype then costs
more than its share: relative errors of size u |F2| |F1| / |G|. `balance` uses all of T to make that product smallest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmorph.equation.arrays import host_waits

# Directions in which a kernel has less than this of its mean power are left as they are: any invertible T is exact, and
# this one's condition stays far below what float64 can carry.
_FLOOR = 1e-6


def balance(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Change the hidden basis so that both kernels have the same covariance between hidden channels.

    Of all T this one makes |F1|^2 + |F2|^2 least, and |F1| |F2| with it. With A = F1 F1^T = L L^T and B = F2^T F2, it is
    T = V S^(1/2) V^T L^-1, where V S^2 V^T = L^T B L: then T A T^T and T^-T B T^-1 are both V S V^T.

    Args:
        first: (B, Ch, Ci, *K1) in float64.
        second: (B, Co, Ch, *K2) in float64.

    Returns:
        The kernels in the new basis.
    """
    rows, columns = first.flatten(2), second.transpose(1, 2).flatten(2)  # (B, Ch, Ci*|K1|), (B, Ch, Co*|K2|)
    # Without a look at whether it succeeded. Kernels that are no numbers stay so, and are told by the residual: only the
    # eigenvalues, of other items too, cannot be had of such a matrix.
    lower, _ = torch.linalg.cholesky_ex(_floored(rows @ rows.mT))
    power, basis = torch.linalg.eigh(torch.nan_to_num(lower.mT @ _floored(columns @ columns.mT) @ lower))  # S^2, V
    root = power.clamp_min(torch.finfo(power.dtype).tiny).sqrt().sqrt()
    spread = (basis * root[:, None, :]) @ basis.mT
    inverse = lower @ ((basis / root[:, None, :]) @ basis.mT)  # T^-1
    rows = spread @ torch.linalg.solve_triangular(lower, rows, upper=False)
    columns = inverse.mT @ columns
    return rows.view(first.shape), columns.view(second.transpose(1, 2).shape).transpose(1, 2)


def equalise(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Scale both kernels, in place, to one standard deviation (Algorithm 1, line 8), item by item; a zero kernel keeps its."""
    spread1, spread2 = _spread(first), _spread(second)
    scale = torch.where((spread1 > 0) & (spread2 > 0), (spread2 / spread1).sqrt(), torch.ones_like(spread1))
    return first.mul_(scale.view(-1, *(1,) * (first.ndim - 1))), second.div_(scale.view(-1, *(1,) * (second.ndim - 1)))


def _spread(kernel: Tensor) -> Tensor:
    """Standard deviation of each item, (B,)."""
    entries = kernel.flatten(1)
    if host_waits(kernel.device):
        return entries.std(1, correction=0)
    mean, power = entries.mean(1), entries.norm(dim=1).square() / max(1, entries.shape[1])
    variance = power - mean.square()  # quick, and right to all digits that matter unless the mean outweighs the rest
    if bool((variance <= 1e-6 * power).any()):
        variance = (entries - mean[:, None]).square().mean(1)
    return variance.sqrt()


def _floored(covariance: Tensor) -> Tensor:
    """The same, in place, with a floor under its directions."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    diagonal.add_(torch.where(mean > 0, _FLOOR * mean, 1.0)[:, None])
    return covariance
