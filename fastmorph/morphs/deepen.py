"""Depth: one layer becomes two, with an activation (and a norm) between them that is the identity at birth.

The composition of two convolutions is a convolution with the full convolution of their kernels only while nothing is lost at
the border of the hidden map, so all padding goes to the first layer, enlarged by what the frame adds around the kernel, and the
second layer pads nothing. The hidden map is then as large as the second layer needs and every output pixel is preserved.
Stride goes to the second layer, except in dimensions where its kernel has size 1, which the first layer may stride as well;
dilation is the same in both; the bias is the second layer's. Groups are independent equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

from fastmorph.equation.bounds import smallest_dense
from fastmorph.equation.frame import Frame, make_frame
from fastmorph.errors import MorphError
from fastmorph.morphs.rows import build_row, check_hidden, make_row, solve_row
from fastmorph.morphs.subnet import Activation, LayerSpec, Sequential, frozen_size
from fastmorph.plan.layers import Layer
from fastmorph.plan.morph import M, Options, grow
from fastmorph.plan.operators import register_operator
from fastmorph.plan.transaction import Transaction

_MULTIPLE = 8
_NAMES = {"layer0": "first", "norm0": "norm", "activation0": "activation", "layer1": "second"}


@dataclass(frozen=True)
class Deepen:
    """Replace a layer by nn.Sequential(first, norm, activation, second), as data (the arguments of `deepen`)."""

    local: ClassVar[bool] = True
    layer: str
    hidden_channels: int | str | None = None
    kernel_sizes: Any = None
    activation: Activation = None
    norm: str | None = None

    def __post_init__(self) -> None:
        sizes = self.kernel_sizes
        if isinstance(sizes, list | tuple):
            object.__setattr__(self, "kernel_sizes", tuple(map(frozen_size, sizes)))
        elif sizes is not None and not isinstance(sizes, int):  # an int is refused where it has a meaning
            raise MorphError(
                f"layer {self.layer!r}: kernel_sizes={sizes!r} must hold two entries, one a layer, such as (3, 3)."
            )

    @property
    def target(self) -> str:
        """The layer."""
        return self.layer

    def apply(self, transaction: Transaction) -> None:
        """Replace the layer by two, whose weights solve one equation, a batch of groups."""
        layer = transaction.find_layer(self.layer)
        frame, hidden = self._sizes(layer)
        sizes = (frame.first, frame.second) if layer.dims else self.kernel_sizes
        transaction.resolve(replace(self, hidden_channels=hidden, kernel_sizes=sizes))
        if self.norm not in (None, "batch"):
            raise MorphError(f"layer {layer.name!r}: norm={self.norm!r} must be None or 'batch'.")
        first = LayerSpec(hidden, frame.first, self.activation, self.norm)
        row = make_row(layer, Sequential([first, LayerSpec(None, frame.second)]))
        new = build_row(transaction, layer, row, layer.module.bias, _NAMES)
        solve_row(transaction, layer, row, [new.get_submodule("first"), new.get_submodule("second")], layer.grouped_weight())
        transaction.replace_module(layer.module, new, near=layer.module.weight)

    def _sizes(self, layer: Layer) -> tuple[Frame, int]:
        kernel, groups, (co, ci) = layer.kernel, layer.groups, layer.channels
        try:
            # By default the first layer keeps its size and the second sees its neighbours, if the layer sees any.
            frame = make_frame(kernel, self.kernel_sizes or (kernel, tuple(3 if k > 1 else 1 for k in kernel)))
        except MorphError as error:
            raise MorphError(f"layer {layer.name!r}: {error}") from None
        if self.hidden_channels is not None:
            return frame, check_hidden(layer, self.hidden_channels)
        return frame, _round_up(groups * smallest_dense(frame, co // groups, ci // groups), groups)


def _round_up(channels: int, groups: int) -> int:
    """To a multiple of 8 and of the groups, which devices like; of the groups alone where they are many."""
    step = groups if groups > _MULTIPLE else math.lcm(_MULTIPLE, groups)
    return -(-channels // step) * step


def deepen(
    model: M,
    layer: str,
    *,
    hidden_channels: int | str | None = None,
    kernel_sizes: Sequence[int | Sequence[int]] | None = None,
    activation: Activation = None,
    norm: str | None = None,
    **options: Unpack[Options],
) -> M:
    """Replace one layer by two that compute the same, borders included (Wei et al. 2016, depth morphing).

    Args:
        model: the parent; it is not touched.
        layer: dotted name of an nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, any stride, dilation, groups and padding, or of a
            class that `register_layer` knows, whose effective weight is then split.
        hidden_channels: C_hid, channels between the two, of all groups together; None: the smallest number for which both
            kernels are dense and no iteration is needed, rounded up to a multiple of 8. That is C_out + 4 where the weight fits
            into the first kernel, C_in + 4 where it fits into the second alone (both in each group).
        kernel_sizes: (K1, K2), each an int or one int per spatial dimension; None: the layer's own and 3 (1 where it has 1).
        activation: inserted between the two as its P-activation with a = 1 (see `fastmorph.nn.PActivation`); None: none.
        norm: "batch" inserts a BatchNorm between the two that is the identity in eval mode; None: none.
        **options: those of `morph`, see `Options`.

    Returns:
        The child: `layer` is an nn.Sequential with submodules first, norm, activation, second, and in front of them pad or
        widen_pad where the first layer cannot do all the padding itself.

    Raises:
        MorphError: the layer cannot be morphed, with the cause and the remedy.
        InexactMorphError: the equation was not solved exactly.
    """
    return grow(model, [Deepen(layer, hidden_channels, kernel_sizes, activation, norm)], options)


register_operator(Deepen, name="deepen")
