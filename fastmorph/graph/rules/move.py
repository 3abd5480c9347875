"""Operators that only move, repeat, drop or join data: the labels take the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmorph.graph.edges import chain
from fastmorph.graph.flow import FIXED, FREE, Flow, compress, is_real, line, varying_dims
from fastmorph.graph.tracer import Call, Tracer, storage_size

KEEP = ("clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh", "lift", "positive", "to", "_conj", "resolve_conj")
MOVE = (
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "numpy_T", "movedim", "expand"),
    *("slice", "select", "narrow", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk"),
    *(
        "unsafe_chunk",
        "unbind",
        "flip",
        "roll",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "native_channel_shuffle",
        "squeeze",
    ),
    *("unsqueeze", "diagonal", "unfold", "repeat", "repeat_interleave", "tile", "rot90", "triu", "tril"),
)
_BY_DIMS = ("permute", "transpose", "flip", "movedim", "pixel_shuffle", "pixel_unshuffle", "rot90", "triu", "tril", "diagonal")
_SHAPED = ("view", "_unsafe_view", "reshape", "_reshape_alias")
_FREED = ("view", "_unsafe_view", "_reshape_alias")  # of a label that is expanded, only `reshape` is always possible


def keep(tracer: Tracer, call: Call) -> Flow:
    """The same data."""
    return tracer.flow(call.tensors[0])


def move(tracer: Tracer, call: Call) -> list[Flow]:
    """The same operator on the labels."""
    tensor = call.tensors[0]
    flow = tracer.flow(tensor)
    outs = pytree.tree_leaves(call.out)
    if not flow.slots:
        tracer.note_move(call.name, call.numbers, *(tuple(out.shape) for out in outs))
        return [flow] * len(outs)
    moved: list[list[Tensor]] = []
    for slot in flow.slots:
        label = slot.expand(tensor.shape)
        result = label.reshape(call.out.shape) if call.name in _FREED else call.on(label)
        moved.append([compress(item) for item in pytree.tree_leaves(result)])
        if call.name in _SHAPED and len(varying_dims(moved[-1][0])) > len(varying_dims(slot)):
            tracer.record.splits.setdefault(tracer.stack[-1], []).append(moved[-1][0])
    if call.name.endswith("split_with_sizes"):
        dim, sizes = call["dim"] % tensor.ndim, call["split_sizes"]
        for labels in moved:
            lines = [line(label, dim).expand(size) for label, size in zip(labels, sizes, strict=True)]
            tracer.record.note_cut(tracer.stack[-1], sizes, lines)
    flows = [Flow(tuple(labels), flow.opaque, flow.linear) for labels in zip(*moved, strict=True)]
    tracer.note_move(call.name, *_fixed(call, tensor.ndim, flow), *map(_fixed_sizes, outs, flows))
    return flows


def _fixed_sizes(tensor: Tensor, flow: Flow) -> tuple[int | None, ...]:
    """A tensor's shape, None for sizes that may grow; those of 1 may, without a label that changes."""
    return tuple(None if size == 1 or flow.along(dim) else size for dim, size in enumerate(tensor.shape))


def _fixed(call: Call, ndim: int, flow: Flow) -> tuple[Any, ...]:
    """The numbers that say what an operator does along dimensions without labels, where these do not tell."""
    if call.name == "roll":
        return tuple(pair for pair in zip(call["dims"], call["shifts"], strict=True) if not flow.along(pair[0]))
    dim = call.args.get("dim", call.args.get("dimension"))
    if isinstance(dim, int):
        return () if flow.along(dim % ndim) else call.numbers
    return call.numbers if call.name in _BY_DIMS else ()


def as_strided(tracer: Tracer, call: Call) -> Flow:
    """Another view of the same memory."""
    tensor, flow = call["self"], tracer.flow(call["self"])
    offset = tensor.storage_offset() if call["storage_offset"] is None else call["storage_offset"]
    slots = []
    for slot in flow.slots:
        memory = torch.full((storage_size(tensor),), FIXED if flow.opaque else FREE)
        memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(slot.expand(tensor.shape))
        slots.append(compress(memory.as_strided(call["size"], call["stride"], offset).clone()))
    found = Flow(tuple(slots), flow.opaque, flow.linear)
    tracer.note_move("as_strided", _fixed_sizes(call.out, found))
    return found


