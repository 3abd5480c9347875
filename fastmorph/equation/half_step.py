"""One half-step of the paper's algorithms: with F1 fixed, the least-squares F2 of smallest norm.

F2 A = G is solved through the smaller of two Gram matrices: A A^T, n = Ch * |K2| unknowns, where the system is
overdetermined; A^T A, m = Ci * |N| equations, where it is not, which gives the solution of minimum norm. Cholesky on a Gram
matrix squares the condition; iterative refinement against A itself wins the digits back. An item whose Gram matrix is
numerically singular (a rank-deficient F1) is solved by the pseudo-inverse of A instead: the same least-squares solution of
minimum norm, with the condition unsquared. Nothing is regularised.

The half-step for F1 is the one for F2 on the transposed equation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmorph.equation.arrays import host_waits
from fastmorph.equation.backends import Backend
from fastmorph.equation.backends.torch_backend import dense_system, frobenius, pad
from fastmorph.equation.frame import Size
from fastmorph.equation.panels import PanelCholesky
from fastmorph.equation.system import System

_MOST_PRODUCTS = 2000  # of blocks in one factorisation; for longer kernels blocks are too many and too small
_ROUNDING = 32  # eps: an error that no refinement makes smaller
_REFINEMENTS = 3  # at most; each that does not halve the residual is the last
_REFINEMENTS_UNSEEN = 1  # where the host does not wait to see what they do; an item keeps one that brings it nearer
_ALONE = 512  # unknowns of each item up to which a device may factor many matrices with one processor each


class HalfStep:
    """The factored system of a fixed F1, (B, Ch, Ci, *K1), for second kernels of size `k2`; solves for many targets."""

    def __init__(self, first: Tensor, k2: Size, backend: Backend, *, wait: bool = True, coarse: Backend | None = None) -> None:
        """Factor the system. `wait=False` never waits for the device, in refinement either, and only tells singular items.

        A `coarse` backend solves in float32, for refinement against errors in the dtype of `first`.
        """
        self.wait = wait
        self.system = System(first, k2, backend)
        self.solver = system = self.system if coarse is None else System(first.float(), k2, coarse)
        self.by_rows = system.shape[0] <= system.shape[1]
        gram = system.row_gram() if self.by_rows else system.column_gram()
        # No kernel covers two frame rows further apart than K1 - 1: there the columns' Gram matrix and its factor are zero.
        blocks, width = (1, 0) if self.by_rows or not k2 else (system.size[0], first.shape[3] - 1)
        if host_waits(first.device) or blocks * (width + 1) ** 2 > _MOST_PRODUCTS:  # there few launches count for more
            blocks, width = 1, 0
        by_panels = host_waits(first.device) and len(gram) > 1 and gram.shape[1] > _ALONE
        self.factor = PanelCholesky(gram) if by_panels else backend.factor(gram, blocks, width)
        self.inverse: Tensor | None = None
        if wait and bool(self.singular.any()):
            self.factor.drop_failed()
            self.inverse = torch.linalg.pinv(dense_system(first[self.singular], k2))

    @property
    def singular(self) -> Tensor:
        """Items, (B,), whose Gram matrix is numerically singular."""
        return self.factor.failed

    def corrected(self, second: Tensor, error: Tensor) -> Tensor:
        """F2, (B, Co, Ch, *K2), with what solves for its error, (B, Co, Ci, *N)."""
        nothing = (0,) * len(self.system.size)
        if self.by_rows or self.inverse is not None:
            return second + self.solve(error, nothing)
        columns = self.solver.columns(error.to(self.solver.first.dtype), nothing)
        return self.solver.image(self.factor.solve(columns), second)

    def solve(self, target: Tensor, before: Size) -> Tensor:
        """Least-squares F2, (B, Co, Ch, *K2), for a target (B, Co, Ci, *K) that stands behind `before` zeros in the frame."""
        system, given = self.solver, target.to(self.solver.first.dtype)
        if self.by_rows:
            second = system.kernel(self.factor.solve(system.right_side(given, before)))
        else:
            second = system.image(self.factor.solve(system.columns(given, before)))
        second = second.to(target.dtype)
        if self.inverse is not None:
            padded = pad(target[self.singular], before, self.system.size).flatten(2)
            second = second.clone()
            second[self.singular] = self.system.kernel((padded @ self.inverse).mT)
        return second

    def refined(
        self, second: Tensor, error: Tensor, norm: Tensor, target: Tensor, before: Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Iterative refinement of a solution, its error and the norm of that, item by item, while it halves the error."""
        if not self.wait:
            for _ in range(_REFINEMENTS_UNSEEN):
                second, error, norm = self.refine(second, error, norm, target, before)
            return second, error, norm
        rounding = _ROUNDING * torch.finfo(norm.dtype).eps * frobenius(target)
        for _ in range(_REFINEMENTS):
            if bool((norm <= rounding).all()):
                break
            last = norm
            second, error, norm = self.refine(second, error, norm, target, before)
            if not bool((norm < 0.5 * last).any()):
                break
        return second, error, norm

    def refine(
        self, second: Tensor, error: Tensor, norm: Tensor, target: Tensor, before: Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of iterative refinement, for the items that it brings nearer."""
        candidate = self.corrected(second, error)
        candidate_error, candidate_norm = self.error(target, before, candidate)
        better = candidate_norm < norm
        error = per_item(better, candidate_error, error)
        return per_item(better, candidate, second), error, torch.where(better, candidate_norm, norm)

    def error(self, target: Tensor, before: Size, second: Tensor) -> tuple[Tensor, Tensor]:
        """Target minus composition, (B, Co, Ci, *N), and its norm (B,)."""
        return self.system.error(target, before, second)


def per_item(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` with a condition of one entry per batch item."""
    return torch.where(condition.view(-1, *(1,) * (yes.ndim - 1)), yes, no)
