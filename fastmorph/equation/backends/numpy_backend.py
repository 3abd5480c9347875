"""The numpy float64 reference as a backend: slow, plain and correct."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmorph.equation import reference
from fastmorph.equation.backends.torch_backend import T, TorchBackend


class NumpyBackend(TorchBackend):
    """Composes and solves by the reference, one item at a time."""

    name: ClassVar[str] = "numpy"

    def implementation(self, solver: T, reference: T) -> T:
        """The solver's numpy reference."""
        return reference

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """Full convolution F2 * F1 in float64, (B, Ch, Ci, *K1), (B, Co, Ch, *K2) -> (B, Co, Ci, *N)."""
        if not len(first):
            return super().compose(first, second)
        pairs = zip(first.double().cpu().numpy(), second.double().cpu().numpy(), strict=True)
        return torch.stack([torch.from_numpy(reference.compose(one, two)) for one, two in pairs]).to(first)
