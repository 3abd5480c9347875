"""The Gauss-Newton step of the projected equation, by conjugate gradients truncated at a trust region (Steihaug 1983).

Notation, for one item: A1 X = F2-shaped X composed with F1, A2 Y = F2 composed with F1-shaped Y, both linear; M1 = A1^T A1
and M2 = A2^T A2, which are the Gram matrices of the two half-steps. F2 is eliminated: it is always the least-squares kernel
for F1. A change d of F1 then changes the residual R to R - P A2 d in first order, P = I - A1 M1^-1 A1^T (Kaufman 1975, who
drops the term of Golub and Pereyra 1973 that vanishes with R). Its least squares are H d = A2^T R, H = A2^T P A2.

Where this departs from the textbook:
1. The preconditioner is M2, the half-step for F1: without P it would be the answer, and one CG step is one sweep of
   alternating least squares. Steps then count hidden directions that the two kernels share, not the condition of the kernels.
2. The factors M1 = L1 L1^T and M2 = L2 L2^T are applied once, to the systems: V = L1^-1 A1^T and W = L2^-1 A2^T have
   orthonormal rows. With q = L2^T d in the place of d, the preconditioner is the identity, the metric of the trust region too,
   and a step is a handful of matrix products, whatever the kernels' sizes.
3. Items that are done stay in the batch, with steps of length zero, until all are: no item's row moves.
4. It ends when the residual model is small, and also when the gradient has fallen to a tenth: far from an answer, and always
   where there is none, the linear model cannot make the residual small, and to solve it better would be for nothing.
5. It may run in float32 under a float64 outer iteration: only the direction is inexact, and the line search judges it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmorph.equation.arrays import host_waits
from fastmorph.equation.frame import Size

MOST_STEPS = 120  # a direction that is not found by then is better sought again from where this one leads
_SETTLED = 0.1  # of the first gradient
_UNSEEN = 4  # steps between two looks at whether all are done, where the host waits for these


class Direction(NamedTuple):
    """d (B, Ch, Ci, *K1), |d| in M2's metric, 1 - |R - P A2 d|^2 / |R|^2, whether d is on the sphere, CG steps; (B,) each."""

    change: Tensor
    length: Tensor
    gain: Tensor
    on_sphere: Tensor
    steps: Tensor


class Linearised(NamedTuple):
    """A batch of projected equations about F1: R of norm 1, V, W and L2, in the precision of CG."""

    error: Tensor  # (B, Co, Ci, *N)
    across1: Tensor  # V, (B, |K2|*Ch, Ci*|N|)
    across2: Tensor  # W, (B, |K1|*Ch, Co*|N|)
    lower2: Tensor  # L2, (B, |K1|*Ch, |K1|*Ch)


def direction(about: Linearised, k1: Size, forcing: Tensor, radius: Tensor, most: Tensor) -> Direction:
    """Solve until the residual model falls to `forcing`, d reaches `radius`, or `most` steps are taken; (B,) each."""
    co, ci = about.error.shape[1:3]
    across1, across2 = about.across1, about.across2
    # Rows are input channels: q, p and s (B, Ci, |K1|*Ch).
    s = _other_rows(about.error, co, ci) @ across2.mT  # L2^-1 (A2^T R - H d)
    p, q, gamma = s, torch.zeros_like(s), _dot(s, s)
    enough, flat = 1 - forcing**2, (_SETTLED**2 * gamma).clamp_min(10 * torch.finfo(s.dtype).eps)
    reach, none = radius**2, torch.zeros_like(gamma)
    gain, steps, on = none, torch.zeros_like(most), most >= 0
    inside = on
    every = _UNSEEN if host_waits(s.device) else 1
    for step in range(1, MOST_STEPS + 1):
        composed = _other_rows(torch.bmm(p, across2), ci, co)  # A2 d, (B, Co, Ci*|N|)
        left = torch.baddbmm(composed, torch.bmm(composed, across1.mT), across1, alpha=-1)  # P A2 d
        hp = torch.bmm(_other_rows(left, co, ci), across2.mT)
        php = _dot(p, hp)
        curved = php > 0
        a = torch.where(curved, gamma / php, none)
        further = torch.addcmul(q, _column(a), p)
        inside = torch.where(on, _dot(further, further) <= reach, inside)  # |q| grows along CG: it leaves the ball once
        a = torch.where(on & inside, a, none)
        q, s = torch.addcmul(q, _column(a), p), torch.addcmul(s, _column(a), hp, value=-1)
        gain, steps = torch.addcmul(gain, a, gamma), steps + on
        on = torch.stack([on, curved, inside, gain < enough, gamma > flat, steps < most]).all(0)
        if step % every == 0 and not bool(on.any()):
            break
        last, gamma = gamma, _dot(s, s)
        p = torch.where(_column(on), torch.addcmul(s, _column(gamma / last), p), p)
    return _to_the_sphere(about, k1, p, q, (gamma, php, gain, reach), inside, steps)


def _to_the_sphere(
    about: Linearised,
    k1: Size,
    p: Tensor,
    q: Tensor,
    scalars: tuple[Tensor, Tensor, Tensor, Tensor],
    inside: Tensor,
    steps: Tensor,
) -> Direction:
    """The direction, where its last step would have left the ball with as much of that step as leads to the sphere."""
    gamma, php, gain, reach = scalars
    qp, pp = _dot(q, p), _dot(p, p)
    t = ((qp**2 + pp * (reach - _dot(q, q))).clamp_min(0).sqrt() - qp) / pp
    t = torch.where(inside, torch.zeros_like(t), t)
    q, gain = torch.addcmul(q, _column(t), p), gain + 2 * t * gamma - t * t * php
    change = torch.linalg.solve_triangular(about.lower2.mT, q.mT, upper=True)  # (B, |K1|*Ch, Ci)
    batch, _, ci = change.shape
    change = change.view(batch, *k1, -1, ci).permute(0, -2, -1, *range(1, len(k1) + 1))
    return Direction(change, _dot(q, q).sqrt(), gain, ~inside, steps)


def across(lower: Tensor, system: Tensor) -> Tensor:
    """L^-1 A^T, (B, n, m), with orthonormal rows, for A^T (B, n, m) and the factor L (B, n, n) of A^T A."""
    return torch.linalg.solve_triangular(lower, system, upper=False)


def ridged_factor(gram: Tensor) -> Tensor:
    """Cholesky factor of the lower triangle of a Gram matrix, (B, n, n), with a ridge of some roundings.

    For directions only, which a line search judges; never for the answer. An item that fails gets a larger ridge.
    """
    finfo = torch.finfo(gram.dtype)
    ridge = 4 * finfo.eps * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + finfo.tiny  # (B,)
    for _ in range(9):
        ridged = gram.clone()
        ridged.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if not bool(failed.any()):
            break
        ridge = torch.where(failed > 0, 100 * ridge, ridge)
    return factor


def _other_rows(rows: Tensor, channels: int, others: int) -> Tensor:
    """(B, C, C'*|N|) -> (B, C', C*|N|)."""
    return rows.reshape(len(rows), channels, others, -1).transpose(1, 2).reshape(len(rows), others, -1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, m, n), (B, m, n) -> (B,)."""
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).view(-1)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)
