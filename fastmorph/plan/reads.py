"""Code that takes other modules' weights, told by its instructions: for models that cannot be followed on any call."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

_OF_ONE = frozenset({"weight", "bias"})
_OF_ALL = frozenset({"parameters", "named_parameters", "state_dict", "get_parameter", "_parameters"})


def reader(model: nn.Module) -> str | None:
    """The name of the first module whose forward, or a method that it calls, takes weights that are not its own.

    PyTorch's own modules call their layers, but for those that `find_layer` knows.
    """
    for name, module in model.named_modules():
        cls = type(module)
        if not cls.__module__.startswith(("torch.", "fastmorph.")) and any(map(_reads, _codes(cls, "forward", set()))):
            return name
    return None


def _codes(cls: type, method: str, seen: set[str]) -> Iterator[CodeType]:
    """The code of a method and of all methods of the class that it names."""
    function = getattr(cls, method, None)
    if method in seen or not isinstance(function, FunctionType):
        return
    seen.add(method)
    for code in _nested(function.__code__):
        yield code
        for other in code.co_names:
            yield from _codes(cls, other, seen)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _reads(code: CodeType) -> bool:
    before = None
    for instruction in dis.get_instructions(code):
        own = before is not None and before.opname.startswith("LOAD_") and before.argval == "self"
        taken = instruction.argval if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") else None
        if taken in _OF_ALL or (taken in _OF_ONE and not own):
            return True
        before = instruction
    return False
