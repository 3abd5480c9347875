"""Products that sum over channels: a weight reads them with its columns and makes new ones with its rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmorph.graph.edges import chain, edges
from fastmorph.graph.flow import FIXED, Flow, compress, is_real
from fastmorph.graph.record import Grouping
from fastmorph.graph.rules.move import merge
from fastmorph.graph.rules.pointwise import combine
from fastmorph.graph.rules.reduce import mix
from fastmorph.graph.tracer import Call, Tracer

_INPUT = "feeds them with data that belong to no layer, e.g. the model's input"
_ROLES = 60  # places of the journal's entry beyond any operand's
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
            tracer.record.mark("shifts", tracer.flow(tensor).slots)
        flow = combine(tracer, [(flow, tuple(call.out.shape)), (tracer.flow(tensor), tuple(tensor.shape))], call.out.ndim)
    return flow


def _dropped(tracer: Tracer, flow: Flow, dim: int) -> list[Tensor]:
    left = [mix(tracer, slot, [dim], "sums over them", fair=False) for slot in flow.slots]
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
    if not any(ins):  # a number that may come from a size
        tracer.note(size)
    outs = [
        [slot for slot in flow.slots if all(slot is not own for own in mine)] for flow, mine in zip((x, y), ins, strict=True)
    ]
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
                if slot.numel() != slot.shape[dim]:  # no rows that could be zero by themselves
                    tracer.record.mark("makes_of_zero", [slot])
                else:
                    tracer.record.add_output(slot.reshape(-1), tracer.record.axis_of(int(slot.flatten()[0])).name)
    if opaque or any(weights):
        tracer.record.mark("writes", slots)
    many = merge(tracer, [slot for slot in slots if slot.numel() > 1])
    if not opaque:
        return Flow((*many, *(slot for slot in slots if slot.numel() == 1)), False, all(weights))
    return Flow((*many, *[slot for slot in slots if slot.numel() == 1][: 0 if many else 1]), True)


def _summed(flow: Flow, size: int) -> list[Tensor]:
    """The slots along the dimension that is summed over, the last."""
    own = flow.along(-1)
    if own or (size > 1 and not flow.uniform):
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
        tracer.record.mark("reads", [column])
        for label in channels:
            tracer.record.tie(column.reshape(-1), label)
            tracer.record.note_roles(_ROLES, label.reshape(-1, label.shape[-1]))
            if not is_real(label):
                mixed_in = column.reshape(-1).expand(label.shape)[label < 0]
                tracer.block([mixed_in], _INPUT)


def _mixed_product(tracer: Tracer, ins: list[Tensor]) -> list[Tensor]:
    """Two activations are multiplied and summed over channels: one number a line, if there are several lines."""
    if not ins:
        return []
    left = []
    for slot in ins:
        one = mix(tracer, slot, [-1 % slot.ndim], _COMPUTED, fair=False)
        if one is not None and slot.numel() > 1:
            left.append(one)
        elif slot.numel() == 1:
            tracer.block([slot], _COMPUTED)
    return merge(tracer, left)


def convolution(tracer: Tracer, call: Call) -> Flow:
    """x (N, Ci, *), weight (Co, Ci / groups, *K), or (Ci, Co / groups, *K) if transposed."""
    x, weight, bias, groups, transposed = (call[name] for name in ("input", "weight", "bias", "groups", "transposed"))
    numbers = (call[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding"))
    tracer.note("convolution", tuple(weight.shape[2:]), *map(str, numbers))
    channels, rest = _channels(tracer, x)
    kernel = tracer.flow(weight)
    made, read = (_axis(kernel, weight, dim) for dim in ((1, 0) if transposed else (0, 1)))
    depthwise = groups > 1 and groups == x.shape[1] == call.out.shape[1]
    if depthwise and transposed:
        made = read
    if kernel.opaque or made is None or (groups > 1 and read is None and not depthwise):
        tracer.block([*channels, *kernel.slots], _COMPUTED)
        return Flow(tuple(rest))
    name = tracer.record.axis_of(int(made[0])).name
    if not (kernel.linear or depthwise):
        tracer.block([*channels, *([] if read is None else [read])], _COMPUTED)
    if groups == 1:
        _read(tracer, [] if read is None else [read], [slot.movedim(1, -1) for slot in channels])
    else:
        vector = torch.full((x.shape[1],), FIXED)
        if len(channels) == 1 and channels[0].numel() == x.shape[1]:
            vector = channels[0].reshape(-1)
        elif channels:
            tracer.block([*channels, *kernel.slots], "has groups whose channels belong to several layers at once")
        if depthwise:  # no sum at all
            tracer.record.tie(vector, made)
            tracer.block([made[vector < 0]], _INPUT)
            tracer.record.depthwise.append((tracer.stack[-1], made))
        else:
            assert read is not None
            made = _grouped(tracer, vector, made, read, call)
    tracer.record.mark("writes", [made])
    tracer.record.add_output(made, name)
    if bias is not None:
        known = tracer.flow(bias).along(0) or tracer.flow(bias).slots[:1]
        tracer.record.mark("shifts", known)
        tracer.record.mark("writes", known)
        for slot in known:
            tracer.record.tie(made, slot)
    return Flow((*rest, compress(made.view([-1 if dim == 1 else 1 for dim in range(x.ndim)]))))


def _channels(tracer: Tracer, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The labels of a convolution's input along its channels, and those that pass."""
    flow = tracer.flow(x)
    if not flow.opaque:
        tracer.record.mark("shifts", flow.slots)  # data that are a parameter
    channels, rest = [], []
    for slot in flow.slots:
        if any(slot.shape[dim] > 1 for dim in range(2, x.ndim)):
            tracer.block([slot], "slides a kernel along them")
        elif slot.shape[1] == x.shape[1] and (slot.numel() > 1 or flow.opaque):
            channels.append(slot)
        elif slot.numel() > 1:
            rest.append(slot)
        elif flow.opaque:
            tracer.block([slot], "reads one channel several times")
    return channels, rest


