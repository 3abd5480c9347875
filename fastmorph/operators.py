"""Morphs as functions on a model; each returns a child and leaves the parent as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastmorph.deepen import Deepen
from fastmorph.morph import morph


def deepen(
    model: nn.Module,
    layer: str,
    *,
    hidden_channels: int | None = None,
    kernel_sizes: Sequence[int | Sequence[int]] | None = None,
    activation: str | nn.Module | Callable[[Tensor], Tensor] | None = None,
    norm: str | None = None,
    **common: Any,
) -> nn.Module:
    """Replace one layer by two that compute the same, borders included (Wei et al. 2016, depth morphing).

    Args:
        model: the parent; it is not touched.
        layer: dotted name of an nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, any stride, dilation, groups and padding.
        hidden_channels: C_hid, channels between the two, of all groups together; None: C_out, or where the weight does not
            fit into the first kernel, the smallest number that takes no iteration.
        kernel_sizes: (K1, K2), each an int or one int per spatial dimension; None: the layer's own and 3 (1 where it has 1).
        activation: inserted between the two as its P-activation with a = 1 (see `fastmorph.nn.PActivation`); None: none.
        norm: "batch" inserts a BatchNorm between the two that is the identity in eval mode; None: none.
        **common: `solver`, `backend`, `generator`, `allow_inexact` and `calibrate` of `morph`.

    Returns:
        The child: `layer` is an nn.Sequential with submodules first, norm, activation, second, and in front of them pad or
        widen_pad where the first layer cannot do all the padding itself.

    Raises:
        MorphError: the layer cannot be morphed, with the cause and the remedy.
        InexactMorphError: the equation was not solved exactly.
    """
    return morph(model, [Deepen(layer, hidden_channels, kernel_sizes, activation, norm)], **common).model
