"""Products that sum over channels: a weight reads them with its columns and makes new ones with its rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmorph.graph.flow import FIXED, Flow, compress
from fastmorph.graph.record import Choice, chain, edges
from fastmorph.graph.rules.move import lonely, merged
from fastmorph.graph.rules.pointwise import combined
from fastmorph.graph.rules.reduce import mixed
from fastmorph.graph.tracer import Call, Tracer

_INPUT = "feeds them with data that belong to no layer, e.g. the model's input"
_COMPUTED = "does not sum over them with a weight, but with a tensor that it computes"


def matrix_product(tracer: Tracer, call: Call) -> Flow:
    """mm, bmm, mv, dot, addmm, baddbmm: (*, m, k) @ (*, k, n) -> (*, m, n)."""
    tracer.note(call.name, *call.numbers)
    matrices = [t for name, t in call.args.items() if isinstance(t, Tensor)]
    added, (one, two) = matrices[:-2], matrices[-2:]
    flow = _product(tracer, one, two)
    if call.name == "addbmm":
        flow = Flow(tuple(_dropped(tracer, flow, 0)), flow.opaque)
    for tensor in added:
        if not tracer.flow(tensor).opaque:
            tracer.record.shift(tracer.flow(tensor).varying)
        flow = combined(tracer, [(flow, tuple(call.out.shape)), (tracer.flow(tensor), tuple(tensor.shape))], call.out.ndim)
    return flow


def _dropped(tracer: Tracer, flow: Flow, dim: int) -> list[Tensor]:
    left = [mixed(tracer, slot, [dim], "sums over them", fair=False) for slot in flow.slots]
    return [slot.squeeze(dim) for slot in left if slot is not None]


def _product(tracer: Tracer, one: Tensor, two: Tensor) -> Flow:
    """The flow of one @ two, of 1, 2 or 3 dimensions each."""
    flows = []
    for tensor, vector_dim in ((one, 0), (two, 1)):
        flow = tracer.flow(tensor)
        if tensor.ndim == 1:
            flow = Flow(tuple(slot.unsqueeze(vector_dim) for slot in flow.slots), flow.opaque, flow.linear)
        flows.append(flow)
    size = one.shape[-1]
    flow = contracted(tracer, flows[0], flows[1], size)
    if one.ndim == 1:
        flow = Flow(tuple(slot.squeeze(-2) for slot in flow.slots), flow.opaque, flow.linear)
    if two.ndim == 1:
        flow = Flow(tuple(slot.squeeze(-1) for slot in flow.slots), flow.opaque, flow.linear)
    return flow


def contracted(tracer: Tracer, x: Flow, y: Flow, size: int) -> Flow:
    """The flow of (*, m, k) @ (*, k, n), `size` being k."""
    # As (*, m, n, k): both products of what does not change along k and sums of what does.
    x = Flow(tuple(slot.unsqueeze(-2) for slot in x.slots), x.opaque, x.linear)
    y = Flow(tuple(slot.transpose(-1, -2).unsqueeze(-3) for slot in y.slots), y.opaque, y.linear)
    ins = [_summed(flow, size) for flow in (x, y)]
    outs = [[slot for slot in flow.slots if all(slot is not own for own in mine)] for flow, mine in zip((x, y), ins, strict=True)]
    weights = [flow.linear and not flow.opaque for flow in (x, y)]
    if weights == [True, True]:
        tracer.block(ins[0] + ins[1], "multiplies two weights over them")
    elif any(weights):
        place = weights.index(True)
        _read(tracer, ins[place], ins[1 - place])
    else:
        outs[0] += _mixed_product(tracer, ins[0] + ins[1])
    opaque = x.opaque or y.opaque
    slots = [slot.squeeze(-1) for slot in outs[0] + outs[1]]
    if weights != [True, True]:
        for flow_slots, weight, dim in zip(outs, weights, (-3, -2), strict=True):
            for slot in flow_slots if weight else []:
                if slot.numel() == slot.shape[dim]:
                    tracer.record.add_output(slot.reshape(-1), tracer.record.axis_of(int(slot.flatten()[0])).name)
    if opaque:
        tracer.record.write(slots)
    many = merged(tracer, [slot for slot in slots if slot.numel() > 1])
    if not opaque:
        return Flow((*many, *(slot for slot in slots if slot.numel() == 1)), False, all(weights))
    return Flow((*many, *[slot for slot in slots if slot.numel() == 1][: 0 if many else 1]), True)


def _summed(flow: Flow, size: int) -> list[Tensor]:
    """The slots along the dimension that is summed over, the last."""
    own = flow.along(-1)
    if own or size > 1 and not flow.uniform:
        return own
    return flow.uniform if len(flow.uniform) == 1 or size == 1 else []


def _read(tracer: Tracer, columns: list[Tensor], channels: list[Tensor]) -> None:
    """A weight's columns, labels that change along the last dimension, meet the channels."""
    if not channels:
        tracer.block(columns, _INPUT)
    if not columns or any(column.numel() != column.shape[-1] for column in columns):
        tracer.block(columns + channels, "sums over them with a weight whose columns belong to several layers at once")
        return
    for column in columns:
        tracer.record.read(column)
        for label in channels:
            tracer.record.tie(column.reshape(-1), label)
            if bool((label < 0).any()):
                mixed_in = column.reshape(-1).expand(label.shape)[label < 0]
                tracer.block([mixed_in], _INPUT)


