"""Look-ups by number: known numbers move data, unknown ones end the labels of the dimension that is looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmorph.graph.flow import Flow, compress, varying_dims
from fastmorph.graph.tracer import Call, Tracer


def lookup(tracer: Tracer, call: Call) -> Flow:
    """index.Tensor and index_select: the same look-up on the labels."""
    tensor, flow = call["self"], tracer.flow(call["self"])
    indices: Any = call.args.get("indices", call.args.get("index"))
    values = pytree.tree_map(lambda leaf: tracer.value(leaf) if isinstance(leaf, Tensor) else leaf, indices)
    known = all(
        value is not None
        for value, given in zip(pytree.tree_leaves(values), pytree.tree_leaves(indices), strict=True)
        if isinstance(given, Tensor)
    )
    tracer.note(call.name)
    looked_up = (
        {call["dim"] % tensor.ndim} if "dim" in call.args else {i for i, index in enumerate(indices) if index is not None}
    )
    slots = []
    for slot in flow.slots:
        if known:
            slots.append(compress(_apply(call, slot.expand(tensor.shape), values)))
        elif varying_dims(slot) & looked_up:
            tracer.block([slot], "looks them up by numbers that it computes")
        else:
            zeros = pytree.tree_map(_zeros, indices)
            slots.append(compress(_apply(call, slot.expand(tensor.shape), zeros)))
    if (
        not known
        and flow.linear
        and not flow.opaque
        and looked_up == {0}
        and tensor.ndim > 2
        and tensor.ndim == len(flow.slots)
    ):
        return Flow(tuple(slots), False, True)  # matrices of a stack, of experts say, each a weight
    return Flow(tuple(slots), flow.opaque or not known)


def _zeros(leaf: Any) -> Any:
    """Any numbers of that shape: along these dimensions the label is the same everywhere."""
    if isinstance(leaf, Tensor):
        return (
            torch.ones(leaf.shape, dtype=torch.bool) if leaf.dtype == torch.bool else torch.zeros(leaf.shape, dtype=torch.int64)
        )
    return leaf


def _apply(call: Call, label: Tensor, indices: Any) -> Tensor:
    return call.on(label, **{"indices" if "indices" in call.args else "index": indices})
