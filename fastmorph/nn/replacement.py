"""The layers that replace one, in a row."""

from __future__ import annotations

from torch import Tensor, nn


class Replacement(nn.Sequential):
    """An nn.Sequential in the place of a layer, which code around it may still ask for that layer's dtype and device."""

    @property
    def weight(self) -> Tensor:
        """An empty tensor of the layers' dtype and device. There is no one weight: what computes with it fails."""
        first = next(parameter for parameter in self.parameters() if parameter.is_floating_point())
        return first.detach().new_empty(0)
