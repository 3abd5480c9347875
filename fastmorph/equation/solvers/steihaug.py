"""The Gauss-Newton step of the projected equation, by conjugate gradients truncated at a trust region (Steihaug 1983).

Notation, for one item: A1 X = F2-shaped X composed with F1, A2 Y = F2 composed with F1-shaped Y, both linear; M1 = A1^T A1
and M2 = A2^T A2, which are the Gram matrices of the two half-steps. F2 is eliminated: it is always the least-squares kernel
for F1. A change d of F1 then changes the residual R to R - P A2 d in first order, P = I - A1 M1^-1 A1^T (Kaufman 1975, who
drops the term of Golub and Pereyra 1973 that vanishes with R). Its least squares are H d = A2^T R, H = A2^T P A2.

Where this departs from the textbook:
1. The preconditioner is M2, the half-step for F1: without P it would be the answer, and one CG step is one sweep of
   alternating least squares. Steps then count hidden directions that the two kernels share, not the condition of the kernels.
2. M2 is never applied. Along CG, M2 p obeys the recurrence of p with the residual in the place of M2^-1 times it, so a step
   costs two compositions, two correlations and two triangular pairs, and no factorisation.
3. |d| in the metric of M2, which the trust region needs, is carried by recurrences of scalars for the same reason.
4. It ends when the residual model is small, and also when the gradient has fallen to a tenth: far from an answer, and always
   where there is none, the linear model cannot make the residual small, and to solve it better would be for nothing.
5. It may run in float32 under a float64 outer iteration: only the direction is inexact, and the line search judges it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmorph.equation.backends import Backend
from fastmorph.equation.backends.torch_backend import taps_first, taps_last
from fastmorph.equation.frame import Size, tap_count

MOST_STEPS = 120  # a direction that is not found by then is better sought again from where this one leads
_SETTLED = 0.1  # of the first gradient


class Direction(NamedTuple):
    """d (B, Ch, Ci, *K1), |d| in M2's metric, 1 - |R - P A2 d|^2 / |R|^2, whether d is on the sphere, CG steps; (B,) each."""

    change: Tensor
    length: Tensor
    gain: Tensor
    on_sphere: Tensor
    steps: Tensor


class Linearised(NamedTuple):
    """A batch of projected equations about F1: R of norm 1, F1, F2, factors of M1 and M2, in the precision of CG."""

    error: Tensor  # (B, Co, Ci, *N)
    first: Tensor  # (B, Ch, Ci, *K1)
    second: Tensor  # (B, Co, Ch, *K2)
    factor1: Tensor  # (B, |K2|*Ch, |K2|*Ch)
    factor2: Tensor  # (B, |K1|*Ch, |K1|*Ch)


def direction(backend: Backend, about: Linearised, forcing: Tensor, radius: Tensor, most: Tensor) -> Direction:
    """Solve until the residual model falls to `forcing`, d reaches `radius`, or `most` steps are taken; (B,) each.

    Items that stop leave the batch.
    """
    k1, k2 = tuple(about.first.shape[3:]), tuple(about.second.shape[3:])
    origin, eps = (0,) * len(k1), torch.finfo(about.error.dtype).eps
    zero = torch.zeros_like(radius)
    found = Direction(torch.zeros_like(about.first), zero.clone(), zero.clone(), zero > 0, torch.zeros_like(most))
    items = torch.arange(len(radius), device=radius.device)

    s = _onto_first(backend, about.error, about.second, k1)  # A2^T R - H d
    z = _half_step(about.factor2, s.transpose(1, 2)).transpose(1, 2)  # M2^-1 s
    d, p, mp, gamma = torch.zeros_like(s), z, s, _dot(s, z)
    gain, dmd, dmp, pmp = zero.clone(), zero.clone(), zero.clone(), gamma
    flat = (_SETTLED**2 * gamma).clamp_min(10 * eps)
    step = 0
    while len(items):
        step += 1
        first, second = about.first, about.second
        onto = _half_step(about.factor1, backend.correlate(backend.compose(p, second), origin, first, k2))  # M1^-1 A1^T A2 p
        hp = mp - _onto_first(backend, backend.compose(first, onto), second, k1)
        php = _dot(p, hp)
        a = torch.where(php > 0, gamma / php, zero)
        hit = dmd + 2 * a * dmp + a * a * pmp > radius**2  # |d| grows along CG: it leaves the ball once
        to_sphere = (-dmp + (dmp**2 + pmp * (radius**2 - dmd)).clamp_min(0).sqrt()) / pmp
        a = torch.where(hit, to_sphere, a)
        d, s = d + _scaled(a, p), s - _scaled(a, hp)
        dmd, dmp = dmd + 2 * a * dmp + a * a * pmp, dmp + a * pmp
        gain = gain + 2 * a * gamma - a * a * php
        stop = hit | (1 - gain <= forcing**2) | (gamma <= flat) | ~(php > 1e-14 * pmp) | (step >= most)
        if bool(stop.any()):
            for whole, part in zip(found, (d, dmd.clamp_min(0).sqrt(), gain, hit), strict=False):
                whole[items[stop]] = part[stop]
            found.steps[items[stop]] = step
            on = ~stop
            if not bool(on.any()):
                break
            about = Linearised(*(x[on] for x in about))
            items, zero, forcing, radius, most, flat = (x[on] for x in (items, zero, forcing, radius, most, flat))
            d, s, p, mp, gamma, gain, dmd, dmp, pmp = (x[on] for x in (d, s, p, mp, gamma, gain, dmd, dmp, pmp))
        z = _half_step(about.factor2, s.transpose(1, 2)).transpose(1, 2)
        last, gamma = gamma, _dot(s, z)
        b = gamma / last
        p, mp = z + _scaled(b, p), s + _scaled(b, mp)
        dmp, pmp = b * dmp, gamma + b * b * pmp  # (d, s) = 0 and (p_old, s) = 0 along CG
    return found


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


def _half_step(factor: Tensor, kernel: Tensor) -> Tensor:
    """M^-1 on a kernel (B, Co, Ch, *K2), given the factor of M, whose rows are ordered tap by tap."""
    b, co, ch, *k2 = kernel.shape
    rows = taps_first(kernel).view(tap_count(tuple(k2)), b, co, ch).permute(1, 0, 3, 2).reshape(b, -1, co)
    by_tap = torch.cholesky_solve(rows, factor).view(b, -1, ch, co).permute(1, 0, 3, 2)  # (|K2|, B, Co, Ch)
    return taps_last(by_tap.reshape(*k2, b, co, ch))


def _onto_first(backend: Backend, target: Tensor, second: Tensor, k1: Size) -> Tensor:
    """A2^T on a target that fills the frame, (B, Co, Ci, *N) -> (B, Ch, Ci, *K1)."""
    origin = (0,) * len(k1)
    return backend.correlate(target.transpose(1, 2), origin, second.transpose(1, 2), k1).transpose(1, 2)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _scaled(factor: Tensor, x: Tensor) -> Tensor:
    return factor.view(-1, *(1,) * (x.ndim - 1)) * x
