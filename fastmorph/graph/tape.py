"""What one run did, operator by operator, so that the runs of a model and of a grown one can be read side by side.

A tape holds numbers and shapes and no tensor: what stood in a tensor's place is a `Ref`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastmorph.outputs import Path

_KNOWN = 64  # elements of a tensor whose values are noted


@dataclass(frozen=True)
class Ref:
    """A tensor of the run.

    Attributes:
        key: the same for the same tensor.
        memory: the same for tensors that share theirs.
        shape: its shape.
        name: of the parameter or buffer that it is; "" for any other.
        value: its numbers, where it has few and they are known.
        floating: whether it holds floating-point numbers.
        cut: whether something of it is left out (`Record.untaped`).
    """

    key: int
    memory: int
    shape: tuple[int, ...]
    name: str
    value: tuple[float, ...] | None
    floating: bool
    cut: bool = False


@dataclass(frozen=True)
class Entry:
    """One call of an operator: the module that ran, the operator, its arguments by name, and what it returned."""

    module: str
    name: str
    args: dict[str, Any]
    outs: tuple[Ref, ...]

    @property
    def refs(self) -> list[Ref]:
        """All tensors among the arguments, those in lists too."""
        return list(_refs_in(self.args.values()))

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Everything among the arguments that is no tensor, with the arguments' names."""
        return tuple((key, _numbers(value)) for key, value in self.args.items() if not isinstance(value, Ref))


@dataclass
class Tape:
    """A run: its operators in order, and the tensors that the model returned, by their path."""

    entries: list[Entry] = field(default_factory=list)
    outputs: list[tuple[Path, Ref]] = field(default_factory=list)

    def note(self, module: str, name: str, args: dict[str, Any], outs: list[Tensor], ref: Callable[[Tensor], Ref]) -> None:
        """Note a call."""
        noted = {key: _noted(value, ref) for key, value in args.items()}
        self.entries.append(Entry(module, name, noted, tuple(map(ref, outs))))


def ref_to(tensor: Tensor, name: str, value: Tensor | None) -> Ref:
    """The reference to a tensor that is kept until the run has ended."""
    known = None
    if value is not None and value.numel() <= _KNOWN and not value.is_complex() and not value.is_meta:
        known = tuple(value.detach().double().flatten().tolist())
    return Ref(id(tensor), tensor.untyped_storage()._cdata, tuple(tensor.shape), name, known, tensor.is_floating_point())


def _noted(value: Any, ref: Callable[[Tensor], Ref]) -> Any:
    if isinstance(value, Tensor):
        return ref(value)
    if isinstance(value, list | tuple):
        return tuple(_noted(item, ref) for item in value)
    return value


def _refs_in(values: Any) -> Iterator[Ref]:
    for value in values:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, tuple):
            yield from _refs_in(value)


def _numbers(value: Any) -> Any:
    return tuple(_numbers(item) for item in value if not isinstance(item, Ref)) if isinstance(value, tuple) else value
