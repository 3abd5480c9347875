"""Dense orthogonal maps at linear cost: a few Householder reflections, applied together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmorph.equation.randomness import Stream

_REFLECTIONS = 8


class Turn:
    """An orthogonal H of D rows, the product of a few reflections: H = I - V T V^T with V (D, k), T (k, k).

    That is the compact WY form (Schreiber and Van Loan, 1989): two products with k columns, whatever k is.

    Args:
        sizes: d and D.
        noise: which H.
        centred: whether H takes [1, ..., 1, 0, ..., 0] (d ones) to a multiple of the vector of D ones.
    """

    def __init__(self, sizes: tuple[int, int], noise: Stream, *, centred: bool) -> None:
        small, large = sizes
        like = torch.empty(0, dtype=torch.float64)
        vectors = noise.tensor((_REFLECTIONS, large), like).numpy()
        if centred:
            vectors -= vectors.mean(1, keepdims=True)
            vectors[0] = -(large**-0.5)
            vectors[0, :small] += small**-0.5
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        inner = np.zeros((_REFLECTIONS, _REFLECTIONS))
        for at, vector in enumerate(vectors):
            inner[at, :at] = -2 * (vector @ vectors[:at].T) @ inner[:at, :at]
            inner[at, at] = 2
        self._vectors, self._inner = torch.from_numpy(vectors.T.copy()), torch.from_numpy(inner)

    def apply(self, tensor: Tensor, dim: int, *, back: bool = False) -> Tensor:
        """H along a dimension of D entries, or its transpose, in place; a contiguous tensor of float32 or float64, returned."""
        vectors, inner = (each.to(tensor) for each in (self._vectors, self._inner.T if back else self._inner))
        before, after = tensor.shape[:dim].numel(), tensor.shape[dim + 1 :].numel()
        if after == 1:
            flat = tensor.view(before, -1)
            flat.addmm_(flat @ vectors, inner.T @ vectors.T, alpha=-1)
        else:
            for part in tensor.view(before, -1, after):
                part.addmm_(vectors @ inner, vectors.T @ part, alpha=-1)
        return tensor
