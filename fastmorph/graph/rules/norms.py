"""Normalisation layers: batch and instance norm keep channels apart, layer and group norm mix them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastmorph.graph.edges import chain
from fastmorph.graph.flow import Flow, only_along, varying_dims
from fastmorph.graph.rules.pointwise import combine
from fastmorph.graph.rules.reduce import mix, note_normalised
from fastmorph.graph.tracer import Call, Tracer


def batch_norm(tracer: Tracer, call: Call) -> list[Flow]:
    """(N, C, *): per channel; weight, bias and statistics are the channels'."""
    x = call["input"]
    tracer.note("batch_norm", call.args.get("training"), call.args.get("eps", call.args.get("epsilon")))
    out = _affine(tracer, tracer.flow(x), x.shape, 1, call.args, ("weight", "bias", "running_mean", "running_var"))
    if call.args.get("training") is not False and call.args.get("running_mean") is None:
        dims = [0, *range(2, x.ndim)]
        if out.linear and not out.opaque:  # a weight's rows are standardised
            tracer.record.mark("standardised", (slot for slot in out.slots if any(slot.shape[dim] > 1 for dim in dims)))
        else:
            lefts = [mix(tracer, slot, dims, "normalises over them", fair=out.opaque) for slot in out.slots]
            out = Flow(tuple(slot for slot, left in zip(out.slots, lefts, strict=True) if left is not None), out.opaque)
    outs = len(call.out) if isinstance(call.out, tuple | list) else 1
    return [out, *[Flow()] * (outs - 1)]


def _affine(tracer: Tracer, flow: Flow, shape: Any, dim: int, args: dict[str, Any], names: Iterable[str]) -> Flow:
    """Tie a norm's vectors to the channels along `dim`; returns the output's flow."""
    slots = flow.along(dim) or (flow.uniform if shape[dim] == 1 else [])
    vectors = [(name, args[name]) for name in names if args.get(name) is not None]
    for name, vector in vectors:
        label = tracer.flow(vector).along(0) or tracer.flow(vector).slots[:1]
        if flow.opaque:
            tracer.record.mark("writes", label)
        if name in ("bias", "running_mean"):
            tracer.record.mark("shifts", label)
        for slot in slots:
            view = slot.movedim(dim, -1)
            for own in label:
                tracer.record.tie(view, own)
        if not slots:
            tracer.block(label, "scales data that belong to no layer, e.g. the model's input")
    if slots:
        vector = only_along(slots[0], dim, shape[dim])
        if vector is not None:
            tracer.record.norms.append((tracer.stack[-1], vector))
    return flow


def weight_norm(tracer: Tracer, call: Call) -> list[Flow]:
    """A weight g v / ||v||, one norm for each index of a dimension (Salimans and Kingma, 2016).

    As g can make good what becomes of the norms of v (`Record.normed`), the weight is followed as v is.
    """
    v, g, dim = call["v"], call["g"], call["dim"]
    tracer.note(call.name, dim)
    direction, magnitude = tracer.flow(v), tracer.flow(g)
    rows = direction.slots[dim] if len(direction.slots) == v.ndim else None
    if rows is None or len(magnitude.slots) != g.ndim or not (direction.linear and magnitude.linear):
        tracer.block([*direction.slots, *magnitude.slots], "computes a weight of weights that it computes")
        return [Flow(), Flow()]
    tracer.record.tie(rows.reshape(-1), magnitude.slots[dim].reshape(-1))
    one, two = (tracer.record.axis_of(int(flow.slots[dim].flatten()[0])).name for flow in (direction, magnitude))
    if (one, two, dim) not in tracer.record.normed:
        tracer.record.normed.append((one, two, dim))
    return [direction, Flow()]


def group_norm(tracer: Tracer, call: Call) -> list[Flow]:
    """(N, C, *) in groups of channels: groups get wider only all together, or there will be more of them."""
    x, groups = call["input"], call["group"]
    tracer.note("group_norm", call["eps"])
    flow = _affine(tracer, tracer.flow(x), x.shape, 1, call.args, ("weight", "bias"))
    kept: list[Tensor] = []
    for slot in flow.slots:
        if not varying_dims(slot):
            kept.append(slot)
            continue
        vector = only_along(slot, 1, x.shape[1])
        if vector is None:
            tracer.block([slot], "normalises over them")
            continue
        kept.append(slot)
        lines = vector.reshape(groups, -1)
        note_normalised(tracer, lines, "normalises over them", "num_groups", chain(lines))
    return [Flow(tuple(kept), flow.opaque), Flow(), Flow()]


def layer_norm(tracer: Tracer, call: Call) -> list[Flow]:
    """Over the last dimensions."""
    x = call["input"]
    count = len(call["normalized_shape"])
    tracer.note(call.name, call["eps"])
    flow = tracer.flow(x)
    if count == 1:
        flow = _affine(tracer, flow, x.shape, -1, call.args, ("weight", "bias"))
    else:
        for vector in (call.args.get("weight"), call.args.get("bias")):
            if vector is not None:
                combine(tracer, [(flow, tuple(x.shape)), (tracer.flow(vector), tuple(vector.shape))], x.ndim)
    dims = range(x.ndim - count, x.ndim)
    for slot in flow.varying:
        mix(tracer, slot, dims, "normalises over them", fair=flow.opaque)
    outs = len(call.out) if isinstance(call.out, tuple | list) else 1
    return [flow, *[Flow()] * (outs - 1)]