def join(tracer: Tracer, call: Call) -> Flow:
    """`cat`: labels are joined along its dimension; along others, where sizes must agree, they are tied."""
    pairs = [(t, tracer.flow(t)) for t in call["tensors"] if t.numel()]  # cat ignores empty tensors
    dim = call["dim"] % call.out.ndim
    tracer.note_move("cat", dim)
    return joined(tracer, [(tuple(t.shape), flow) for t, flow in pairs], dim)


def stack(tracer: Tracer, call: Call) -> Flow:
    """`stack`: as `cat` of tensors with a dimension of size 1."""
    dim = call["dim"] % call.out.ndim
    pairs = []
    for tensor in call["tensors"]:
        shape = [*tensor.shape[:dim], 1, *tensor.shape[dim:]]
        pairs.append((tuple(shape), tracer.flow(tensor).map(lambda label: label.unsqueeze(dim), tensor.shape)))
    tracer.note_move("stack", dim)
    return joined(tracer, pairs, dim)


def joined(tracer: Tracer, pairs: list[tuple[tuple[int, ...], Flow]], dim: int) -> Flow:
    """The flow of tensors joined along `dim`, each given as its shape and its flow."""
    ndim, opaque = len(pairs[0][0]), any(flow.opaque for _, flow in pairs)
    if opaque:  # a parameter among data is a shift of nothing
        for kind in ("writes", "shifts"):
            tracer.record.mark(kind, (slot for _, flow in pairs if not flow.opaque for slot in flow.slots))
    # Along other dimensions all operands have one size and so, whatever their labels, one meaning.
    slots = merge(tracer, [slot for _, flow in pairs for slot in flow.varying if slot.shape[dim] == 1])
    parts, labelled = [], False
    for shape, flow in pairs:
        own = flow.along(dim) or (flow.uniform if shape[dim] == 1 and flow.opaque else [])
        if len(own) > 1:
            tracer.block(own, "joins tensors whose positions belong to several layers at once")
        labelled |= bool(own)
        opaque |= bool(flow.slots) and not own
        filler = FIXED if flow.opaque or flow.slots else FREE
        parts.append((own[0] if own else torch.full((1,) * ndim, filler), shape))
    if labelled:
        sizes = [max(part.shape[d] for part, _ in parts) for d in range(ndim)]
        pieces = [part.expand([shape[d] if d == dim else sizes[d] for d in range(ndim)]) for part, shape in parts]
        slots.append(compress(torch.cat(pieces, dim)))
    elif len(pairs) > 1:
        opaque = True  # constants may differ
    linear = not opaque and all(flow.linear for _, flow in pairs)
    slots += lonely(tracer, [flow for shape, flow in pairs if shape[dim] > 1 or not labelled], bool(slots))
    return Flow(tuple(slots), opaque, linear)


def merge(tracer: Tracer, slots: list[Tensor]) -> list[Tensor]:
    """One slot for all that change along one dimension, tied; the first stands for the others."""
    kept: list[Tensor] = []
    for slot in slots:
        for place, known in enumerate(kept):
            if varying_dims(known) & varying_dims(slot):
                kept[place] = meet(tracer, known, slot)
                break
        else:
            kept.append(slot)
    return kept


def meet(tracer: Tracer, one: Tensor, two: Tensor) -> Tensor:
    """Two labels of one tensor: tied where both are atoms; an atom that meets data of no channel cannot be copied."""
    tracer.record.tie(one, two)
    if one.shape == two.shape and is_real(one) and is_real(two):
        return one
    one, two = torch.broadcast_tensors(one, two)
    mixed = torch.cat([one[two == FIXED], two[one == FIXED]])
    tracer.block([mixed], "combines them with data that differ from channel to channel and belong to no layer")
    tracer.record.mark("makes_of_zero", [one[two == FREE], two[one == FREE]])  # that constant may not be zero
    label = torch.where(one == FREE, two, one)
    return compress(torch.where((one == FIXED) | (two == FIXED), FIXED, label))


