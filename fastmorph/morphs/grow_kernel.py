"""Kernel size: zeros around a convolution's kernel, and padding that grows with it.

The new taps are zero, so that every output stays as it is while the layer sees a larger field to learn from. Where the map is
padded by as much before as behind, the layer stays the module that it is, with another kernel_size and padding, and so do the
names in the state dict; else, and where the layer padded nothing, so that code around it may do so by its size, it becomes an
nn.Sequential of padding modules (pad, widen_pad) and itself (conv), which shows the old sizes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvTransposeNd

from fastmorph.equation.frame import Size, size_per_dimension
from fastmorph.errors import MorphError
from fastmorph.morphs.padding import frame_padding
from fastmorph.morphs.subnet import frozen_size
from fastmorph.nn import Replacement
from fastmorph.plan.layers import Layer, sizes_of
from fastmorph.plan.memory import check_memory
from fastmorph.plan.morph import M, Options, grow
from fastmorph.plan.operators import register_operator
from fastmorph.plan.transaction import Transaction


@dataclass(frozen=True)
class GrowKernel:
    """Enlarge the kernel of a convolution, as data: its name and the new size, an int or one int per spatial dimension."""

    local: ClassVar[bool] = True
    layer: str
    kernel_size: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel_size", frozen_size(self.kernel_size))

    @property
    def target(self) -> str:
        """The layer."""
        return self.layer

    def apply(self, transaction: Transaction) -> None:
        """Put zeros around the kernel and grow the padding."""
        layer = transaction.find_layer(self.layer, transposed=True)
        size, conv = self._size(layer), layer.module
        if size == layer.kernel:
            return
        check_memory(
            f"layer {layer.name!r}: {self!r}", conv.weight.nbytes // prod(layer.kernel) * prod(size), conv.weight.device
        )
        before = _before(layer, size)
        after = tuple(n - k - b for n, k, b in zip(size, layer.kernel, before, strict=True))
        modules, padding, mode = _padding(layer, size, before, after)
        widths = [width for pair in reversed(list(zip(before, after, strict=True))) for width in pair]

        def surround(tensor: Tensor) -> Tensor:
            return pad(tensor, widths)

        shown, pads_nothing = sizes_of(conv), not any(a or b for a, b in layer.padding())
        transaction.replace(conv.weight, surround(conv.weight.detach()), linear=surround, square=surround)
        conv.kernel_size, conv.padding, conv.padding_mode = size, padding, mode
        # What PyTorch keeps of the padding for the modes other than zeros, last dimension first.
        conv._reversed_padding_repeated_twice = [width for pair in reversed(layer.padding()) for width in pair]
        # Before a layer that pads nothing, code around it may pad, by its kernel_size: that goes on to see the old one.
        if modules or (pads_nothing and not isinstance(conv, _ConvTransposeNd)):
            whole = Replacement(OrderedDict([*modules.items(), ("conv", conv)]))
            vars(whole).update(shown)
            transaction.replace_module(conv, whole, near=conv.weight)

    def _size(self, layer: Layer) -> Size:
        if not layer.dims:
            raise MorphError(f"layer {layer.name!r} cannot be morphed: a Linear has no kernel; name a convolution.")
        try:
            size = size_per_dimension(self.kernel_size, layer.dims)
        except MorphError as error:
            raise MorphError(f"layer {layer.name!r}: {error}") from None
        if any(n < k for n, k in zip(size, layer.kernel, strict=True)):
            raise MorphError(
                f"layer {layer.name!r}: kernel_size={self.kernel_size!r} is smaller than its kernel, {layer.kernel}; give one "
                "that is at least as large in every dimension."
            )
        return size


def _before(layer: Layer, size: Size) -> Size:
    """New taps in front of the old ones: half of them, but under padding="same" those that it pads for, if it can."""
    halves = tuple((n - k) // 2 for n, k in zip(size, layer.kernel, strict=True))
    if layer.module.padding != "same":
        return halves
    padded = [b - a for (a, _), (b, _) in zip(layer.padding(), layer.padding(size), strict=True)]
    if any(width % d for width, d in zip(padded, layer.module.dilation, strict=True)):
        return halves
    return tuple(width // d for width, d in zip(padded, layer.module.dilation, strict=True))


def _padding(layer: Layer, size: Size, before: Size, after: Size) -> tuple[dict[str, nn.Module], Any, str]:
    """Modules in front, and the layer's own padding and padding mode."""
    conv = layer.module
    sides = zip(layer.padding(), conv.dilation, before, after, strict=True)
    wanted = [(a + d * b, z + d * c) for (a, z), d, b, c in sides]
    if isinstance(conv, _ConvTransposeNd):
        if before != after:
            raise MorphError(
                f"layer {layer.name!r} cannot be morphed: a transposed convolution whose kernel grows by an odd number, from "
                f"{layer.kernel} to {size}, makes its map larger; let it grow by an even number in each dimension."
            )
        return {}, tuple(a for a, _ in wanted), conv.padding_mode
    # Beyond the edge any finite value serves, so that replication may go on; reflection and wrapping would need larger maps.
    if conv.padding_mode in ("zeros", "replicate"):
        if conv.padding == "same" and wanted == layer.padding(size):
            return {}, "same", conv.padding_mode
        if all(a == b for a, b in wanted):
            return {}, tuple(a for a, _ in wanted), conv.padding_mode
    modules, own = frame_padding(layer, before, after)
    return modules, own.get("padding", (0,) * layer.dims), own.get("padding_mode", "zeros")


def grow_kernel(model: M, kernel_sizes: Mapping[str, Any], **options: Unpack[Options]) -> M:
    """Enlarge kernels with zeros around them, and the padding with them.

    Args:
        model: the parent; it is not touched.
        kernel_sizes: {layer: kernel size, an int or one int per spatial dimension}, for nn.Conv1d to 3d with any settings, and
            nn.ConvTranspose1d to 3d, which grow by even numbers.
        **options: those of `morph`, see `Options`.

    Returns:
        The child. A layer stays what it is, under its name, where it pads as much before as behind (or "same"), with zeros or
        replicated values; else, and where it pads nothing, it is an nn.Sequential with submodules pad, widen_pad, conv.

    Raises:
        MorphError: the layer cannot be morphed, with the cause and the remedy.
    """
    return grow(model, [GrowKernel(layer, size) for layer, size in kernel_sizes.items()], options)


register_operator(GrowKernel, name="grow_kernel")
