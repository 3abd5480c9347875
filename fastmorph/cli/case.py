"""What `fastmorph demo` needs to know of a network: how to split its layers, and how to tell that it still does its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Split(NamedTuple):
    """Sizes of two kernels in place of one, and how the picture calls them."""

    hidden_channels: int
    kernel_sizes: Any
    text: str


@dataclass(frozen=True)
class Case:
    """A trained network, how it is deepened, and how to tell that it still does its task.

    Attributes:
        network: the parent.
        factory: package.module:function that builds it.
        shown: the layer that the picture shows.
        enough: how it is split: Claim 1 holds, so that one half-step is exact. The other layers have C_out + 4 hidden channels.
        below: a way to split it for which Algorithm 1 iterates.
        shrunk: a way for Algorithm 2.
        inputs: real inputs of the network, (B, ...).
        shape: an --input-shape.
        report: prints how well parent and child do the task.
    """

    network: nn.Module
    factory: str
    shown: str
    enough: Split
    below: Split
    shrunk: Split
    inputs: Tensor
    shape: tuple[int, ...]
    report: Callable[[nn.Module, nn.Module], None]

    @property
    def sizes(self) -> Mapping[str, Mapping[str, Any]]:
        """Arguments of `fm.Deepen` for layers that are not to have C_out + 4 hidden channels."""
        return {self.shown: {"hidden_channels": self.enough.hidden_channels, "kernel_sizes": self.enough.kernel_sizes}}


def outputs(network: nn.Module, inputs: Tensor) -> Tensor:
    """A network's outputs in eval mode."""
    with torch.no_grad():
        found: Tensor = network.eval()(inputs)
    return found
