"""Elementwise operators: channels at one position are tied, whatever the function."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmorph.graph.flow import Flow, aligned, varying_dims
from fastmorph.graph.rules.move import lonely, merge
from fastmorph.graph.tracer import Call, Tracer

# Those that PyTorch does not tag as pointwise.
EXTRA = (
    *("hardswish", "_prelu_kernel", "prelu", "rrelu_with_noise", "log_sigmoid_forward", "floor_divide", "copy", "dropout"),
    *("native_dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "view_as_real", "_assert_tensor_metadata"),
)
_RANDOM = ("native_dropout", "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "rrelu_with_noise")


def pointwise(tracer: Tracer, call: Call) -> Flow | list[Flow]:
    """All operands at one position, in broadcasting's sense."""
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    tracer.note(call.name, *call.numbers)
    tensors = [t for t in call.tensors if t.numel()]
    if call.name == "copy":
        tensors = tensors[1:]
    flow = combine(tracer, [(tracer.flow(t), _extent(t)) for t in tensors], out.ndim)
    if call.name in ("add", "sub", "copy"):
        flows = [tracer.flow(tensor) for tensor in tensors]
        tracer.record.mark("shifts", (slot for known in flows if not known.opaque for slot in known.slots))
    if _draws(call):
        tracer.block(flow.slots, "draws random numbers for them")
    if _stays_linear(tracer, call, tensors):
        flow = Flow(flow.slots, flow.opaque, True)
    return [flow] * (1 if isinstance(call.out, Tensor) else len(call.out))


def _draws(call: Call) -> bool:
    """Whether other random numbers meet each channel, and each copy."""
    return call.name in _RANDOM and call.args.get("train", call.args.get("training")) is not False


def _extent(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's shape, with size 1 where it is expanded."""
    return tuple(1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _stays_linear(tracer: Tracer, call: Call, tensors: list[Tensor]) -> bool:
    """Whether the result is linear in the parameter that its labels belong to."""
    flows = [tracer.flow(tensor) for tensor in tensors]
    if call.name == "neg" or (call.name in ("mul", "div") and len(flows) == 1):
        return flows[0].linear
    if call.name not in ("mul", "div") or len(flows) != 2:
        return False
    one, two = ([aligned(slot, call.out.ndim) for slot in flow.varying] for flow in flows)
    shared = [slot for slot in one + two if all(any(_meet(slot, other) for other in side) for side in (one, two))]
    if any(flow.linear for flow in flows):
        tracer.record.mark("bent", shared)  # along other dimensions, the other factor is a number
    if call.name == "div":
        return flows[0].linear and all(any(_meet(slot, other) for other in one) for slot in two)
    return flows[0].linear or flows[1].linear


def _meet(one: Tensor, two: Tensor) -> bool:
    return bool(varying_dims(one) & varying_dims(two))


def combine(tracer: Tracer, operands: list[tuple[Flow, tuple[int, ...]]], ndim: int) -> Flow:
    """The flow of tensors, given as flows and shapes, that meet position by position in one of `ndim` dimensions."""
    opaque = any(flow.opaque for flow, _ in operands)
    labelled = [flow for flow, _ in operands if flow.slots]
    if len(labelled) == 1 and not opaque:  # a weight's slots stay as they are, in the order of its dimensions
        return Flow(tuple(aligned(slot, ndim) for slot in labelled[0].slots), opaque)
    shapes = [(1,) * (ndim - len(shape)) + shape for _, shape in operands]
    labels = [[aligned(slot, ndim) for slot in flow.varying] for flow, _ in operands]
    slots = []
    for (flow, _), own in zip(operands, labels, strict=True):
        for slot in own:
            dims = varying_dims(slot)
            rivals = [
                shape
                for (other, _), shape, theirs in zip(operands, shapes, labels, strict=True)
                if other.opaque and not any(_meet(slot, their) for their in theirs)
            ]
            met = any(shape[dim] > 1 for shape in rivals for dim in dims)
            if met:
                tracer.block([slot], "combines them with data that differ from channel to channel and belong to no layer")
            if not met or flow.opaque:
                slots.append(slot)
    if opaque:
        tracer.record.mark(
            "writes", (slot for (flow, _), own in zip(operands, labels, strict=True) if not flow.opaque for slot in own)
        )
    kept = merge(tracer, slots)
    single = lonely(tracer, [flow for flow, _ in operands], bool(kept))
    return Flow(tuple(kept + [aligned(slot, ndim) for slot in single]), opaque)


def constant(tracer: Tracer, call: Call) -> Flow:
    """A new tensor that holds one number everywhere; made like another, it belongs to the same channels."""
    tracer.note(call.name, *(value for name, value in call.args.items() if name in ("fill_value", "value", "s")))
    slots = tracer.flow(call.tensors[0]).slots if call.name.endswith("_like") else ()
    return Flow(slots, opaque=False)


def data(tracer: Tracer, call: Call) -> Flow:
    """A new tensor that holds anything, whatever it was made from: a size, a range, random numbers."""
    tracer.note(call.name, *call.numbers)
    return Flow(opaque=bool(torch.Size(call.out.shape).numel() > 1))
