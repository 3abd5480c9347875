"""What one call of a model is made of, however the caller gave it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn


class Inputs(NamedTuple):
    """The positional and keyword arguments of one call: `model(*inputs.args, **inputs.kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(example_inputs: Any, model: nn.Module) -> Inputs:
    """The call of `model` that `example_inputs` stands for.

    A tuple holds positional arguments, and a pair of a tuple and a dict holds positional arguments and keywords. A mapping
    or a named tuple holds keywords where the names of `model.forward` allow it, else it is one positional argument, as
    anything else is.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, tuple) and hasattr(example_inputs, "_asdict"):
        named = example_inputs._asdict()
        for keywords in ({key: value for key, value in named.items() if value is not None}, named):
            if _takes(model, (), keywords):
                return Inputs((), keywords)
        if _takes(model, (example_inputs,), {}):
            return Inputs((example_inputs,), {})
    if isinstance(example_inputs, tuple):
        match example_inputs:
            case (tuple() as args, dict() as kwargs) if all(isinstance(key, str) for key in kwargs):
                return Inputs(args, dict(kwargs))
        return Inputs(tuple(example_inputs), {})
    if isinstance(example_inputs, Mapping) and _takes(model, (), example_inputs):
        return Inputs((), dict(example_inputs))
    return Inputs((example_inputs,), {})


def _takes(model: nn.Module, args: tuple[Any, ...], keywords: Mapping[Any, Any]) -> bool:
    """Whether the model's forward has parameters of these numbers and names."""
    if not all(isinstance(key, str) for key in keywords):
        return False
    try:
        inspect.signature(model.forward).bind(*args, **keywords)
    except (TypeError, ValueError):  # others, or a forward that tells none
        return False
    return True
