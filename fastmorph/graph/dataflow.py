"""One run of a model as a graph: which operator made each tensor, of which others; to be read backwards from any of them.

Nothing is computed: see `Skeleton`. Writes in place give a tensor another version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmorph.graph.skeleton import Skeleton
from fastmorph.graph.tracer import Call, Watcher, call_of
from fastmorph.inputs import Inputs
from fastmorph.outputs import Path

_NUMBERS = (bool, int, float, str, type(None))
_SAME = frozenset({"detach", "alias", "lift_fresh"})  # the tensor itself: outputs are looked at by these


class Value(NamedTuple):
    """A tensor as it was at some time of the run; its version counts the writes into it."""

    tensor: Tensor
    version: int

    @property
    def key(self) -> tuple[int, int]:
        """What it is known by."""
        return id(self.tensor), self.version


@dataclass(frozen=True, eq=False)
class Node:
    """One call of an operator, the module that ran, and the versions of its arguments."""

    call: Call
    stack: tuple[str, ...]
    versions: Mapping[int, int]

    @property
    def name(self) -> str:
        """The operator."""
        return self.call.name

    def operand(self, name: str) -> Value | None:
        """An argument, as it was; None if it is no tensor."""
        given = self.call.args.get(name)
        return Value(given, self.versions[id(given)]) if isinstance(given, Tensor) else None

    def values(self) -> list[Value]:
        """All tensors among the arguments, as they were."""
        return [Value(tensor, self.versions[id(tensor)]) for tensor in self.call.tensors]


@dataclass(eq=False)
class Visit:
    """One call of a module: the tensors that it was given, and those that it returned."""

    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)


class Dataflow(Watcher):
    """What one run did.

    Attributes:
        names: the first names of parameters and buffers, by the tensor's id.
        nodes: the calls, in order.
        visits: the calls of the modules that were asked for, by name.
        outputs: what the model returned.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.nodes: list[Node] = []
        self.visits: dict[str, list[Visit]] = {}
        self.outputs: list[tuple[Path, Any]] = []
        self.ended = 0  # how many operators had run when the model returned; then its outputs were looked at
        self._made: dict[tuple[int, int], Node] = {}
        self._versions: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no id is used twice
        self._sharing: dict[int, set[int]] = {}  # by memory, the tensors in it
        self._torn: set[int] = set()  # memory that was written into by way of one of several tensors

    def value(self, tensor: Tensor) -> Value:
        """A tensor as it is now."""
        return Value(tensor, self._versions.get(id(tensor), 0))

    def node(self, value: Value) -> Node | None:
        """What made a value; None if it was there before."""
        return self._made.get(value.key)

    def is_torn(self, value: Value) -> bool:
        """Whether something wrote into its memory by way of another tensor."""
        return value.tensor.untyped_storage()._cdata in self._torn

    def name(self, value: Value) -> str | None:
        """The name of the parameter or buffer that a value is."""
        return self.names.get(id(value.tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note it."""
        out = func(*args, **(kwargs or {}))
        call = call_of(func, args, kwargs or {}, out)
        node = Node(call, tuple(self.stack), {id(tensor): self.value(tensor).version for tensor in call.tensors})
        self.nodes.append(node)
        for tensor in [*call.tensors, *call.outputs]:
            self._kept.append(tensor)
            self._sharing.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))
        for tensor in call.outputs:
            if any(tensor is given for given in call.tensors):
                self._versions[id(tensor)] = self.value(tensor).version + 1
                memory = tensor.untyped_storage()._cdata
                if len(self._sharing[memory]) > 1:
                    self._torn.add(memory)
            self._made[self.value(tensor).key] = node
        return out


def record(skeleton: Skeleton, call: Inputs, modules: Iterable[str]) -> Dataflow:
    """Run a model once in eval mode.

    Args:
        skeleton: the model.
        call: shapes and dtypes of a call.
        modules: names of those whose calls are to be noted.

    Raises ForwardError and MorphError as `Skeleton.run` does.
    """
    flow = Dataflow(skeleton.first_names())
    hooks = []
    for name in modules:
        module = skeleton.model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(_entering(flow, name), with_kwargs=True))
        hooks.append(module.register_forward_hook(_leaving(flow, name)))
    hooks.append(skeleton.model.register_forward_hook(lambda *_: setattr(flow, "ended", len(flow.nodes))))
    try:
        flow.outputs = skeleton.run(call, flow, train=False)
    finally:
        for hook in hooks:
            hook.remove()
    return flow


def _values(flow: Dataflow, given: Any) -> list[Value]:
    return [flow.value(leaf) for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]


def _entering(flow: Dataflow, name: str) -> Any:
    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        flow.visits.setdefault(name, []).append(Visit(_values(flow, (args, kwargs))))

    return enter


def _leaving(flow: Dataflow, name: str) -> Any:
    def leave(module: nn.Module, args: Any, output: Any) -> None:
        flow.visits[name][-1].outputs += _values(flow, output)

    return leave


def story(
    flow: Dataflow, rename: Mapping[str, str], without: Mapping[str, Value]
) -> tuple[list[tuple[Any, ...]], dict[Path, Any]]:
    """What the run did, to be compared with another's.

    Args:
        flow: the run.
        rename: other names by which parameters and buffers are to be called.
        without: modules that are left out, each with the value that stands for the first that it returns.

    Returns:
        Each operator with its numbers and with what made its arguments; and for each of the model's outputs what made it.
    """
    known: dict[tuple[int, int], Any] = {}
    told: list[tuple[Any, ...]] = []
    stands = {flow.visits[name][0].outputs[0].key: value for name, value in without.items()}

    def ref(value: Value) -> Any:
        while value.key in stands:
            value = stands[value.key]
        name = flow.name(value)
        return known.get(value.key) or (rename.get(name, name) if name else (tuple(value.tensor.shape), value.tensor.dtype))

    for number, node in enumerate(flow.nodes):
        if not without.keys().isdisjoint(node.stack):
            continue
        if node.name in _SAME:
            known[id(node.call.outputs[0]), 0] = ref(node.values()[0])
            continue
        if number >= flow.ended:
            continue
        numbers = tuple(leaf for leaf in pytree.tree_leaves(node.call.args) if isinstance(leaf, _NUMBERS))
        told.append((node.name, numbers, tuple(map(ref, node.values()))))
        for place, tensor in enumerate(node.call.outputs):
            version = node.versions[id(tensor)] + 1 if id(tensor) in node.versions else 0
            known[id(tensor), version] = len(told), place
    results = {path: ref(flow.value(leaf)) if isinstance(leaf, Tensor) else leaf for path, leaf in flow.outputs}
    return told, results
