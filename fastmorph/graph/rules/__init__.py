"""What each operator does to the channels of its operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmorph.graph.flow import DATA, UNIFORM, Flow
from fastmorph.graph.rules import contract, index, move, norms, pointwise, reduce, spatial
from fastmorph.graph.tracer import Call, Rule, Tracer

_CONSTANT = ("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones")
_RANDOM = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "uniform", "normal", "random")
_DATA = (*_RANDOM, "exponential", "arange", "linspace", "eye", "tril_indices", "triu_indices")

_RULES: dict[str, Rule] = {
    **dict.fromkeys(move.KEEP, move.keep),
    **dict.fromkeys(move.MOVE, move.move),
    **dict.fromkeys(pointwise.EXTRA, pointwise.pointwise),
    **dict.fromkeys(reduce.REDUCTIONS, reduce.reduction),
    **dict.fromkeys(reduce.MIXERS, reduce.mixer),
    **dict.fromkeys(spatial.SPATIAL, spatial.spatial),
    **dict.fromkeys((*_CONSTANT, "new_full", "new_empty", "scalar_tensor", "fill", "zero"), pointwise.constant),
    **dict.fromkeys(_DATA, pointwise.data),
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv", "matmul"), contract.matrix_product),
    **dict.fromkeys(
        ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update"), norms.batch_norm
    ),
    **dict.fromkeys(("_native_batch_norm_legit", "_native_batch_norm_legit_no_training"), norms.batch_norm),
    **dict.fromkeys(("_batch_norm_no_update", "batch_norm", "instance_norm"), norms.batch_norm),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm"), norms.layer_norm),
    **dict.fromkeys(("index", "index_select"), index.lookup),
    "native_group_norm": norms.group_norm,
    "convolution": contract.convolution,
    "embedding": contract.embedding,
    "as_strided": move.as_strided,
    "cat": move.join,
    "stack": move.stack,
    "constant_pad_nd": move.pad,
    "glu": move.glu,
    "im2col": move.im2col,
    "col2im": move.col2im,
}


def rule_of(func: Any, name: str) -> Rule:
    """The rule of an operator."""
    if name in _RULES:
        return _RULES[name]
    packet = getattr(torch.ops.aten, name, None)
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
