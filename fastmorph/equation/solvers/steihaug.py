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
3. A step is of fixed form, twelve operators. Two numbers an item, p^T H p and the gradient's |s|^2, tell all that is decided:
   lengths of q and p follow from them (Conn, Gould and Toint 2000, Section 7.5.1). So the device takes a few steps in a row,
   the host reads what they told, and only then says how far along each direction q goes: not at all from an item's last on.
4. It ends when the residual model is small, and also when the gradient has fallen to a tenth: far from an answer, and always
   where there is none, the linear model cannot make the residual small, and to solve it better would be for nothing.
5. It may run in float32 under a float64 outer iteration: only the direction is inexact, and the line search judges it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmorph.equation.arrays import host_waits
from fastmorph.equation.frame import Size
from fastmorph.equation.solvers.base import Numbers, sent

MOST_STEPS = 120  # a direction that is not found by then is better sought again from where this one leads
_SETTLED = 0.1  # of the first gradient
_UNSEEN = 4  # steps between two looks, where the host waits for these
_TOGETHER = 16  # directions that are kept until they are added up


class Direction(NamedTuple):
    """d (B, Ch, Ci, *K1), |d| / |R| in M2's metric, 1 - |R - P A2 d|^2 / |R|^2, whether d is on the sphere, CG steps; (B,)."""

    change: Tensor
    length: Numbers
    gain: Numbers
    on_sphere: Numbers
    steps: Numbers


class Linearised(NamedTuple):
    """A batch of projected equations about F1: R, |R|, V, W and L2, all but |R| on the device, in the precision of CG."""

    error: Tensor  # (B, Co, Ci, *N)
    norm: Numbers
    across1: Tensor  # V, (B, |K2|*Ch, Ci*|N|)
    across2: Tensor  # W, (B, |K1|*Ch, Co*|N|)
    lower2: Tensor  # L2, (B, |K1|*Ch, |K1|*Ch)


def direction(about: Linearised, k1: Size, forcing: Numbers, radius: Numbers, most: Numbers) -> Direction:
    """Solve until the residual model falls to `forcing`, d reaches `radius` |R|, or `most` steps are taken; (B,) each."""
    across1, across2 = about.across1, about.across2
    batch, co, ci = about.error.shape[:3]
    every = _UNSEEN if host_waits(across1.device) else 1
    # Rows are input channels: q, p and s (B, Ci, |K1|*Ch).
    s = p = _other_rows(about.error, co, ci) @ across2.mT  # L2^-1 (A2^T R - H d)
    gamma, q = _dot(s, s), torch.zeros_like(s).flatten(1)[:, None]
    path, moves, shares = _Path(torch.finfo(s.dtype).eps, forcing, radius, most), [], []
    while path.on.any():
        told = [gamma]
        for _ in range(every):
            composed = _other_rows(torch.bmm(p, across2), ci, co)  # A2 d, (B, Co, Ci*|N|)
            left = torch.baddbmm(composed, torch.bmm(composed, across1.mT), across1, alpha=-1)  # P A2 d
            hp = torch.bmm(_other_rows(left, co, ci), across2.mT)
            php = _dot(p, hp)
            s = torch.addcmul(s, _column(gamma / php), hp, value=-1)
            last, gamma = gamma, _dot(s, s)
            moves.append(p)
            told += [php, gamma]
            p = torch.addcmul(s, _column(gamma / last), p)
        shares += path.follow(torch.stack(told).tolist(), about.norm)
        if len(shares) >= _TOGETHER or not path.on.any():
            # Behind an item's last direction there may be no numbers.
            part = torch.nan_to_num(torch.stack(moves, 1).flatten(2), 0.0, 0.0, 0.0)
            along = sent(np.stack(shares, 1)[:, None], s).to(s.dtype)
            q, moves, shares = torch.baddbmm(q, along, part), [], []
    change = torch.linalg.solve_triangular(about.lower2.mT, q.view(s.shape).mT, upper=True)  # (B, |K1|*Ch, Ci)
    change = change.view(batch, *k1, -1, ci).permute(0, -2, -1, *range(1, len(k1) + 1))
    return Direction(change, np.sqrt(path.qq), path.gain, ~path.inside, path.steps)


