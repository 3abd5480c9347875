"""New layers in a row, in place of a layer or of a share of it: their sizes, their modules, the equations of their weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import skip_init

from fastmorph.equation.decomposition import Decomposition
from fastmorph.equation.peel import Peeling, plan_peeling
from fastmorph.errors import MorphError
from fastmorph.morphs.padding import frame_padding
from fastmorph.morphs.subnet import LayerSpec, Sequential
from fastmorph.nn import (
    BatchNormLast,
    BatchNormMap1d,
    BatchNormMap2d,
    BatchNormMap3d,
    PActivation,
    Replacement,
    identity_batch_norm,
)
from fastmorph.plan.layers import Layer
from fastmorph.plan.transaction import Transaction

_NORMS = (BatchNormLast, BatchNormMap1d, BatchNormMap2d, BatchNormMap3d)  # by spatial dimensions
CONVS: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerRow:
    """New layers in a row, and the sizes of the equations of their weights, group by group."""

    specs: tuple[LayerSpec, ...]
    peeling: Peeling


def make_row(layer: Layer, spec: Sequential) -> LayerRow:
    """Size the layers of a row. Raises MorphError, with the layer, for kernel sizes and channels that are none."""
    hidden = [check_hidden(layer, each.channels) // layer.groups for each in spec.layers[:-1]]
    co, ci = (channels // layer.groups for channels in layer.channels)
    try:
        peeling = plan_peeling(layer.kernel, co, ci, hidden, [each.kernel_size for each in spec.layers])
    except MorphError as error:
        raise error.within(f"layer {layer.name!r}") from None
    return LayerRow(spec.layers, peeling)


def check_hidden(layer: Layer, hidden: Any) -> int:
    """Hidden channels of all groups together. Raises MorphError unless they are a positive int and the groups divide them."""
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1 or hidden % layer.groups:
        raise MorphError(
            f"layer {layer.name!r}: {hidden!r} hidden channels must be a positive int"
            + (f" and a multiple of the layer's {layer.groups} groups." if layer.groups > 1 else ".")
        )
    return hidden


def build_row(
    transaction: Transaction, layer: Layer, row: LayerRow, bias: nn.Parameter | None, names: Mapping[str, str] | None = None
) -> Replacement:
    """The modules layer0, norm0, activation0, layer1, ..., or as `names` calls them; the layers' weights are not set.

    All padding is in front of or in the first layer. In each dimension, the stride is the last layer's that has more than one
    tap there, the first one's if none has.
    """
    device = "meta" if transaction.with_weights else layer.module.weight.device
    weight = layer.module.weight
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    options: dict[str, Any] = {}
    strided: list[int] = []
    if layer.dims:
        after = tuple(n - b - k for n, b, k in zip(row.peeling.reach, row.peeling.before, layer.kernel, strict=True))
        pads, options = frame_padding(layer, row.peeling.before, after)
        parts.update(pads)
        strided = [
            max((i for i, size in enumerate(row.peeling.sizes) if size[dim] > 1), default=0) for dim in range(layer.dims)
        ]
    co, channels = layer.channels
    for index, (spec, size) in enumerate(zip(row.specs, row.peeling.sizes, strict=True)):
        last = index == len(row.specs) - 1
        new = co if last else int(spec.channels or 0)
        if layer.dims:
            strides = zip(layer.module.stride, strided, strict=True)
            options["stride"] = tuple(stride if where == index else 1 for stride, where in strides)
            options |= {"dilation": layer.module.dilation, "groups": layer.groups, "kernel_size": size}
        made: Any = skip_init(
            CONVS[layer.dims], channels, new, bias=last and bias is not None, device=device, dtype=weight.dtype, **options
        )
        made.weight.requires_grad_(weight.requires_grad)
        if last:
            made.bias = bias  # the very parameter, and with it whatever it is tied to
        parts[f"layer{index}"] = made
        if spec.norm is not None:
            parts[f"norm{index}"] = make_norm(transaction, layer, new)
        if spec.activation is not None:
            parts[f"activation{index}"] = PActivation(deepcopy(spec.activation)).to(weight)
        channels, options = new, {}
    names = names or {}
    return Replacement(OrderedDict((names.get(name, name), module) for name, module in parts.items()))


def make_norm(transaction: Transaction, layer: Layer, channels: int) -> nn.Module:
    """A BatchNorm for that many channels of the layer's map, the identity in eval mode, to be calibrated."""
    weight = layer.origin
    norm: nn.Module = identity_batch_norm(_NORMS[layer.dims](channels, device=weight.device, dtype=weight.dtype))
    transaction.norms.append(norm)
    return norm


def solve_row(
    transaction: Transaction, layer: Layer, row: LayerRow, modules: Sequence[nn.Module], share: Tensor, part: str = ""
) -> None:
    """Fill the row's layers, so that their composition is its share of the weight, (groups, Co, Ci, *share).

    That queues the first of the row's equations; `part` says for errors which row it is.
    """
    if not transaction.with_weights:
        return
    peeling = row.peeling
    if not peeling.frames:
        transaction.fill(modules[0], peeling.single(share))
        return

    def queue(index: int, rest: Tensor) -> None:
        def assign(found: Decomposition[Tensor]) -> None:
            transaction.fill(modules[index], found.first)  # groups join the output channels
            if index + 1 == len(peeling.frames):
                transaction.fill(modules[index + 1], found.second)
            else:
                queue(index + 1, found.second)

        where = ", ".join(filter(None, (part, f"kernel {index} of {len(modules)}" if len(peeling.frames) > 1 else "")))
        transaction.solve(peeling.problem(index, rest), assign, layer=layer.name, modules=modules, part=where)

    queue(0, share)
