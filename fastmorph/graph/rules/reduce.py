"""Operators that mix all positions along a dimension: sums, means, softmax, sorting, normalisation.

Along a dimension of channels that ends it, with two exceptions. Where the label changes along another dimension too, every
line is one thing that can be copied whole (a head of attention, a path of a split). A mean, a maximum or a variance stays what
it is when every channel is copied equally often.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fastmorph.graph.edges import NO_EDGES, Edges, chain
from fastmorph.graph.flow import Flow, compress, varying_dims
from fastmorph.graph.record import Grouping
from fastmorph.graph.tracer import Call, NoSuchDimension, Tracer

_ROLES = 62  # a place of the journal's entry beyond any operand's
_MEANS = ("mean", "amax", "amin", "max", "min")
_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
REDUCTIONS = (
    *_MEANS,
    *("sum", "prod", "norm", "linalg_vector_norm", "var", "std", "var_mean", "std_mean", "logsumexp", "all", "any", "median"),
    *("argmax", "argmin", "count_nonzero", "nansum", "nanmean", "mode", "kthvalue"),
)
MIXERS = (
    *("_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "argsort", "topk"),
    *("cummax", "cummin", "_safe_softmax", "renorm"),
)


def reduction(tracer: Tracer, call: Call) -> list[Flow]:
    """Operators that remove dimensions, or leave them with size 1."""
    tensor = call.tensors[0]
    flow, dims, keepdim = tracer.flow(tensor), _dims(call, tensor.ndim), call.args.get("keepdim", False)
    tracer.note(call.name, *dims, keepdim, call.args.get("correction"), call.args.get("ord"), call.args.get("p"))
    fair = call.name in _MEANS or (call.name in ("var", "std") and call.args.get("correction") == 0)
    outs = list(call.out) if isinstance(call.out, tuple | list) else [call.out]
    if not flow.slots:  # a number that may come from a size
        tracer.note(*(tensor.shape[dim] for dim in dims))
    slots = []
    for slot in flow.slots:
        for index in outs[1:]:  # the position of a maximum is another among copies
            tracer.poison(index, [slot], f"{tracer.module} takes positions along them")
        left = mix(tracer, slot, dims, f"takes {call.name} over them", fair=fair and flow.opaque)
        if left is not None:
            slots.append(left if keepdim else _without(left, dims))
    return [Flow(tuple(slots), flow.opaque), *[Flow()] * (len(outs) - 1)]


def mixer(tracer: Tracer, call: Call) -> list[Flow]:
    """Operators that keep the shape."""
    tensor = call.tensors[0]
    flow, dims = tracer.flow(tensor), _dims(call, tensor.ndim)
    tracer.note(call.name, *dims)
    if not flow.slots:
        tracer.note(*(tensor.shape[dim] for dim in dims))
    slots = []
    for slot in flow.slots:
        left = mix(tracer, slot, dims, f"takes {call.name.strip('_')} over them", fair=False)
        if left is not None:
            slots.append(slot)
            if call.name in _SOFTMAX and left is slot and slot.numel() > 1:
                tracer.record.scores.append((tracer.stack[-1], slot.reshape(-1)))
    outs = call.out if isinstance(call.out, tuple | list) else [call.out]
    return [Flow(tuple(slots), flow.opaque)] * len(outs)


def _dims(call: Call, ndim: int) -> tuple[int, ...]:
    given = call.args.get("dim", call.args.get("dims"))
    if given is None or given == []:
        return tuple(range(ndim))
    dims, count = [given] if isinstance(given, int) else given, max(ndim, 1)
    if any(not -count <= dim < count for dim in dims):  # fake tensors take any
        raise NoSuchDimension(f"{call.name} over dimension {given} of a tensor of {ndim}")
    return tuple(sorted(dim % count for dim in dims))


def _without(label: Tensor, dims: Iterable[int]) -> Tensor:
    for dim in sorted(dims, reverse=True):
        label = label.squeeze(dim)
    return label


def mix(tracer: Tracer, slot: Tensor, dims: Iterable[int], does: str, *, fair: bool) -> Tensor | None:
    """What is left of a label when positions along `dims` are mixed: of size 1 along them; None if nothing is.

    `fair`: the result is the same when every position comes equally often.
    """
    inner = sorted(varying_dims(slot) & set(dims))
    if not inner:
        return slot
    outer = [dim for dim in range(slot.ndim) if dim not in inner]
    lines = slot.permute(*outer, *inner).reshape(*(slot.shape[dim] for dim in outer), -1)
    if varying_dims(slot) - set(inner):
        block_mixed(tracer, lines, does)
        tracer.record.tie_edges(chain(lines))
        tracer.record.note_roles(_ROLES, lines.reshape(-1, lines.shape[-1]).T)
        for dim in inner:
            slot = slot.narrow(dim, 0, 1)
        return compress(slot)
    if fair:
        note_normalised(tracer, slot.reshape(1, -1), does)
    else:
        tracer.block([slot], does)
    return None


def block_mixed(tracer: Tracer, lines: Tensor, does: str) -> None:
    """Block the atoms of (*, n) lines that hold other positions as well: these have no copies, and so the line has none."""
    others = lines < 0
    if others.any():
        tracer.block(
            [lines[others.any(-1)]], f"{does}, together with others that stay as they are (data of no layer, constants)"
        )


def note_normalised(tracer: Tracer, lines: Tensor, does: str, attribute: str = "", more: Edges = NO_EDGES) -> None:
    """Each row of `lines`, (groups, n) atoms, is normalised by its own mean or the like."""
    block_mixed(tracer, lines, does)
    groups = torch.arange(len(lines))[:, None].expand_as(lines)
    held = torch.stack([lines, groups], -1).reshape(-1, 2)
    pairs = np.ascontiguousarray(held[held[:, 0] >= 0].numpy())
    name = tracer.stack[-1]
    tracer.record.groupings.append(Grouping(name, attribute, len(lines), lines.reshape(-1), NO_EDGES, more, pairs))