class _Path:
    """Where CG stands, item by item, in units of |R|: what the host makes of what the device tells.

    Attributes:
        on: whether an item goes on.
        inside: whether d is inside the trust region.
        gain: of the residual model, as in `Direction`.
        steps: that were taken.
        qq: |q|^2.
    """

    def __init__(self, eps: float, forcing: Numbers, radius: Numbers, most: Numbers) -> None:
        self.enough, self.reach, self.most, self.eps = 1 - forcing**2, radius**2, most, eps
        self.gain, self.qq, self.qp = np.zeros((3, len(forcing)))
        self.steps = np.zeros(len(forcing), np.int64)
        self.inside = self.on = np.ones(len(forcing), bool)
        self.pp: Numbers | None = None

    def follow(self, told: list[list[float]], norm: Numbers) -> list[Numbers]:
        """How far q goes along each of some steps, (B,), for |s|^2 at first, and p^T H p and |s|^2 of each."""
        with np.errstate(all="ignore"):  # items that are done go on to nowhere
            first, *rest = np.array(told) / norm**2
            if self.pp is None:
                self.pp, self.flat = first, np.maximum(_SETTLED**2 * first, 10 * self.eps)
            return [self._step(php, *gammas) for php, gammas in zip(rest[::2], pairwise([first, *rest[1::2]]), strict=True)]

    def _step(self, php: Numbers, gamma: Numbers, following: Numbers) -> Numbers:
        assert self.pp is not None
        going = self.on & (php > 0)
        share = np.where(going, gamma / php, 0.0)
        further = self.qq + share * (2 * self.qp + share * self.pp)
        within = further <= self.reach
        leaves = going & ~within  # once: |q| grows along CG
        if leaves.any():  # as much of the step as leads to the sphere
            room = np.sqrt(np.maximum(self.qp**2 + self.pp * (self.reach - self.qq), 0.0))
            share = np.where(leaves, (room - self.qp) / self.pp, share)
            further, self.inside = np.where(leaves, self.reach, further), self.inside & ~leaves
        self.qq = np.where(going, further, self.qq)
        self.gain = np.where(going, self.gain + share * (2 * gamma - share * php), self.gain)
        self.steps += self.on
        self.on = going & within & (self.gain < self.enough) & (gamma > self.flat) & (self.steps < self.most)
        ratio = following / gamma
        self.qp, self.pp = ratio * (self.qp + share * self.pp), following + ratio**2 * self.pp
        return share


def across(lower: Tensor, system: Tensor) -> Tensor:
    """L^-1 A^T, (B, n, m), with orthonormal rows, for A^T (B, n, m) and the factor L (B, n, n) of A^T A."""
    return torch.linalg.solve_triangular(lower, system, upper=False)


def ridged_factor(gram: Tensor) -> Tensor:
    """Cholesky factor of the lower triangle of a Gram matrix, (B, n, n), which is overwritten, with a ridge of some roundings.

    For directions only, which a line search judges; never for the answer.
    """
    finfo = torch.finfo(gram.dtype)
    gram.diagonal(dim1=-2, dim2=-1).mul_(1 + 4 * gram.shape[-1] ** 0.5 * finfo.eps).add_(finfo.tiny)
    return torch.linalg.cholesky_ex(gram)[0]


def _other_rows(rows: Tensor, channels: int, others: int) -> Tensor:
    """(B, C, C'*|N|) -> (B, C', C*|N|)."""
    return rows.reshape(len(rows), channels, others, -1).transpose(1, 2).reshape(len(rows), others, -1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, m, n), (B, m, n) -> (B,)."""
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).view(-1)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)
