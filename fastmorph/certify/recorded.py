"""The certificate of a child whose parent is consumed: the parent's outputs are recorded before, and compared after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from fastmorph.certify.certificate import Certificate
from fastmorph.certify.compare import TOLERANCES, coarsest_dtype, compare, dtype_name, with_noise
from fastmorph.certify.readings import Reading, read, told
from fastmorph.certify.run import run
from fastmorph.errors import MorphError
from fastmorph.inputs import as_call
from fastmorph.outputs import Outputs


@dataclass(frozen=True)
class Recorded:
    """A model's outputs in eval mode and its own dtype, and those moved by its own rounding where that was measured."""

    outputs: Outputs
    shaken: Outputs | None


def record(model: nn.Module, example_inputs: Any) -> Recorded:
    """Run the model in eval mode and its own dtype, on `example_inputs` as `morph` takes them.

    A model that computes a part of itself in fewer bits runs twice, to measure its rounding. Raises `MorphError`
    if it cannot run.
    """
    call = as_call(example_inputs, model)
    dtype = coarsest_dtype([model], pytree.tree_leaves(call))
    try:
        once = run(model, "parent", "eval", call, dtype)
    except MorphError as error:
        cause = error.__cause__
        if cause is None:
            raise
        raise MorphError(f"the model could not be run on example_inputs: {type(cause).__name__}: {cause}.") from cause
    again = run(model, "parent", "eval", call, dtype, shaken=True).outputs if once.islands else None
    return Recorded(once.outputs, again)


def certify(before: Recorded, child: nn.Module, example_inputs: Any, readings: Sequence[Reading] = ()) -> Certificate:
    """Compare the child with what was recorded, in its own dtype alone: without the parent nothing runs in float64."""
    call = as_call(example_inputs, child)
    dtype = coarsest_dtype([child], pytree.tree_leaves(call))
    if dtype not in TOLERANCES:
        raise MorphError(f"there is no default tolerance for {dtype_name(dtype)}: pass verify=False.")
    tolerance = TOLERANCES[dtype][0]
    after = run(child, "child", "eval", call, dtype)
    rows = tuple(compare(before.outputs, read(readings, before.outputs, after.outputs), "eval", dtype, tolerance))
    if before.shaken is not None:
        rows = tuple(with_noise(rows, before.outputs, before.shaken, dtype, judge=True))
    if not rows:
        raise MorphError("the models returned no tensor, so there is nothing to compare.")
    gone = "The parent is gone, so no layer can be named: morph without consume=True to learn which."
    certificate = Certificate(rows, dtype, ("eval",), tolerance, on=told(readings))
    return certificate if certificate else replace(certificate, where=gone)
