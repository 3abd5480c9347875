"""Modules side by side."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Branches(nn.ModuleList):
    """The sum of what its modules make of one input, all of one shape."""

    def __init__(self, modules: Iterable[nn.Module] | None = None) -> None:
        super().__init__(modules)

    def forward(self, input: Tensor) -> Tensor:
        """Run every module on the input and add up their outputs."""
        first, *rest = self
        output = first(input)
        for branch in rest:
            output = output + branch(input)
        return output
