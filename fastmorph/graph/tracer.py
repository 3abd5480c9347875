"""Runs a model once, without computing anything, and follows every channel through every operator.

The run is one of PyTorch's fake tensors, which have shapes and no values, so that it is fast whatever the model's size, and so
that a forward which branches on values is noticed rather than followed along one branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmorph.errors import MorphError
from fastmorph.graph.flow import DATA, FIXED, FREE, UNIFORM, Flow, compress, leaf
from fastmorph.graph.record import Record
from fastmorph.graph.tape import Ref, Tape, ref_to


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        name: e.g. "add" for aten::add.Tensor and for aten::add_.Tensor; "library::operator" for one that is not PyTorch's own.
        func: the operator.
        args: its arguments by name, as given or by default.
        out: what it returned.
    """

    name: str
    func: Any
    args: dict[str, Any]
    out: Any

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, those in lists too."""
        return _tensors_in(self.args.values())

    @cached_property
    def outputs(self) -> list[Tensor]:
        """All tensors among the results."""
        return _tensors_in((self.out,))

    def on(self, tensor: Tensor, **others: Any) -> Any:
        """What the operator returns for another first argument (and others)."""
        args = {**self.args, **others}
        keywords = {argument.name for argument in self.func._schema.arguments if argument.kwarg_only}
        positional = [value for name, value in args.items() if name not in keywords]
        return self.func(tensor, *positional[1:], **{name: value for name, value in args.items() if name in keywords})

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Everything among the arguments that is no tensor."""
        return tuple(_plain(value) for value in self.args.values() if not isinstance(value, Tensor))


class NoSuchDimension(IndexError):
    """The model's forward asks for a dimension that its tensor does not have."""


_DEVICE = torch.ops.prim.device.default
_NOTED = 64  # elements of a constant that two runs are compared by
Rule = Callable[["Tracer", Call], Any]  # returns a Flow, a sequence of them, or None: the output is any data


