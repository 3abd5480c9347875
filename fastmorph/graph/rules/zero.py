"""Which operators make zero of a channel of zeros, so that what makes the channel may be zero, not what reads it.

A channel is zero where its rows of weights and its shifts are. An operator that is not known to keep that, whatever its other
operands are, marks the channels of its results (`makes_of_zero`): unknown means that the reading columns will be zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastmorph.graph.flow import Flow, aligned, varying_dims
from fastmorph.graph.rules.attention import FUSED
from fastmorph.graph.tracer import Call, Tracer

# Zero where the first operand is, whatever the others are; beside those that only move data and those that pool.
KEEP = (
    *(
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "celu",
        "selu",
        "silu",
        "gelu",
        "mish",
        "hardswish",
        "tanh",
        "_prelu_kernel",
        "prelu",
    ),
    *("neg", "abs", "sign", "sqrt", "square", "native_dropout", "dropout", "softshrink", "hardshrink", "copy", "erf", "sin"),
    *("asinh", "atan", "sinh", "tan", "expm1", "log1p", "trunc", "round", "ceil", "floor", "glu", "im2col", "col2im", "cumsum"),
    *("sum", "mean", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm", "as_strided", "index"),
    *("index_select", "embedding", "_embedding_bag", "_embedding_bag_forward_only"),
)
# Sums of two products, or of a product and something else: `added` are what must be zero as well.
_PRODUCTS = ("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv", "matmul")


def mark(tracer: Tracer, call: Call, flows: Any) -> None:
    """Mark the channels of results of which an operator, that is not in `KEEP`, may make something of zero."""
    outs = [flows] if isinstance(flows, Flow) else list(flows or ())
    tracer.record.mark("makes_of_zero", (slot for out in outs for slot in out.slots if not _kept(tracer, call, slot)))


def mark_uncovered(tracer: Tracer, call: Call, flows: Any) -> None:
    """The same for one in `KEEP`: its first operand must belong to the channels."""
    if len(call.tensors) > 1:
        outs = [flows] if isinstance(flows, Flow) else list(flows or ())
        first = call.tensors[1] if call.name == "copy" else call.tensors[0]
        tracer.record.mark("makes_of_zero", (slot for out in outs for slot in out.slots if not _covers(tracer, first, slot)))


def _kept(tracer: Tracer, call: Call, slot: Tensor) -> bool:
    """Whether the operator's result is zero at the channels of one of its labels."""
    name, tensors = call.name, call.tensors
    if name in ("mul", "_trilinear", *FUSED):  # of attention, the last product
        return True
    if name in ("add", "sub"):
        return len(tensors) == 2 and _all_cover(tracer, tensors, slot)
    if name == "div":
        return _covers(tracer, tensors[0], slot) and not any(_covers(tracer, other, slot) for other in tensors[1:])
    if name == "pow":
        return len(tensors) == 1 and isinstance(call["exponent"], int | float) and call["exponent"] > 0
    if name in ("clamp", "hardtanh"):
        return len(tensors) == 1 and _bounds_hold_zero(call)
    if name in ("cat", "stack"):
        dim = call["dim"] % slot.ndim
        return slot.shape[dim] > 1 or (name == "cat" and _all_cover(tracer, [t for t in tensors if t.numel()], slot))
    if name == "constant_pad_nd":
        return not call["value"]
    if name.startswith("zeros") or (name == "full_like" and call["fill_value"] == 0):
        return True
    if name in _PRODUCTS:
        return _all_cover(tracer, tensors[:-2], slot)
    if name == "convolution":
        return call["bias"] is None or (_is_along(slot, 1, call.out) and bool(tracer.flow(call["bias"]).slots))
    if "batch_norm" in name or name == "instance_norm":
        shifts = [call[key] for key in ("bias", "running_mean") if call.args.get(key) is not None]
        return not shifts or (_is_along(slot, 1, tensors[0]) and all(tracer.flow(shift).slots for shift in shifts))
    return False


def _is_along(slot: Tensor, dim: int, tensor: Tensor) -> bool:
    return slot.shape[dim] > 1 or (slot.numel() == 1 and tensor.shape[dim] == 1)


def _all_cover(tracer: Tracer, tensors: Iterable[Tensor], slot: Tensor) -> bool:
    return all(_covers(tracer, tensor, slot) for tensor in tensors)


def _covers(tracer: Tracer, tensor: Tensor, slot: Tensor) -> bool:
    """Whether a tensor belongs to the channels along the dimensions of a result's label."""
    own = [aligned(label, slot.ndim) for label in tracer.flow(tensor).slots if label.ndim <= slot.ndim]
    return any(varying_dims(slot) <= varying_dims(label) if slot.numel() > 1 else label.numel() == 1 for label in own)


def _bounds_hold_zero(call: Call) -> bool:
    low, high = (call.args.get(a, call.args.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    return (low is None or low <= 0) and (high is None or high >= 0)
