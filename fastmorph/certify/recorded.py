"""What a model computes, told without a copy of it: for a parent that is gone when its child is there."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastmorph.certify.certificate import TOLERANCES, Certificate, coarsest_dtype, compare
from fastmorph.certify.outputs import copied, eval_mode, flatten, isolated
from fastmorph.errors import MorphError

Outputs = dict[tuple[object, ...], Any]


def record(model: nn.Module, inputs: tuple[Any, ...]) -> Outputs:
    """The flattened outputs of the model itself, in eval mode and in its own dtype. Raises MorphError if it cannot run."""
    try:
        with eval_mode(model), isolated(False):
            outputs = model(*(copied(leaf, False) for leaf in inputs))
            return {path: copied(leaf, False) for path, leaf in flatten(outputs)}
    except Exception as error:
        raise MorphError(f"the model could not be run on example_inputs: {type(error).__name__}: {error}.") from error


def certify(before: Outputs, child: nn.Module, inputs: tuple[Any, ...]) -> Certificate:
    """Compare the child with what was recorded, in its own dtype alone: without the parent there are no float64 copies."""
    after = record(child, inputs)
    dtype = coarsest_dtype(child, child, list(inputs))
    if dtype not in TOLERANCES:
        raise MorphError(f"there is no default tolerance for {dtype}: pass verify=False.")
    rows = tuple(compare(before, after, {}, "eval", dtype, TOLERANCES[dtype][0]))
    if not rows:
        raise MorphError("the models returned no tensor, so there is nothing to compare.")
    return Certificate(rows, dtype, ("eval",), TOLERANCES[dtype][0])