def lonely(tracer: Tracer, flows: list[Flow], varies: bool) -> list[Tensor]:
    """The slots of one element of tensors that meet: tied, and one kept, unless they are spread over other channels."""
    uniform = [slot for flow in flows if flow.opaque for slot in flow.uniform]
    if varies:
        tracer.block(uniform, "spreads one channel over several others")
    if varies or not uniform:
        return []
    for slot in uniform[1:]:
        tracer.record.tie(uniform[0].reshape(-1), slot.reshape(-1))
    return uniform[:1]


def pad(tracer: Tracer, call: Call) -> Flow:
    """Zeros, or another constant, around the data; those beside channels are channels that grow with what they meet."""
    flow, widths = tracer.flow(call["self"]), list(call["pad"])
    still = [place for place in range(len(widths)) if not flow.along(call.out.ndim - 1 - place // 2)]
    tracer.note_move("pad", *((place, widths[place]) for place in still))
    tracer.note("pad", float(call["value"] or 0))
    slots = []
    for slot in flow.slots:
        lines = [torch.full((max(width, 0),), FREE) for width in widths]
        for place, width in enumerate(widths):
            dim, behind = slot.ndim - 1 - place // 2, place % 2
            if slot.shape[dim] == 1 or not width:
                continue
            if width < 0:
                slot = slot.narrow(dim, 0 if behind else -width, slot.shape[dim] + width)
                continue
            lines[place] = tracer.record.add_atoms(tracer.stack[-1], width)
            frame = lines[place].view([-1 if other == dim else 1 for other in range(slot.ndim)])
            frame = frame.expand([width if other == dim else size for other, size in enumerate(slot.shape)])
            slot = torch.cat([slot, frame] if behind else [frame, slot], dim)
        tracer.record.note_cut(tracer.stack[-1], widths, lines)
        slots.append(compress(slot))
    return Flow(tuple(slots), flow.opaque)


def glu(tracer: Tracer, call: Call) -> Flow:
    """a * sigmoid(b) of the two halves a and b: channel i of one is tied to channel i of the other."""
    tensor, dim = call["self"], call["dim"]
    flow = tracer.flow(tensor)
    tracer.note("glu", dim % tensor.ndim)
    slots = []
    for slot in flow.slots:
        first, second = slot.expand(tensor.shape).chunk(2, dim)
        first, second = compress(first.clone()), compress(second.clone())
        tracer.record.tie(first, second)
        slots.append(first)
    return Flow(tuple(slots), flow.opaque, False)


def im2col(tracer: Tracer, call: Call) -> Flow:
    """(N, C, H, W) -> (N, C * |K|, L): each channel as often as the kernel has taps."""
    flow, taps = tracer.flow(call["self"]), call["kernel_size"][0] * call["kernel_size"][1]
    tracer.note("im2col", *call.numbers)
    channels = call["self"].shape[-3]
    slots = []
    for slot in flow.slots:
        if slot.shape[-1] > 1 or slot.shape[-2] > 1:
            tracer.block([slot], "slides a window over a dimension of channels")
        else:
            wide = slot.flatten(-2).expand(*slot.shape[:-3], channels, 1)
            slots.append(compress(wide.repeat_interleave(taps, -2)))
    return Flow(tuple(slots), flow.opaque, False)


def col2im(tracer: Tracer, call: Call) -> Flow:
    """(N, C * |K|, L) -> (N, C, H, W): the taps of one channel are tied."""
    flow, taps = tracer.flow(call["self"]), call["kernel_size"][0] * call["kernel_size"][1]
    tracer.note("col2im", *call.numbers)
    slots = []
    for slot in flow.slots:
        if slot.shape[-1] > 1:
            tracer.block([slot], "adds up windows along a dimension of channels")
        else:
            lines = slot.expand(*slot.shape[:-2], call["self"].shape[-2], 1).unflatten(-2, (-1, taps)).squeeze(-1)
            tracer.record.tie_edges(chain(lines))
            slots.append(compress(lines[..., :1].unsqueeze(-1)))
    return Flow(tuple(slots), flow.opaque, False)
