"""The certificate of models that no rank holds: all ranks run parent and child as they stand, each on its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from fastmorph.certify.certificate import Certificate
from fastmorph.certify.compare import TOLERANCES, Comparison, coarsest_dtype, compare, dtype_name
from fastmorph.certify.outputs import copied, eval_mode
from fastmorph.certify.readings import Reading, read, told
from fastmorph.certify.run import isolated
from fastmorph.distributed.unsharded import reshard
from fastmorph.errors import MorphError
from fastmorph.inputs import Inputs
from fastmorph.outputs import Outputs, flatten
from fastmorph.ranks import Ranks


def certify(parent: nn.Module, child: nn.Module, call: Inputs, ranks: Ranks, readings: Sequence[Reading] = ()) -> Certificate:
    """Compare the outputs of two sharded models in eval mode and their own dtype, on every rank's inputs.

    `readings` are as in `fastmorph.verify`.

    Raises MorphError where one cannot be run, and for a dtype without a tolerance.
    """
    dtypes = [coarsest_dtype([parent, child], pytree.tree_leaves(call)), *_policies((parent, child))]
    dtype = max(dtypes, key=lambda each: torch.finfo(each).eps)
    if dtype not in TOLERANCES:
        raise MorphError(f"there is no default tolerance for {dtype_name(dtype)}: pass verify=False.")
    tolerance = TOLERANCES[dtype][0]
    before, after = (_run(model, who, call, ranks) for model, who in ((parent, "parent"), (child, "child")))
    found = ranks.exchange(list(compare(before, read(readings, before, after), "eval", dtype, tolerance)))
    rows = tuple(_worst(found))
    if not rows:
        raise MorphError("the models returned no tensor, so there is nothing to compare.")
    on = f"the sharded models, by {ranks.size} ranks, each on its inputs, in their own dtype"
    on = ", ".join(filter(None, (on, told(readings))))
    return Certificate(rows, dtype, ("eval",), tolerance, on=on)


def _run(model: nn.Module, who: str, call: Inputs, ranks: Ranks) -> Outputs:
    """What a model returns on this rank; its modes, its buffers and the generators are put back, its shards let go."""
    tensors = chain(model.parameters(), model.buffers(), pytree.tree_leaves(call))
    devices = {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    ranks.check()
    with isolated(devices), eval_mode(model):
        try:
            args, kwargs = pytree.tree_map(lambda leaf: copied(leaf, False), tuple(call))
            outputs = {path: _whole(leaf) for path, leaf in flatten(model(*args, **kwargs))}
        except Exception as error:
            raise MorphError(f"the {who} could not be run on example_inputs: {type(error).__name__}: {error}.") from error
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
    reshard(model)
    return outputs


def _whole(leaf: Any) -> Any:
    return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf


def _policies(models: Iterable[nn.Module]) -> Iterator[torch.dtype]:
    """The dtypes that FSDP2's mixed precision computes in."""
    for module in chain.from_iterable(model.modules() for model in models):
        if isinstance(module, FSDPModule):
            policy = module._get_fsdp_state()._mp_policy
            yield from (each for each in (policy.param_dtype, policy.output_dtype) if each is not None)


def _worst(found: list[list[Comparison]]) -> Iterator[Comparison]:
    """Of each output the comparison of the rank that fails, or where the difference is largest."""
    outputs: dict[str, Comparison] = {}
    for rank, rows in enumerate(found):
        for row in rows:
            known = outputs.get(row.output)
            if known is None or (not row.holds, row.max_rel) > (not known.holds, known.max_rel):
                problem = row.problem and f"on rank {rank}: {row.problem}"
                outputs[row.output] = replace(row, problem=problem)
    yield from outputs.values()
