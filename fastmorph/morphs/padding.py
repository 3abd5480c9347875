"""Where padding goes when kernels stand in a larger frame than the layer that they replace.

What lies in the enlarged border meets zero taps only, so that zeros serve there in every padding mode. They are put around what
the layer itself pads, in its own mode, and so need no larger map, as reflection and wrapping would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastmorph.plan.layers import Layer

_PADS: dict[str, tuple[Any, ...]] = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def frame_padding(layer: Layer, before: Sequence[int], after: Sequence[int]) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """All padding of a convolution whose kernel becomes one with `before` and `after` more taps in each dimension.

    Returns modules, by name, that pad in front of the first new convolution, and that convolution's own padding arguments. Taps
    may be negative (a branch that reaches less far), which crops.
    """
    mode = layer.module.padding_mode
    sides = layer.padding()
    extra = [(d * b, d * a) for d, b, a in zip(layer.module.dilation, before, after, strict=True)]
    if mode == "zeros":
        sides, extra = [(a + c, b + d) for (a, b), (c, d) in zip(sides, extra, strict=True)], []
    pads: dict[str, nn.Module] = {}
    for name, pad_mode, amounts in (("pad", mode, sides), ("widen_pad", "zeros", extra)):
        if not any(a or b for a, b in amounts):
            continue
        last = name == "widen_pad" or not any(a or b for a, b in extra)
        if last and all(a == b >= 0 for a, b in amounts):
            return pads, {"padding": tuple(a for a, _ in amounts), "padding_mode": pad_mode}
        widths = [width for pair in reversed(amounts) for width in pair]
        pads[name] = _PADS[pad_mode][layer.dims - 1](tuple(widths))
    return pads, {}
