"""Where a model's code branches on the size of a batch, a map or a sequence: a run on one size follows one branch alone.

Sizes that belong to no channel are given to the code as integers that note where they are compared. The model is then run again
with such a comparison the other way: both branches count, whatever sizes decide between them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmorph.graph.tracer import Tracer

Place = tuple[str, int, int]  # a comparison in some code: its file, the first line of its function, the instruction

_OTHERS = ("torch", "fastmorph")  # whose code compares sizes too, and does the same with any
_SIZES_OF_A_SHAPE = 6
_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
_SIZES = (_SHAPE, Tensor.size, Tensor.numel, Tensor.nelement)


class Comparisons(TorchFunctionMode):
    """Hands out sizes that note where they are compared.

    Args:
        tracer: follows the same run.
        turned: places at which the first comparison in each module, of a size or of a shape, comes out the other way.

    Attributes:
        found: the places of all comparisons, but for those of `_OTHERS`, in the order of the run.
    """

    def __init__(self, tracer: Tracer, turned: frozenset[Place]) -> None:
        super().__init__()
        self._tracer, self._turned, self._done = tracer, turned, dict[tuple[str, Place], int]()
        self._calls, self._left = 0, dict[tuple[str, Place], int]()
        self.found: dict[Place, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; sizes of dimensions without channels become a `Size`."""
        self._calls += 1
        out = func(*args, **(kwargs or {}))
        if func not in _SIZES or type(args[0]) is Tensor:
            return out
        slots = self._tracer.flow(args[0]).varying
        if isinstance(out, torch.Size):
            held = [any(slot.shape[dim] > 1 for slot in slots) for dim in range(len(out))]
            return torch.Size([size if inside else Size.of(size, self) for size, inside in zip(out, held, strict=True)])
        dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim")
        inside = bool(slots) if dim is None else any(slot.shape[dim] > 1 for slot in slots)
        return out if inside else Size.of(out, self)

    def decide(self, outcome: bool) -> bool:
        """What a comparison in the calling code says."""
        frame = sys._getframe(2)
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _OTHERS:
            return outcome
        place = (frame.f_code.co_filename, frame.f_code.co_firstlineno, frame.f_lasti)
        self.found.setdefault(place)
        visit = (self._tracer.stack[-1], place)
        if place not in self._turned or self._done.setdefault(visit, self._calls) != self._calls:
            return outcome  # a loop goes on as it would
        self._left[visit] = self._left.get(visit, _SIZES_OF_A_SHAPE) - 1  # each size of a shape that is compared with another
        return outcome if self._left[visit] < 0 else not outcome


class Size(int):
    """A size that notes where it is compared, and so does what is computed from it."""

    _run: Comparisons

    @classmethod
    def of(cls, value: int, run: Comparisons) -> Size:
        """This size in this run."""
        size = cls(value)
        size._run = run
        return size

    __hash__ = int.__hash__

    def __reduce__(self) -> Any:  # a copy is a number
        return int, (int(self),)

    def __bool__(self) -> bool:
        return self._run.decide(int(self) != 0)


def _comparing(name: str) -> Callable[[Size, object], Any]:
    compare = getattr(int, name)

    def compared(self: Size, other: object) -> Any:
        outcome = compare(self, other)
        return outcome if outcome is NotImplemented else self._run.decide(outcome)

    return compared


def _computing(name: str) -> Callable[..., Any]:
    compute = getattr(int, name)

    def computed(self: Size, *others: object) -> Any:
        result = compute(self, *others)
        return Size.of(result, self._run) if type(result) is int else result

    return computed


for _name in ("__lt__", "__le__", "__eq__", "__ne__", "__gt__", "__ge__"):
    setattr(Size, _name, _comparing(_name))
for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"):
    setattr(Size, f"__{_name}__", _computing(f"__{_name}__"))
    setattr(Size, f"__r{_name}__", _computing(f"__r{_name}__"))
for _name in ("__neg__", "__pos__", "__abs__"):
    setattr(Size, _name, _computing(_name))
