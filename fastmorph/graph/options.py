"""Optional arguments: one call shows what a forward does with them, or what it does without, never both."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmorph.inputs import Inputs

_MOST = 3  # optional arguments that are tried: a forward of more has them for other uses
_SHAPES = 8  # shapes that are tried for each


def without_options(model: nn.Module, call: Inputs) -> list[Inputs]:
    """The call without each of the optional tensors that it gives (those whose default is None)."""
    given, optional = _arguments(model, call)
    return [_call(given, {name: None}) for name in optional if isinstance(given.arguments.get(name), Tensor)] if given else []


def with_options(model: nn.Module, call: Inputs, made: Iterable[tuple[int, ...]]) -> Iterator[tuple[str, list[Inputs]]]:
    """For each optional argument that the call does not give, its name and calls that give a tensor like one of its others.

    That has the shape of another, or one of the shapes that modules `made`. Where the forward says that it takes a bool, the
    call gives True.
    """
    given, optional = _arguments(model, call)
    if given is None:
        return
    missing = [name for name in optional if given.arguments.get(name) is None]
    tensors = [leaf for leaf in pytree.tree_leaves(tuple(call)) if isinstance(leaf, Tensor)]
    if tensors and len(missing) <= _MOST:
        shapes = list(dict.fromkeys([*(tuple(tensor.shape) for tensor in tensors), *made]))[:_SHAPES]
        for name in missing:
            flag = _takes_bool(given.signature.parameters[name])
            values = [True] if flag else [tensors[0].new_empty(shape) for shape in shapes]
            yield name, [_call(given, {name: value}) for value in values]


def _takes_bool(parameter: inspect.Parameter) -> bool:
    told = str(parameter.annotation)  # a type, or what stands in the code
    return "bool" in told and "Tensor" not in told


def _arguments(model: nn.Module, call: Inputs) -> tuple[inspect.BoundArguments | None, list[str]]:
    """The call's arguments by name, and the names of those whose default is None."""
    try:
        signature = inspect.signature(model.forward)
        given = signature.bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):  # the call itself will say what is wrong
        return None, []
    return given, [name for name, parameter in signature.parameters.items() if parameter.default is None]


def _call(given: inspect.BoundArguments, other: dict[str, Any]) -> Inputs:
    arguments = inspect.BoundArguments(given.signature, {**given.arguments, **other})
    arguments.apply_defaults()
    return Inputs(arguments.args, arguments.kwargs)
