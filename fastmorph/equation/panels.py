"""Blocked Cholesky of batches, for devices whose own works on one matrix at a time, or with one processor each.

Left-looking: a panel of columns is updated by all before it, its corner is factored, and what is below the corner is multiplied
by the corner's inverse. All but the corners, a share of panel / n of the work, is batched products; solves are, too.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fastmorph.equation.banded import unsure

_PANEL = 256  # columns


class PanelCholesky:
    """Factor of the lower triangles of (B, n, n) matrices, which are overwritten."""

    def __init__(self, matrix: Tensor) -> None:
        n = matrix.shape[1]
        self._lower, self._info = matrix, []
        self._panels = [slice(at, min(at + _PANEL, n)) for at in range(0, n, _PANEL)]
        self._inverses: list[Tensor] = []  # of the corners
        for panel in self._panels:
            at, end = panel.start, panel.stop
            columns = matrix[:, at:, panel]
            if at:
                columns = torch.baddbmm(columns, matrix[:, at:, :at], matrix[:, panel, :at].mT, alpha=-1)
            corner, wrong = torch.linalg.cholesky_ex(columns[:, : end - at])
            eye = torch.eye(end - at, dtype=matrix.dtype, device=matrix.device).expand_as(corner)
            self._inverses.append(torch.linalg.solve_triangular(corner, eye, upper=False))
            self._info.append(wrong)
            matrix[:, panel, panel] = corner
            if end < n:
                matrix[:, end:, panel] = torch.bmm(columns[:, end - at :], self._inverses[-1].mT)

    @cached_property
    def failed(self) -> Tensor:
        """Items, (B,), that are not positive definite, or whose pivots say that no digit of a solution would be sure."""
        return (torch.stack(self._info).amax(0) != 0) | unsure([[self._lower]])

    @property
    def dense(self) -> Tensor:
        """The factor, (B, n, n), in the lower triangle."""
        return self._lower

    def solve(self, right: Tensor) -> Tensor:
        """(B, n, m) -> (B, n, m)."""
        out = torch.empty_like(right, memory_format=torch.contiguous_format)
        for panel, inverse in zip(self._panels, self._inverses, strict=True):
            before = slice(0, panel.start)
            rest = torch.baddbmm(right[:, panel], self._lower[:, panel, before], out[:, before], alpha=-1)
            out[:, panel] = torch.bmm(inverse, rest)
        for panel, inverse in zip(reversed(self._panels), reversed(self._inverses), strict=True):
            behind = slice(panel.stop, None)
            rest = torch.baddbmm(out[:, panel], self._lower[:, behind, panel].mT, out[:, behind], alpha=-1)
            out[:, panel] = torch.bmm(inverse.mT, rest)
        return out

    def drop_failed(self) -> None:
        """Make failed items harmless: their factor becomes the identity."""
        for panel, inverse in zip(self._panels, self._inverses, strict=True):
            for block in (inverse, self._lower[:, panel, panel]):
                block[self.failed] = torch.eye(block.shape[-1], dtype=block.dtype, device=block.device)
            self._lower[:, panel.stop :, panel][self.failed] = 0.0
