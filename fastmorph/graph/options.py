"""Optional arguments, fields and keys: one call shows what a forward does with them, or what it does without, never both."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmorph.graph.bags import given_options, open_options, put, told
from fastmorph.inputs import Inputs
from fastmorph.outputs import Path

_MOST = 3  # optional arguments that are tried: a forward of more has them for other uses
_SHAPES = 8  # shapes that are tried for each


def without_options(model: nn.Module, call: Inputs) -> list[Inputs]:
    """The call without each of the optional tensors that it gives: arguments and fields of default None, keys of dicts."""
    given, optional = _arguments(model, call)
    fewer = [_call(given, {name: None}) for name in optional if isinstance(given.arguments.get(name), Tensor)] if given else []
    return fewer + [Inputs(put(call.args, path, None), call.kwargs) for path in given_options(call.args)[:_MOST]]


def with_options(
    model: nn.Module, call: Inputs, made: Iterable[tuple[int, ...]], asked: Iterable[Path] = ()
) -> Iterator[tuple[str, list[Inputs]]]:
    """For each optional argument that the call does not give, its name and calls that give a tensor like one of its others.

    That has the shape of another, or one of the shapes that modules `made`. Where the forward says that it takes a bool, the
    call gives True. `asked` are places in the call's bags of inputs where there is none, but the model asked for one.
    """
    given, optional = _arguments(model, call)
    if given is None:
        return
    missing, paths = [name for name in optional if given.arguments.get(name) is None], [*open_options(call.args), *asked]
    tensors = [leaf for leaf in pytree.tree_leaves(tuple(call)) if isinstance(leaf, Tensor)]
    if tensors and len(missing) + len(paths) <= _MOST:
        shapes = list(dict.fromkeys([*(tuple(tensor.shape) for tensor in tensors), *made]))[:_SHAPES]
        news = [tensors[0].new_empty(shape) for shape in shapes]
        for name in missing:
            flag = _takes_bool(given.signature.parameters[name])
            yield name, [_call(given, {name: value}) for value in ([True] if flag else news)]
        for path in paths:
            yield told(path, list(given.signature.parameters)), [Inputs(put(call.args, path, n), call.kwargs) for n in news]


def masks(model: nn.Module, unused: Iterable[str], made: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[str, str, Any]]]:
    """Masks that may make the model use parameters: each a module's name, its optional argument, and a shape.

    A token that stands where something is masked belongs to a module that takes a mask, of a number for each position.
    """
    shapes = list(dict.fromkeys(shape[:2] for shape in made if len(shape) > 2))[:_SHAPES]
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in unused):
        try:
            signature = inspect.signature(model.get_submodule(owner).forward)
        except (TypeError, ValueError):
            continue
        for name, parameter in signature.parameters.items():
            if owner and parameter.default is None and "mask" in name:
                yield [(owner, name, shape) for shape in shapes]


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