def _axis(kernel: Flow, weight: Tensor, dim: int) -> Tensor | None:
    """The labels along one dimension of a weight, (size,); None if they are not one layer's."""
    slots = kernel.along(dim)
    if weight.shape[dim] == 1 and len(kernel.slots) == weight.ndim:  # a slot a dimension, in order
        slots = [kernel.slots[dim]]
    if len(slots) != 1 or slots[0].numel() != weight.shape[dim]:
        return None
    return slots[0].reshape(-1)


def _grouped(tracer: Tracer, vector: Tensor, made: Tensor, read: Tensor, call: Call) -> Tensor:
    """Ties of a convolution in groups, whose input's channels are `vector` (Ci,); returns its output's (Co,)."""
    record, groups = tracer.record, call["groups"]
    if not is_real(vector):
        tracer.block([made, read], _INPUT)
    x = vector.view(groups, -1)
    record.mark("reads", [read])
    if call["transposed"]:
        # One column serves every group, so that the outputs need atoms of their own.
        out = record.add_atoms(tracer.stack[-1], groups * len(made)).view(groups, -1)
        record.tie(vector, read)
        record.mark("writes", [made])
        inside = [chain(x.T), edges(out, made)]
    else:
        out = made.view(groups, -1)
        inside = [edges(x, read), chain(out.T)]
    more = [chain(x), edges(x[:, :1], out[:, :1]), chain(out)]
    roles = (record.roles_of(_ROLES, x), record.roles_of(_ROLES + 1, out))
    sides = np.concatenate(inside), np.concatenate(more)
    record.groupings.append(Grouping(tracer.stack[-1], "groups", groups, vector, *sides, roles=roles))
    return out.reshape(-1)


def bilinear(tracer: Tracer, call: Call) -> Flow:
    """x (N, I), weight (O, I, J), y (N, J) -> (N, O), as `nn.Bilinear` has it: the weight reads both inputs."""
    x, weight, y = (call[name] for name in ("i1", "i2", "i3"))
    tracer.note(call.name)
    flows = [tracer.flow(tensor) for tensor in (x, weight, y)]
    ins = [_summed(flow, tensor.shape[-1]) for flow, tensor in ((flows[0], x), (flows[2], y))]
    held = sum(len(flow.slots) for flow in (flows[0], flows[2]))
    form = [call[name] for name in ("expand1", "expand2", "expand3", "sumdim")] == [[1, 3], [0], [1, 2], [2, 3]]
    axes = [_axis(flows[1], weight, dim) for dim in range(3)] if form and flows[1].linear else [None]
    made = axes[0]
    if made is None or not (flows[0].opaque and flows[2].opaque) or held > len(ins[0]) + len(ins[1]):
        tracer.block([slot for flow in flows for slot in flow.slots], _COMPUTED)
        return Flow()
    for columns, channels in zip(axes[1:], ins, strict=True):
        _read(tracer, [] if columns is None else [columns], channels)
    tracer.record.mark("writes", [made])
    tracer.record.add_output(made, tracer.record.axis_of(int(made[0])).name)
    return Flow((compress(made.view(1, -1)),))


def embedding(tracer: Tracer, call: Call) -> list[Flow]:
    """weight (V, D), indices (*) -> (*, D); or a bag of indices a row, with other results behind."""
    weight = call["weight"]
    flow = tracer.flow(weight)
    tracer.note(call.name, call.args.get("mode"))
    out = call.outputs[0]
    tracer.block(flow.along(0), "looks them up by their number")
    slots = [slot.reshape(-1).view([1] * (out.ndim - 1) + [-1]) for slot in flow.along(1) if slot.shape[0] == 1]
    tracer.record.mark("writes", slots)
    for slot in slots:
        tracer.record.add_output(slot.reshape(-1), tracer.record.axis_of(int(slot.flatten()[0])).name)
    return [Flow(tuple(slots)), *[Flow()] * (len(call.outputs) - 1)]
