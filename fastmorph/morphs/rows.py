"""New layers in a row, in place of a layer or of a share of it: their sizes, their modules, the equations of their weights.

A row is peeled off one kernel at a time, an equation each, of which the next is known when the last is solved. The sizes alone
decide the architecture, so that it is known before anything is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import skip_init

from fastmorph.equation.decomposition import Decomposition
from fastmorph.equation.frame import Frame, Size, make_frame, size_per_dimension
from fastmorph.equation.problem import Problem
from fastmorph.errors import MorphError
from fastmorph.morphs.padding import frame_padding
from fastmorph.morphs.subnet import LayerSpec, Sequential
from fastmorph.nn import BatchNormLast, PActivation, Replacement, identity_batch_norm
from fastmorph.plan.layers import Layer
from fastmorph.plan.transaction import Transaction

_NORMS = (BatchNormLast, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # by spatial dimensions
CONVS: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Row:
    """Sizes of new layers in a row.

    Attributes:
        specs: the layers.
        sizes: their kernels' sizes.
        offset: where its share of the weight starts in the weight, whose middle it is.
        share: size of that share: the weight's, or where the row reaches less far, as far as it reaches.
        frames: of its equations, one fewer than layers.
        at: where the weight's first tap stands in the row's composed kernel; negative where that reaches less far.
        reach: size of the composed kernel.
    """

    specs: tuple[LayerSpec, ...]
    sizes: tuple[Size, ...]
    offset: Size
    share: Size
    frames: tuple[Frame, ...]
    at: Size
    reach: Size


def make_row(layer: Layer, spec: Sequential) -> Row:
    """Size the layers of a row. Raises MorphError, with the layer, for kernel sizes and channels that are none."""
    dims, groups = layer.dims, layer.groups
    try:
        sizes = tuple(size_per_dimension(each.kernel_size, dims) if dims else () for each in spec.layers)
    except MorphError as error:
        raise MorphError(f"layer {layer.name!r}: {error}") from None
    co, ci = (channels // groups for channels in layer.channels)
    reach = _reach(sizes, dims)
    share = rest = tuple(map(min, reach, layer.kernel))
    offset = tuple((k - n) // 2 for k, n in zip(layer.kernel, share, strict=True))
    before = [-start for start in offset]
    frames: list[Frame] = []
    for index, each in enumerate(spec.layers[:-1]):
        hidden = check_hidden(layer, each.channels) // groups
        last = index == len(sizes) - 2
        second = sizes[-1] if last else _left_over(rest, co, ci, hidden, sizes[index], _reach(sizes[index + 1 :], dims))
        frames.append(make_frame(rest, (sizes[index], second)))
        rest, ci = second, hidden
    placed = [frame.before for frame in frames] or [Frame(share, reach, (1,) * dims).before]
    at = tuple(sum(widths) for widths in zip(before, *placed, strict=True))
    return Row(spec.layers, sizes, offset, share, tuple(frames), at, reach)


def check_hidden(layer: Layer, hidden: Any) -> int:
    """Hidden channels of all groups together. Raises MorphError unless they are a positive int and the groups divide them."""
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1 or hidden % layer.groups:
        raise MorphError(
            f"layer {layer.name!r}: {hidden!r} hidden channels must be a positive int"
            + (f" and a multiple of the layer's {layer.groups} groups." if layer.groups > 1 else ".")
        )
    return hidden


def build_row(
    transaction: Transaction, layer: Layer, row: Row, bias: nn.Parameter | None, names: Mapping[str, str] | None = None
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
        after = tuple(n - b - k for n, b, k in zip(row.reach, row.at, layer.kernel, strict=True))
        pads, options = frame_padding(layer, row.at, after)
        parts.update(pads)
        strided = [max((i for i, size in enumerate(row.sizes) if size[dim] > 1), default=0) for dim in range(layer.dims)]
    co, channels = layer.channels
    for index, (spec, size) in enumerate(zip(row.specs, row.sizes, strict=True)):
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
    transaction: Transaction, layer: Layer, row: Row, modules: Sequence[nn.Module], share: Tensor, part: str = ""
) -> None:
    """Fill the row's layers, so that their composition is its share of the weight, (groups, Co, Ci, *share).

    That queues the first of the row's equations; `part` says for errors which row it is.
    """
    if not transaction.with_weights:
        return
    if not row.frames:  # a single kernel: the share, with zeros around it
        widths = zip(row.reach, row.share, Frame(row.share, row.reach, (1,) * layer.dims).before, strict=True)
        around = [width for n, k, b in reversed(list(widths)) for width in (b, n - k - b)]
        transaction.fill(modules[0], pad(share, around) if around else share)
        return

    def queue(index: int, weight: Tensor) -> None:
        frame, channels = row.frames[index], row.specs[index].channels

        def assign(found: Decomposition) -> None:
            transaction.fill(modules[index], found.first)  # groups join the output channels
            if index + 1 == len(row.frames):
                transaction.fill(modules[index + 1], found.second)
            else:
                queue(index + 1, found.second)

        where = ", ".join(filter(None, (part, f"kernel {index} of {len(modules)}" if len(row.frames) > 1 else "")))
        problem = Problem(weight, int(channels or 0) // layer.groups, (frame.first, frame.second), layer.dims)
        transaction.solve(problem, assign, layer=layer.name, modules=modules, part=where)

    queue(0, share)


def _reach(sizes: Sequence[Size], dims: int) -> Size:
    """Size of the composed kernel."""
    return tuple(sum(size[dim] - 1 for size in sizes) + 1 for dim in range(dims))


def _left_over(rest: Size, co: int, ci: int, hidden: int, first: Size, reach: Size) -> Size:
    """Size of what is left for the next kernels after one of size `first`: the smallest, which makes their equations easy.

    But where the closed form needs the whole weight in what is left (few hidden channels), that is what is left.
    """
    smallest = tuple(max(1, k - n + 1) for k, n in zip(rest, first, strict=True))
    fits = all(n >= k for n, k in zip(reach, rest, strict=True))
    in_first = all(n == 1 for n in smallest) and hidden >= co
    return rest if fits and not in_first and hidden >= ci else smallest
