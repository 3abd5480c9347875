"""Depth: one layer becomes two, with an activation (and a norm) between them that is the identity at birth.

The composition of two convolutions is a convolution with the full convolution of their kernels only while nothing is lost at
the border of the hidden map, so all padding goes to the first layer, enlarged by what the frame adds around the kernel, and the
second layer pads nothing. The hidden map is then as large as the second layer needs and every output pixel is preserved.
Stride goes to the second layer, except in dimensions where its kernel has size 1, which the first layer may stride as well;
dilation is the same in both; the bias is the second layer's. Groups are independent equations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import skip_init

from fastmorph.bounds import smallest_direct, smallest_half_step
from fastmorph.errors import MorphError
from fastmorph.frame import Frame, make_frame
from fastmorph.layers import Layer, find_layer, replace_layer
from fastmorph.nn import BatchNormLast, PActivation, identity_batch_norm
from fastmorph.problem import Problem

_PADS: dict[str, tuple[Any, ...]] = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
_NORMS = (BatchNormLast, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # by spatial dimensions
Sides = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Deepen:
    """Replace a layer by nn.Sequential(first, norm, activation, second), as data (the arguments of `deepen`)."""

    layer: str
    hidden_channels: int | None = None
    kernel_sizes: Any = None
    activation: str | nn.Module | Callable[[Tensor], Tensor] | None = None
    norm: str | None = None

    def restructure(self, model: nn.Module) -> tuple[nn.Module, Layer, nn.Sequential, Problem]:
        """Replace the layer in `model`, in place, by two whose weights are still unset.

        Returns the model, the replaced layer, the new module and the equation that its two weights solve, a batch of groups.
        """
        layer = find_layer(model, self.layer)
        frame, hidden = self._sizes(layer)
        new = self._build(layer, frame, hidden)
        sizes = (frame.first, frame.second)
        problem = Problem(layer.grouped_weight(), hidden // layer.groups, sizes, layer.dims)
        return replace_layer(model, layer, new), layer, new, problem

    def _sizes(self, layer: Layer) -> tuple[Frame, int]:
        kernel, groups, (co, ci) = layer.kernel, layer.groups, layer.channels
        try:
            # By default the first layer keeps its size and the second sees its neighbours, if the layer sees any.
            frame = make_frame(kernel, self.kernel_sizes or (kernel, tuple(3 if k > 1 else 1 for k in kernel)))
        except MorphError as error:
            raise MorphError(f"layer {layer.name!r}: {error}") from None
        hidden = self.hidden_channels
        if hidden is None:
            per_group = co // groups, ci // groups
            if frame.fits(within_first=True):
                return frame, co
            return frame, groups * (smallest_direct(frame, *per_group) or smallest_half_step(frame, *per_group))
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1 or hidden % groups:
            raise MorphError(
                f"layer {layer.name!r}: hidden_channels={hidden!r} must be a positive int"
                + (f" and a multiple of the layer's {groups} groups." if groups > 1 else ".")
            )
        return frame, hidden

    def _build(self, layer: Layer, frame: Frame, hidden: int) -> nn.Sequential:
        weight, bias = layer.module.weight, layer.module.bias
        made = {"device": weight.device, "dtype": weight.dtype}
        co, ci = layer.channels
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if layer.dims:
            conv, dilation = _conv(layer), layer.module.dilation
            stride = list(zip(layer.module.stride, frame.second, strict=True))
            pads, padding = _first_padding(layer, frame)
            parts.update(pads)
            shared = {"dilation": dilation, "groups": layer.groups, **made}
            parts["first"] = skip_init(
                conv,
                *(ci, hidden, frame.first),
                stride=tuple(s if k == 1 else 1 for s, k in stride),
                **padding,
                bias=False,
                **shared,
            )
            stride2 = tuple(1 if k == 1 else s for s, k in stride)
            second = skip_init(conv, hidden, co, frame.second, stride=stride2, bias=bias is not None, **shared)
        else:
            parts["first"] = skip_init(nn.Linear, ci, hidden, bias=False, **made)
            second = skip_init(nn.Linear, hidden, co, bias=bias is not None, **made)
        if self.norm is not None:
            if self.norm != "batch":
                raise MorphError(f"layer {layer.name!r}: norm={self.norm!r} must be None or 'batch'.")
            parts["norm"] = identity_batch_norm(_NORMS[layer.dims](hidden, **made))
        if self.activation is not None:
            parts["activation"] = PActivation(self.activation).to(**made)
        parts["second"] = second
        for part in (parts["first"], second):
            part.weight.requires_grad_(weight.requires_grad)
        second.bias = bias  # the very parameter, and with it whatever it is tied to
        return nn.Sequential(parts)


def _conv(layer: Layer) -> type[nn.Module]:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[layer.dims - 1]


def _first_padding(layer: Layer, frame: Frame) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Modules that pad in front of the first layer, and the padding arguments of that layer itself."""
    mode = layer.module.padding_mode
    sides = layer.padding()
    dilated = zip(layer.module.dilation, frame.before, frame.after, strict=True)
    extra = [(d * before, d * after) for d, before, after in dilated]
    if mode == "zeros":
        sides, extra = [(a + c, b + d) for (a, b), (c, d) in zip(sides, extra, strict=True)], []
    pads: dict[str, nn.Module] = {}
    # What lies in the enlarged border meets zero taps only, so that there, zeros serve in every mode (and need no larger map).
    for name, pad_mode, amounts in (("pad", mode, sides), ("widen_pad", "zeros", extra)):
        if not any(a or b for a, b in amounts):
            continue
        last = name == "widen_pad" or not any(a or b for a, b in extra)
        if last and all(a == b for a, b in amounts):
            return pads, {"padding": tuple(a for a, _ in amounts), "padding_mode": pad_mode}
        widths = [width for pair in reversed(amounts) for width in pair]
        pads[name] = _PADS[pad_mode][layer.dims - 1](tuple(widths))
    return pads, {}