class Watcher(TorchDispatchMode):
    """Sees every operator of a run; `stack` has the names of the modules that run, the innermost last."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = [""]

    @property
    def module(self) -> str:
        """The module that runs, as errors name it."""
        return repr(self.stack[-1]) if self.stack[-1] else "the model itself"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        return func(*args, **(kwargs or {}))


class Tracer(Watcher):
    """Follows channels while it is the innermost mode; `tape`, where there is one, gets every operator."""

    def __init__(self, rule_of: Callable[[Any], Rule], record: Record, tape: Tape | None = None) -> None:
        super().__init__()
        self.record, self.tape = record, tape
        self._rule_of = rule_of
        self._flows: dict[int, Flow] = {}
        self._names: dict[int, str] = {}
        self._values: dict[int, Tensor] = {}
        self._poison: dict[int, tuple[list[Tensor], str]] = {}
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._views: dict[int, dict[int, Tensor]] = {}  # the tensors of each memory, as far as `_views_of` has seen them
        self._seen = 0

    def add_leaf(self, name: str, tensor: Tensor, value: Tensor | None) -> None:
        """Follow a parameter or buffer of this name, with what it holds where that is known."""
        self._names[id(tensor)] = name
        if value is not None:
            self._values[id(tensor)] = value
        self.set(tensor, leaf(self.record.labels_of(name), linear=isinstance(tensor, nn.Parameter)))

    def flow(self, tensor: Tensor) -> Flow:
        """What is known about a tensor."""
        if id(tensor) not in self._flows:  # made outside of the traced run, so that it has values
            self.set(tensor, DATA if tensor.numel() > 1 and not _same_everywhere(tensor) else UNIFORM)
            if type(tensor) is Tensor and tensor.numel() <= _NOTED:
                self.note("constant", tuple(tensor.flatten().tolist()))
        return self._flows[id(tensor)]

    def set(self, tensor: Tensor, flow: Flow) -> None:
        """Set what is known about a tensor."""
        if id(tensor) not in self._flows:
            self._kept.append(tensor)
        self._flows[id(tensor)] = flow

    def value(self, tensor: Tensor) -> Tensor | None:
        """A tensor's values, where they are known: of a constant, a parameter or a buffer."""
        if type(tensor) is Tensor:
            return tensor
        return self._values.get(id(tensor), getattr(tensor, "constant", None))

    def ref(self, tensor: Tensor) -> Ref:
        """What a tape has in a tensor's place."""
        ref = ref_to(tensor, self._names.get(id(tensor), ""), self.value(tensor))
        shape = self.record.taped(ref.shape, self.flow(tensor).varying)
        return ref if shape == ref.shape else replace(ref, shape=shape, value=None, cut=True)

    def poison(self, tensor: Tensor, labels: list[Tensor], cause: str) -> None:
        """Block atoms if anything reads this tensor."""
        self._kept.append(tensor)
        self._poison[id(tensor)] = (labels, cause)

    def block(self, labels: Sequence[Tensor], does: str) -> None:
        """Block atoms because the module that runs does something with them."""
        self.record.block(labels, f"{self.module} {does}")

    def note(self, *entry: Any) -> None:
        """What a run of the widened model must do as well."""
        self.record.journal.append((self.stack[-1], *entry))

    def note_move(self, *entry: Any) -> None:
        """The same for how data are moved, as far as labels do not say it."""
        self.record.moves.append((self.stack[-1], *entry))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then follow it."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # asked by some operators several times, and known
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        with torch._C._DisableTorchDispatch():  # in this thread alone
            self.follow(func, args, kwargs or {}, out)
        return out

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Note what an operator did to return `out`, by its rule."""
        if func.namespace == "prim":
            return
        call = call_of(func, args, kwargs, out)
        for tensor in call.tensors:
            if id(tensor) in self._names:
                self.record.used.add(self._names[id(tensor)])
            if id(tensor) in self._poison:
                self.record.block(*self._poison[id(tensor)])
        entries, held = len(self.record.journal), [self.flow(tensor).slots for tensor in call.tensors]
        try:
            flows = self._rule_of(func)(self, call)
        except NoSuchDimension:
            raise
        except Exception as error:
            raise MorphError(f"the model cannot be traced: {self.module} calls {func} in a way that is not known.") from error
        if isinstance(flows, Flow):
            flows = [flows]
        for tensor, flow in zip(call.outputs, [*(flows or []), *[DATA] * len(call.outputs)], strict=False):
            if any(tensor is given for given in call.tensors):
                self._write(tensor, flow, replaces=call.name in ("copy", "fill", "zero"))
            else:
                self.set(tensor, flow)
        if len(self.record.journal) > entries:
            for place, slots in enumerate([*held, *(self.flow(tensor).slots for tensor in call.outputs)]):
                self.record.note_operand(place, slots)
        if self.tape is not None:
            self.tape.note(self.stack[-1], call.name, call.args, call.outputs, self.ref)
        for tensor in [*call.tensors, *call.outputs]:
            self.record.note_sizes(self.stack[-1], tensor.shape, self.flow(tensor).varying)

    def _write(self, tensor: Tensor, flow: Flow, *, replaces: bool) -> None:
        """What is known after a write in place, also about every other view of the same memory."""
        before = self.flow(tensor)
        self.set(tensor, flow)
        if not replaces and len(before.slots) == len(flow.slots):  # what is tied needs no second label
            return
        views = [view for view in self._views_of(tensor) if view is not tensor]
        known = [*((view, self.flow(view)) for view in views), (tensor, flow)]
        if len(known) == 1 or not any(item.slots for _, item in known):
            return
        if any(len(item.slots) > 1 for _, item in known):
            self.block([slot for _, item in known for slot in item.slots], "writes them into a part of a tensor")
            return
        memory = torch.full((storage_size(tensor),), FREE)
        for item, its in known:
            label = its.slots[0] if its.slots else torch.tensor(FIXED if its.opaque else FREE)
            memory.as_strided(item.shape, item.stride(), item.storage_offset()).copy_(label.expand(item.shape))
        for item, _ in known:
            label = memory.as_strided(item.shape, item.stride(), item.storage_offset()).clone()
            self.set(item, Flow((compress(label),)))

    def _views_of(self, tensor: Tensor) -> Iterable[Tensor]:
        """All tensors that share its memory, itself among them."""
        for kept in self._kept[self._seen :]:
            self._views.setdefault(_memory(kept), {})[id(kept)] = kept
        self._seen = len(self._kept)
        return self._views[_memory(tensor)].values()


def storage_size(tensor: Tensor) -> int:
    """How many elements the memory behind a tensor holds."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same_everywhere(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and bool((tensor == tensor.flatten()[0]).all())


@cache
def _signature(func: Any) -> tuple[str, list[tuple[str, bool, Any]]]:
    """An operator's name without a mark of writing in place, and its arguments: name, whether there is a default, and that."""
    schema = func._schema
    name: str = schema.name.removeprefix("aten::")
    if schema.is_mutable and name.endswith("_"):
        name = name[:-1]
    return name, [(a.name, a.has_default_value(), a.default_value) for a in schema.arguments]


def call_of(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Call:
    """The call, with its arguments by name."""
    name, arguments = _signature(func)
    named = {key: value for (key, _, _), value in zip(arguments, args, strict=False)}
    for key, has_default, default in arguments[len(args) :]:
        if key in kwargs or has_default:
            named[key] = kwargs.get(key, default)
    return Call(name, func, named, out)


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors_in(value)
    return found


def _plain(value: Any) -> Any:
    """A number or a nest of them, as it can be compared."""
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value if not isinstance(item, Tensor))
    return value
