"""The numpy float64 reference as a backend: slow, plain and correct."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmorph.equation import reference
from fastmorph.equation.backends.torch_backend import TorchBackend


class NumpyBackend(TorchBackend):
    """Composes by the reference; `fastmorph.equation.solve` calls the reference's algorithms for it, one item at a time."""

    name = "numpy"

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """Full convolution F2 * F1 in float64, (B, Ch, Ci, *K1), (B, Co, Ch, *K2) -> (B, Co, Ci, *N)."""
        if not len(first):
            return super().compose(first, second)
        pairs = zip(first.double().cpu().numpy(), second.double().cpu().numpy(), strict=True)
        return torch.stack([torch.from_numpy(reference.compose(one, two)) for one, two in pairs]).to(first)
