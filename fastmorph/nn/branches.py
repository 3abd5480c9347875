"""Modules side by side."""

from __future__ import annotations

from torch import Tensor, nn


class Branches(nn.ModuleList):
    """The sum of what its modules make of one input, all of one shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Run every module on the input and add up their outputs."""
        first, *rest = self
        output = first(input)
        for branch in rest:
            output = output + branch(input)
        return output
