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

from fastmorph.backends.torch_backend import TorchBackend, taps_first, taps_last
from fastmorph.frame import Size, volume

_REFINEMENTS = 3  # at most; each that does not halve the residual is the last


class HalfStep:
    """The factored system of a fixed F1, (B, Ch, Ci, *K1), for second kernels of size `k2`; solves for many targets."""

    def __init__(self, first: Tensor, k2: Size, backend: TorchBackend) -> None:
        self.first, self.k2, self.backend = first, k2, backend
        self.size = tuple(a + b - 1 for a, b in zip(first.shape[3:], k2, strict=True))
        self.by_rows = first.shape[1] * volume(k2) <= first.shape[2] * volume(self.size)
        gram = backend.row_gram(first, k2) if self.by_rows else backend.column_gram(first, k2)
        self.factor, failed = torch.linalg.cholesky_ex(gram)
        # (smallest / largest pivot)^2 bounds 1 / condition from above: below n * eps no digit of the answer is sure.
        pivots = self.factor.diagonal(dim1=-2, dim2=-1)
        ratio = (pivots.amin(-1) / pivots.amax(-1)).square()
        self.singular = (failed != 0) | ~(ratio > gram.shape[-1] * torch.finfo(gram.dtype).eps)
        self.inverse: Tensor | None = None
        if bool(self.singular.any()):
            self.factor[self.singular] = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            self.inverse = torch.linalg.pinv(backend.dense_system(first[self.singular], k2))

    def solve(self, target: Tensor, before: Size) -> Tensor:
        """Least-squares F2, (B, Co, Ch, *K2), for a target (B, Co, Ci, *K) that stands behind `before` zeros in the frame."""
        b, co, ci = target.shape[:3]
        ch = self.first.shape[1]
        if self.by_rows:
            right = taps_first(self.backend.correlate(target, before, self.first, self.k2))  # (*K2, B, Co, Ch)
            right = right.reshape(volume(self.k2), b, co, ch).permute(1, 0, 3, 2).reshape(b, -1, co)
            second = self._unflatten(torch.cholesky_solve(right, self.factor))
        else:
            right = pad(target, before, self.size).reshape(b, co, -1).mT  # (B, Ci*|N|, Co)
            weights = torch.cholesky_solve(right, self.factor).mT.reshape(b, co, ci, *self.size)
            second = self.backend.correlate(weights, (0,) * len(before), self.first, self.k2)
        if self.inverse is not None:
            padded = pad(target[self.singular], before, self.size).flatten(2)
            second = second.clone()
            second[self.singular] = self._unflatten((padded @ self.inverse).mT)
        return second

    def refined(self, target: Tensor, before: Size) -> Tensor:
        """`solve`, then iterative refinement, item by item, for as long as it halves the residual."""
        best = self.solve(target, before)
        error = self.error(target, before, best)
        norm = batch_norm(error)
        for _ in range(_REFINEMENTS):
            candidate = best + self.solve(error, (0,) * len(before))
            candidate_error = self.error(target, before, candidate)
            candidate_norm = batch_norm(candidate_error)
            better, halved = candidate_norm < norm, candidate_norm < 0.5 * norm
            best = per_item(better, candidate, best)
            error = per_item(better, candidate_error, error)
            norm = torch.where(better, candidate_norm, norm)
            if not bool(halved.any()):
                break
        return best

    def error(self, target: Tensor, before: Size, second: Tensor) -> Tensor:
        """Target minus composition, (B, Co, Ci, *N)."""
        return pad(target, before, self.size) - self.backend.compose(self.first, second)

    def _unflatten(self, rows: Tensor) -> Tensor:
        """(B, |K2|*Ch, Co) -> (B, Co, Ch, *K2)."""
        b, _, co = rows.shape
        by_tap = rows.view(b, volume(self.k2), -1, co).permute(1, 0, 3, 2)  # (|K2|, B, Co, Ch)
        return taps_last(by_tap.reshape(*self.k2, b, co, -1))


def pad(target: Tensor, before: Size, size: Size) -> Tensor:
    """Put a kernel (B, Co, Ci, *K) into a frame of `size`, behind `before` zeros."""
    kernel = target.shape[3:]
    widths: list[int] = []
    for k, b, n in reversed(list(zip(kernel, before, size, strict=True))):
        widths += [b, n - k - b]
    return torch.nn.functional.pad(target, widths) if any(widths) else target


def batch_norm(tensor: Tensor) -> Tensor:
    """Frobenius norm of each batch item, (B, ...) -> (B,)."""
    return tensor.flatten(1).norm(dim=1)


def per_item(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` with a condition of one entry per batch item."""
    return torch.where(condition.view(-1, *(1,) * (yes.ndim - 1)), yes, no)
