"""What a layer can become, as frozen data: layers in a row, branches that sum, or the layer and a residual block behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastmorph.errors import MorphError
from fastmorph.plan.operators import register_part

Activation = str | nn.Module | Callable[[Tensor], Tensor] | None


def frozen_size(size: Any) -> int | tuple[int, ...]:
    """A kernel size that can be compared and hashed. Raises MorphError for what is none."""
    if isinstance(size, int):
        return size
    if isinstance(size, list | tuple):
        return tuple(size)
    raise MorphError(f"kernel_size={size!r} must be an int or one int per spatial dimension.")


@dataclass(frozen=True)
class LayerSpec:
    """One new layer.

    Attributes:
        channels: its output channels, of all groups together; None for the last one of a sequence, which has the layer's own.
        kernel_size: an int or one int per spatial dimension; None: 1. Without meaning for linear layers.
        activation: behind it (and its norm) as a P-activation with a = 1, see `fastmorph.nn.PActivation`; None: none.
        norm: "batch" puts a BatchNorm behind it that is the identity in eval mode; None: none.
    """

    channels: int | None = None
    kernel_size: Any = 1
    activation: Activation = None
    norm: str | None = None

    def __post_init__(self) -> None:
        if self.kernel_size is None:
            object.__setattr__(self, "kernel_size", 1)
        if self.channels is not None and (isinstance(self.channels, bool) or not isinstance(self.channels, int)):
            raise MorphError(f"channels={self.channels!r} of a new layer must be an int, or None for the last one.")
        if self.norm not in (None, "batch"):
            raise MorphError(f"norm={self.norm!r} of a new layer must be None or 'batch'.")
        object.__setattr__(self, "kernel_size", frozen_size(self.kernel_size))


@dataclass(frozen=True)
class Sequential:
    """New layers in a row.

    `layers` are `LayerSpec`s or tuples of their arguments, (channels, kernel_size, activation, norm), from the input to the
    output; the last one's channels are None. A single layer is the layer itself, or in a branch its share of it.

    Raises MorphError if there is none, or channels are missing.
    """

    layers: tuple[LayerSpec, ...]

    def __init__(self, layers: Sequence[LayerSpec | Sequence[Any]]) -> None:
        specs = tuple(spec if isinstance(spec, LayerSpec) else LayerSpec(*spec) for spec in layers)
        channels = [spec.channels for spec in specs]
        if not specs or channels[-1] is not None or None in channels[:-1]:
            raise MorphError(
                "a Sequential has one entry a new layer, (channels, kernel_size, activation), and the channels of the last one "
                f"alone are None (the layer's own); got {channels}."
            )
        object.__setattr__(self, "layers", specs)


@dataclass(frozen=True)
class Skip:
    """A branch that is the identity, where the layer has as many outputs as inputs and keeps its map's size."""


@dataclass(frozen=True)
class Stacked:
    """Branches side by side, each a `Sequential`, at most one of them a `Skip`, whose outputs sum.

    Raises MorphError if that is not what they are.
    """

    branches: tuple[Sequential | Skip, ...]

    def __init__(self, branches: Sequence[Sequential | Skip]) -> None:
        branches = tuple(branches)
        skips = sum(isinstance(branch, Skip) for branch in branches)
        if skips > 1 or len(branches) == skips or not all(isinstance(branch, Sequential | Skip) for branch in branches):
            raise MorphError("a Stacked has branches, each an fm.Sequential, and at most one of them may be an fm.Skip.")
        object.__setattr__(self, "branches", branches)


@dataclass(frozen=True)
class Residual:
    """A residual block behind the layer, y = x + F2(phi(F1 x)), with F1 = [S; S] and F2 = [R | -R]: exact for every phi.

    Attributes:
        hidden_channels: even: each channel has a twin that cancels it at birth; training parts them.
        kernel_size: of both layers, an int or one int per spatial dimension; without meaning for linear layers.
        activation: phi itself (no P-activation is needed), a name, function or elementwise module.
        norm: "batch" puts a BatchNorm before phi, exact in train mode too; None: none.
    """

    hidden_channels: int
    kernel_size: Any = 3
    activation: str | nn.Module | Callable[[Tensor], Tensor] = "relu"
    norm: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.hidden_channels, bool) or not isinstance(self.hidden_channels, int) or self.hidden_channels < 2:
            raise MorphError(f"hidden_channels={self.hidden_channels!r} of a Residual must be an even int, 2 or more.")
        if self.hidden_channels % 2:
            raise MorphError(
                f"hidden_channels={self.hidden_channels} of a Residual must be even: each channel cancels against a twin."
            )
        if self.activation is None:
            raise MorphError("a Residual without an activation would be one linear layer: give it one, such as 'relu'.")
        if self.norm not in (None, "batch"):
            raise MorphError(f"norm={self.norm!r} of a Residual must be None or 'batch'.")
        object.__setattr__(self, "kernel_size", frozen_size(self.kernel_size))


Subnet = Sequential | Stacked | Residual

register_part(LayerSpec, name="layer")
register_part(Sequential, name="sequential")
register_part(Skip, name="skip")
register_part(Stacked, name="stacked")
register_part(Residual, name="residual")
