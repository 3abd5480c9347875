"""A, the linear system F2 A = G of a fixed F1, with its two Gram matrices: by a backend's maps, or as the matrix that it is.

A backend's maps take memory of the kernels' size, and a few launches each: kernels of their own, copies to the layout that
these like, a product for each tap. Where launches cost, an A that is no larger than its Gram matrices is built instead, and
each map is one product without a copy. Products with A are few beside the factor; only its Gram matrix would cost more than by
the backend's map, which leaves out what repeats: that is one product for a small A alone.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastmorph.equation.arrays import host_waits
from fastmorph.equation.backends import Backend
from fastmorph.equation.backends.torch_backend import dense_system, frobenius, pad
from fastmorph.equation.frame import Size, tap_count

_BUILT = 2**22  # numbers in A, an item, up to which it is built
_SMALL = 2**20  # up to which its Gram matrices are products of it


class System:
    """A, (B, n, m), of F1 (B, Ch, Ci, *K1), for second kernels of size `k2`: n = |K2| * Ch rows, tap by tap, and m = |N| * Ci.

    Columns are in an order of their own: `columns`, `image` and `column_gram` have the same.

    Attributes:
        matrix: A itself, with columns channel by channel, where it was built; else None.
        size: N.
        shape: n and m.
    """

    def __init__(self, first: Tensor, k2: Size, backend: Backend) -> None:
        self.first, self.k2, self.backend = first, k2, backend
        self.size = tuple(a + b - 1 for a, b in zip(first.shape[3:], k2, strict=True))
        self.shape = first.shape[1] * tap_count(k2), first.shape[2] * tap_count(self.size)
        numbers = self.shape[0] * self.shape[1]
        self.matrix = dense_system(first, k2) if host_waits(first.device) and numbers <= _BUILT else None
        self.small = self.matrix is not None and numbers <= _SMALL

    @property
    def dense(self) -> Tensor:
        """A itself, with columns channel by channel."""
        return dense_system(self.first, self.k2) if self.matrix is None else self.matrix

    def row_gram(self) -> Tensor:
        """A A^T, (B, n, n), lower triangle at least."""
        if self.matrix is None or not self.small:
            return self.backend.row_gram(self.first, self.k2)
        return torch.bmm(self.matrix, self.matrix.mT)

    def column_gram(self) -> Tensor:
        """A^T A, (B, m, m), lower triangle at least."""
        if self.matrix is None:
            return self.backend.column_gram(self.first, self.k2)
        if self.small:
            return torch.bmm(self.matrix.mT, self.matrix)
        by_tap, ci = self.backend.column_gram(self.first, self.k2), self.first.shape[2]
        return by_tap.view(-1, self.shape[1] // ci, ci, self.shape[1] // ci, ci).permute(0, 2, 1, 4, 3).reshape(by_tap.shape)

    def framed(self, target: Tensor, before: Size) -> tuple[Tensor, Size]:
        """A target and the zeros before it, as the maps take them at once: in its frame, if A was built."""
        return (target, before) if self.matrix is None else (pad(target, before, self.size), (0,) * len(before))

    def columns(self, target: Tensor, before: Size) -> Tensor:
        """A target, (B, Co, Ci, *K), that stands behind `before` zeros in the frame, transposed: (B, m, Co)."""
        target = pad(target, before, self.size)
        if self.matrix is not None:
            return target.flatten(2).mT
        return target.permute(0, *range(3, target.ndim), 2, 1).reshape(len(target), -1, target.shape[1])

    def image(self, columns: Tensor, onto: Tensor | None = None) -> Tensor:
        """A times some columns, (B, m, Co), as a second kernel, (B, Co, Ch, *K2), added to another one."""
        if onto is not None and (self.matrix is None or onto.dtype != columns.dtype):
            return onto + self.image(columns).to(onto.dtype)
        if self.matrix is not None:
            product = torch.bmm if onto is None else partial(torch.baddbmm, self.rows(onto))
            return self.kernel(product(self.matrix, columns))
        b, _, co = columns.shape
        frame = columns.view(b, *self.size, -1, co)
        target = frame.permute(0, -1, -2, *range(1, frame.ndim - 2))
        return self.backend.correlate(target, (0,) * len(self.size), self.first, self.k2)

    def right_side(self, target: Tensor, before: Size) -> Tensor:
        """The image of a target, (B, Co, Ci, *K), as rows, (B, n, Co); the zeros around it need not be multiplied."""
        if self.matrix is not None:
            return torch.bmm(self.matrix, self.columns(target, before))
        return self.rows(self.backend.correlate(target, before, self.first, self.k2))

    def error(self, target: Tensor, before: Size, second: Tensor) -> tuple[Tensor, Tensor]:
        """Target minus composition, (B, Co, Ci, *N), and its norm (B,)."""
        if self.matrix is None:
            return self.backend.error(target, before, self.first, second)
        error = self.missed(target, before, second)
        return error, frobenius(error)

    def missed(self, target: Tensor, before: Size, second: Tensor) -> Tensor:
        """Target minus composition, (B, Co, Ci, *N)."""
        if self.matrix is None:
            return self.backend.error(target, before, self.first, second)[0]
        target = pad(target, before, self.size)
        return torch.baddbmm(target.flatten(2), self.rows(second).mT, self.matrix, alpha=-1).view(target.shape)

    def kernel(self, rows: Tensor) -> Tensor:
        """(B, n, Co) as second kernels, (B, Co, Ch, *K2), a view."""
        by_tap = rows.unflatten(1, (*self.k2, -1))
        return by_tap.permute(0, -1, -2, *range(1, by_tap.ndim - 2))

    def rows(self, second: Tensor) -> Tensor:
        """Second kernels as (B, n, Co), the inverse of `kernel`."""
        return second.permute(0, *range(3, second.ndim), 2, 1).reshape(len(second), -1, second.shape[1])