def _mixed_product(tracer: Tracer, ins: list[Tensor]) -> list[Tensor]:
    """Two activations are multiplied and summed over channels: one number a line, if there are several lines."""
    if not ins:
        return []
    left = []
    for slot in ins:
        one = mixed(tracer, slot, [-1 % slot.ndim], _COMPUTED, fair=False)
        if one is not None and slot.numel() > 1:
            left.append(one)
        elif slot.numel() == 1:
            tracer.block([slot], _COMPUTED)
    return merged(tracer, left)


def convolution(tracer: Tracer, call: Call) -> Flow:
    """x (N, Ci, *), weight (Co, Ci / groups, *K), or (Ci, Co / groups, *K) if transposed."""
    x, weight, bias, groups, transposed = (call[name] for name in ("input", "weight", "bias", "groups", "transposed"))
    numbers = (call[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding"))
    tracer.note("convolution", tuple(weight.shape[2:]), *map(str, numbers))
    flow, kernel = tracer.flow(x), tracer.flow(weight)
    for slot in flow.slots:
        if any(slot.shape[dim] > 1 for dim in range(2, x.ndim)):
            tracer.block([slot], "slides a kernel along them")
    held = [slot for slot in flow.slots if all(slot.shape[dim] == 1 for dim in range(2, x.ndim))]
    channels = [slot for slot in held if slot.shape[1] > 1] or ([s for s in held if s.numel() == 1] if x.shape[1] == 1 else [])
    spread = [slot for slot in held if slot.numel() == 1 and x.shape[1] > 1]
    tracer.block(spread, "reads one channel several times")
    rest = [slot for slot in held if slot.numel() > 1 and slot.shape[1] == 1]
    depthwise = groups > 1 and groups == x.shape[1] == call.out.shape[1]
    rows, columns = _axis(kernel, weight, 0), _axis(kernel, weight, 1)
    if kernel.opaque or not (kernel.linear or depthwise) or rows is None or (columns is None and not depthwise):
        tracer.block([*channels, *kernel.slots], _COMPUTED)
        return Flow(tuple(rest))
    first = rows[0]
    if groups == 1:
        rows, columns = (columns, rows) if transposed else (rows, columns)
        assert rows is not None
        assert columns is not None
        _read(tracer, [columns], [slot.movedim(1, -1) for slot in channels])
    else:
        vector = None
        if len(channels) == 1 and channels[0].numel() in (1, x.shape[1]):
            vector = channels[0].reshape(-1).expand(x.shape[1])
        elif channels:
            tracer.block([*channels, rows, columns], "has groups whose channels belong to several layers at once")
        rows = _grouped(tracer, vector, rows, columns, groups, call)
    tracer.record.write([rows])
    tracer.record.add_output(rows, tracer.record.axis_of(int(first)).name)
    if bias is not None:
        tracer.record.shift(tracer.flow(bias).slots)
        for slot in tracer.flow(bias).slots:
            tracer.record.tie(rows, slot)
            tracer.record.write([slot])
    label = rows.view([-1 if dim == 1 else 1 for dim in range(x.ndim)])
    return Flow((*rest, compress(label)))


def _axis(kernel: Flow, weight: Tensor, dim: int) -> Tensor | None:
    """The labels along one dimension of a weight, (size,); None if they are not one layer's."""
    slots = kernel.along(dim)
    if weight.shape[dim] == 1 and len(kernel.slots) == weight.ndim:  # a slot a dimension, in order
        slots = kernel.slots[dim : dim + 1]
    if len(slots) != 1 or slots[0].numel() != weight.shape[dim]:
        return None
    return slots[0].reshape(-1)


def _grouped(
    tracer: Tracer, vector: Tensor | None, rows: Tensor, columns: Tensor | None, groups: int, call: Call
) -> Tensor:
    """Ties of a convolution in groups, whose channels are `vector` (Ci,); returns its output's atoms (Co,)."""
    record, transposed = tracer.record, call["transposed"]
    per_group, out_per_group = call["input"].shape[1] // groups, call.out.shape[1] // groups
    if vector is None:
        vector = torch.full((groups * per_group,), FIXED)
    if columns is None or (per_group == 1 and out_per_group == 1):  # depthwise: no sum at all
        record.tie(vector, rows)
        tracer.block([rows[vector < 0]], _INPUT)
        record.depthwise.append((tracer.stack[-1], rows))
        return rows
    if bool((vector < 0).any()):
        tracer.block([rows, columns], _INPUT)
    x = vector.view(groups, per_group)
    if transposed:
        # One row serves every group, so that the outputs need atoms of their own.
        out = record.add_atoms(tracer.stack[-1], groups * out_per_group).view(groups, out_per_group)
        record.read(rows)
        record.tie(vector, rows)
        record.write([columns])
        inside = [chain(x.T), edges(out, columns)]
    else:
        out = rows.view(groups, out_per_group)
        record.read(columns)
        inside = [edges(x, columns), chain(out.T)]
    more = [chain(x), edges(x[:, :1], out[:, :1]), chain(out)]
    record.choices.append(Choice(tracer.stack[-1], "groups", groups, vector, np.concatenate(inside), np.concatenate(more)))
    return out.reshape(-1)


def embedding(tracer: Tracer, call: Call) -> Flow:
    """weight (V, D), indices (*) -> (*, D)."""
    weight = call["weight"]
    flow = tracer.flow(weight)
    tracer.note("embedding")
    tracer.block(flow.along(0), "looks them up by their number")
    slots = [slot.reshape(-1).view([1] * (call.out.ndim - 1) + [-1]) for slot in flow.along(1) if slot.shape[0] == 1]
    tracer.record.write(slots)
    for slot in slots:
        tracer.record.add_output(slot.reshape(-1), tracer.record.axis_of(int(slot.flatten()[0])).name)
    return Flow(tuple(slots))
