"""Morphs as functions on a model; each returns a child and leaves the parent as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastmorph.morphs.deepen import Deepen
from fastmorph.morphs.grow_kernel import GrowKernel
from fastmorph.morphs.insert_subnet import InsertSubnet
from fastmorph.morphs.subnet import Activation, Subnet
from fastmorph.morphs.widen import Widen
from fastmorph.plan.morph import morph


def deepen(
    model: nn.Module,
    layer: str,
    *,
    hidden_channels: int | None = None,
    kernel_sizes: Sequence[int | Sequence[int]] | None = None,
    activation: Activation = None,
    norm: str | None = None,
    **common: Any,
) -> nn.Module:
    """Replace one layer by two that compute the same, borders included (Wei et al. 2016, depth transaction).

    Args:
        model: the parent; it is not touched.
        layer: dotted name of an nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, any stride, dilation, groups and padding.
        hidden_channels: C_hid, channels between the two, of all groups together; None: C_out, or where the weight does not
            fit into the first kernel, the smallest number that takes no iteration.
        kernel_sizes: (K1, K2), each an int or one int per spatial dimension; None: the layer's own and 3 (1 where it has 1).
        activation: inserted between the two as its P-activation with a = 1 (see `fastmorph.nn.PActivation`); None: none.
        norm: "batch" inserts a BatchNorm between the two that is the identity in eval mode; None: none.
        **common: options of `morph`: `solver`, `backend`, `generator`, `allow_inexact`, `calibrate`, ...

    Returns:
        The child: `layer` is an nn.Sequential with submodules first, norm, activation, second, and in front of them pad or
        widen_pad where the first layer cannot do all the padding itself.

    Raises:
        MorphError: the layer cannot be morphed, with the cause and the remedy.
        InexactMorphError: the equation was not solved exactly.
    """
    return morph(model, [Deepen(layer, hidden_channels, kernel_sizes, activation, norm)], **common).model


def widen(
    model: nn.Module,
    channels: Mapping[str, int],
    *,
    example_inputs: Any = None,
    fill: str = "pair",
    **common: Any,
) -> nn.Module:
    """Give layers more output channels, and all that reads them as many inputs, so that the network computes the same.

    Args:
        model: the parent; it is not touched.
        channels: {layer: number of output channels}, in the order in which they are widened.
        example_inputs: a tensor, or a tuple of the model's positional arguments, on which channels are followed through it.
        fill: how new channels cancel in what reads them, see `Widen`.
        **common: options of `morph`.

    Raises:
        MorphError: a layer cannot be widened exactly, with the cause and the remedy.
    """
    plan = [Widen(layer, number, fill) for layer, number in channels.items()]
    return morph(model, plan, example_inputs=example_inputs, **common).model


def grow_kernel(model: nn.Module, kernel_sizes: Mapping[str, Any], **common: Any) -> nn.Module:
    """Enlarge kernels with zeros around them, and the padding with them.

    Args:
        model: the parent; it is not touched.
        kernel_sizes: {layer: kernel size, an int or one int per spatial dimension}, for nn.Conv1d to 3d with any settings, and
            nn.ConvTranspose1d to 3d, which grow by even numbers.
        **common: options of `morph`.

    Returns:
        The child. A layer stays what it is, under its name, where it pads as much before as behind (or "same"), with zeros or
        replicated values; else, and where it pads nothing, it is an nn.Sequential with submodules pad, widen_pad, conv.

    Raises:
        MorphError: the layer cannot be morphed, with the cause and the remedy.
    """
    return morph(model, [GrowKernel(layer, size) for layer, size in kernel_sizes.items()], **common).model


def insert_subnet(model: nn.Module, layer: str, subnet: Subnet, **common: Any) -> nn.Module:
    """Replace a layer by several in a row, or by branches that sum; or put a residual block behind it.

    Args:
        model: the parent; it is not touched.
        layer: dotted name of an nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, any stride, dilation, groups and padding.
        subnet: an `fm.Sequential`, `fm.Stacked` or `fm.Residual`.
        **common: options of `morph`.

    Returns:
        The child. A Sequential is an nn.Sequential with submodules layer0, norm0, activation0, layer1, ...; a Stacked is a
        `fastmorph.nn.Branches` of such, nn.Identity for a Skip; a Residual is an nn.Sequential of the layer itself
        (layer) and the block (residual).

    Raises:
        MorphError: the layer cannot be morphed, with the cause and the remedy.
        InexactMorphError: an equation was not solved exactly.
    """
    return morph(model, [InsertSubnet(layer, subnet)], **common).model
