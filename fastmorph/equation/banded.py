"""Cholesky of block-banded systems.

The Gram matrix A^T A of a half-step couples two places of the frame only where one kernel F1 covers both: along the first
spatial dimension, frame rows further apart than K1 - 1 meet in zeros, and the factor keeps those zeros. For 3x3 and 3x3
that is 22/42 of the operations of a dense factor.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

_DOUBT = 2e-12  # 2**13 eps of float64


class BandedCholesky:
    """Factor of (B, n, n) matrices in `count` x `count` blocks that are zero further than `width` from the diagonal."""

    def __init__(self, matrix: Tensor, count: int, width: int) -> None:
        b, n, _ = matrix.shape
        self.width = width
        size = n // count
        grid = matrix.view(b, count, size, count, size)
        self.lower: list[list[Tensor]] = []  # row i holds the blocks (i, i - width) to (i, i)
        info = []
        for i in range(count):
            row: list[Tensor] = []
            start = max(0, i - width)
            for j in range(start, i + 1):
                block = grid[:, i, :, j]
                for k in range(max(0, j - width, start), j):
                    other = self._at(j, k) if j < i else row[k - start]
                    block = torch.baddbmm(block, row[k - start], other.mT, alpha=-1)
                if j < i:
                    row.append(torch.linalg.solve_triangular(self._at(j, j).mT, block, upper=True, left=False))
                else:
                    factor, wrong = torch.linalg.cholesky_ex(block)
                    info.append(wrong)
                    row.append(factor)
            self.lower.append(row)
        self._info = info

    @cached_property
    def failed(self) -> Tensor:
        """Items, (B,), that are not positive definite, or whose pivots say that no digit of a solution would be sure."""
        broken = self._info[0] if len(self._info) == 1 else torch.stack(self._info).amax(0)
        return (broken != 0) | unsure(self.lower)

    def _at(self, i: int, j: int) -> Tensor:
        return self.lower[i][j - i - 1]  # (i, i) is the last of its row

    @property
    def dense(self) -> Tensor:
        """The factor, (B, n, n), where it is one block."""
        ((only,),) = self.lower
        return only

    def solve(self, right: Tensor) -> Tensor:
        """(B, n, m) -> (B, n, m)."""
        count = len(self.lower)
        parts = list(right.chunk(count, 1))
        for i in range(count):
            for k in range(max(0, i - self.width), i):
                parts[i] = torch.baddbmm(parts[i], self._at(i, k), parts[k], alpha=-1)
            parts[i] = torch.linalg.solve_triangular(self._at(i, i), parts[i], upper=False)
        for i in reversed(range(count)):
            for k in range(i + 1, min(count, i + self.width + 1)):
                parts[i] = torch.baddbmm(parts[i], self._at(k, i).mT, parts[k], alpha=-1)
            parts[i] = torch.linalg.solve_triangular(self._at(i, i).mT, parts[i], upper=True)
        return parts[0] if count == 1 else torch.cat(parts, 1)

    def drop_failed(self) -> None:
        """Make failed items harmless: their factor becomes the identity."""
        for row in self.lower:
            for at, block in enumerate(row):
                harmless = torch.zeros_like(block[0])
                if at == len(row) - 1:
                    harmless.diagonal().fill_(1)
                row[at] = torch.where(self.failed[:, None, None], harmless, block)


def unsure(lower: list[list[Tensor]]) -> Tensor:
    """Items whose pivots say that no digit of a solution would be sure, (B,)."""
    pivots = [row[-1].diagonal(dim1=-2, dim2=-1) for row in lower]
    least, most = torch.aminmax(pivots[0] if len(pivots) == 1 else torch.cat(pivots, -1), dim=-1)
    # (least / most)^2 bounds 1 / condition from above. Of a singular matrix the least is what rounding left, n eps times the
    # condition of the rest: for small systems, where the pseudo-inverse costs little, it is told with a margin.
    doubt = max(len(pivots) * pivots[0].shape[-1] * torch.finfo(least.dtype).eps, _DOUBT)
    return ~(least > doubt**0.5 * most)
