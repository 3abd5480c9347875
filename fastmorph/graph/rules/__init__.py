"""What each operator does to the channels of its operands: the rules, and the door through which others add theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmorph.errors import MorphError
from fastmorph.graph.flow import DATA, UNIFORM, Flow
from fastmorph.graph.rules import attention, contract, index, move, norms, pointwise, reduce, spatial, zero
from fastmorph.graph.tracer import Call, Rule, Tracer

_RULES: dict[str, Rule] = {}


def rule(*operators: Any, replace: bool = False) -> Callable[[Rule], Rule]:
    """A decorator that registers what operators do to channels, for models whose own operators are not known.

    The rule is called as rule(tracer, call) after the operator has run on fake tensors, which have shapes and no values. It
    reads the arguments (`call["name"]`, `call.tensors`, `call.out`) and what is known of them (`tracer.flow(tensor)`),
    notes what the operator does, and returns the flow of the result, a list of flows of several, or None where no channel
    passes. What it notes:

    - `tracer.note(call.name, number, ...)`: that the operator ran, with the numbers that a grown model must have as well;
    - `tracer.record.tie(label, other)`: that channels at equal positions of two labels can only be copied together;
    - `tracer.record.mark("reads", labels)` and the other kinds of `fastmorph.graph.record.Kind`;
    - `tracer.block(labels, "does this with them")`: that they cannot be copied; the module that runs is named before it.

    An operator that works elementwise over channels, say, returns `tracer.flow(call["x"])` after `tracer.note(call.name)`. What
    it makes of channels of zeros counts as unknown: fill="zero" then sets the columns that read them to zero.

    Args:
        operators: as in `torch.ops` (`torch.ops.mylib.op`, or one overload: all overloads have one rule), or qualified names,
            "mylib::op". A trailing underscore of operators that write in place is left out.
        replace: whether a rule that is known may be replaced.

    Raises:
        MorphError: one of them has a rule, and `replace` is not given.
    """

    def register(function: Rule) -> Rule:
        names = [_qualified(operator) for operator in operators]
        for name in names:
            if name in _RULES and not replace:
                raise MorphError(f"operator {name} has a rule; give replace=True to put another in its place.")
        _RULES.update(dict.fromkeys(names, function))
        rule_of.cache_clear()
        return function

    return register


def _qualified(operator: Any) -> str:
    if isinstance(operator, torch._ops.OpOverload):
        return _named(operator)
    name = operator if isinstance(operator, str) else getattr(operator, "_qualified_op_name", None)
    if not isinstance(name, str) or "::" not in name:
        raise MorphError(f"{operator!r} is no operator: give one of torch.ops, or its name as 'library::operator'.")
    return name


def _named(func: Any) -> str:
    name: str = func._schema.name
    return name[:-1] if func._schema.is_mutable and name.endswith("_") else name


def _register(function: Rule, *names: str) -> None:
    rule(*(f"aten::{name}" for name in names))(function)


@cache
def rule_of(func: Any) -> Rule:
    """The rule of an operator, which also marks the channels of which it may make something of zero."""
    rule, mark = _rule_of(func), zero.mark
    if _named(func).removeprefix("aten::") in _KEEP_ZERO:
        mark = zero.mark_uncovered

    def marked(tracer: Tracer, call: Call) -> Any:
        flows = rule(tracer, call)
        mark(tracer, call, flows)
        return flows

    return marked


def _rule_of(func: Any) -> Rule:
    name = _named(func)
    if name in _RULES:
        return _RULES[name]
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)  # the operator without "_", if it has one
    overloads = [func] if packet is None else [func, *(getattr(packet, overload) for overload in packet.overloads())]
    if any(torch.Tag.pointwise in overload.tags for overload in overloads):
        return pointwise.pointwise
    return _unknown


def _unknown(tracer: Tracer, call: Call) -> list[Flow]:
    """An operator without a rule: nothing that it takes can be copied."""
    flows = [tracer.flow(tensor) for tensor in call.tensors]
    tracer.note(call.name)
    tracer.block(
        [slot for flow in flows for slot in flow.slots], f"runs {call.name}, of which it is not known how it treats them"
    )
    outs = [item for item in pytree.tree_leaves(call.out) if isinstance(item, Tensor)]
    return [UNIFORM if not flows and out.numel() == 1 else DATA for out in outs]


_CONSTANT = ("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones")
_KEEP_ZERO = frozenset((*move.KEEP, *move.MOVE, *spatial.SPATIAL, *zero.KEEP))
_RANDOM = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "uniform", "normal", "random")
_NORMS = (
    *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_native_batch_norm_legit"),
    *("_native_batch_norm_legit_no_training", "_batch_norm_no_update", "batch_norm", "instance_norm"),
)

_register(move.keep, *move.KEEP)
_register(move.move, *move.MOVE)
_register(pointwise.pointwise, *pointwise.EXTRA)
_register(reduce.reduction, *reduce.REDUCTIONS)
_register(reduce.mixer, *reduce.MIXERS)
_register(spatial.spatial, *spatial.SPATIAL)
_register(pointwise.constant, *_CONSTANT, "new_full", "new_empty", "scalar_tensor", "fill", "zero")
_register(pointwise.data, *_RANDOM, "exponential", "arange", "linspace", "eye", "tril_indices", "triu_indices")
_register(contract.matrix_product, "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv", "matmul")
_register(norms.batch_norm, *_NORMS)
_register(norms.layer_norm, "native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
_register(norms.group_norm, "native_group_norm")
_register(norms.weight_norm, "_weight_norm_interface")
_register(index.lookup, "index", "index_select")
_register(contract.convolution, "convolution")
_register(attention.attention, *attention.FUSED)
_register(contract.embedding, "embedding", "_embedding_bag", "_embedding_bag_forward_only")
_register(contract.bilinear, "_trilinear")
_register(move.as_strided, "as_strided")
_register(move.join, "cat")
_register(move.stack, "stack")
_register(move.pad, "constant_pad_nd")
_register(move.glu, "glu")
_register(move.im2col, "im2col")
_register(move.col2im, "col2im")
