"""What the code of a model does, operator by operator: which parameters it takes, on behalf of which modules, by what numbers.

That is the light way to look at a model whose channels stay as they are. Nothing is computed: see `Skeleton`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmorph.errors import MorphError
from fastmorph.graph.guess import guesses
from fastmorph.graph.skeleton import ForwardError, Skeleton
from fastmorph.graph.tracer import Watcher
from fastmorph.inputs import Inputs

# Where and how data lie in memory may differ between two ways to compute one thing.
_MEMORY = {"empty", "new_empty", "view", "_unsafe_view", "_reshape_alias", "reshape", "clone", "detach", "alias", "as_strided"}

# What can be compared: an operator may take process groups and other handles as well.
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

Stack = tuple[str, ...]  # the modules that run, from the model itself to the innermost


@dataclass(frozen=True)
class Operation:
    """One operator: the modules that ran, its name, all that is no tensor among its arguments, and shapes of its results."""

    stack: Stack
    name: str
    numbers: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Trail:
    """What one run did.

    Attributes:
        operations: in eval mode, in order.
        uses: by a parameter's or buffer's first name, which modules ran when an operator took it, in either mode.
        touched: names of those that an operator took in eval mode.
        result: shapes of the model's outputs in eval mode.
    """

    operations: list[Operation] = field(default_factory=list)
    uses: dict[str, set[Stack]] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    result: list[tuple[int, ...]] = field(default_factory=list)

    def around(self, layers: set[str]) -> list[Operation]:
        """The operations that ran outside of these layers."""
        return [operation for operation in self.operations if layers.isdisjoint(operation.stack)]


class _Walker(Watcher):
    def __init__(self, names: dict[int, str], trail: Trail) -> None:
        super().__init__()
        self._names, self._trail = names, trail

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        stack, leaves = tuple(self.stack), pytree.tree_leaves((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) in self._names:
                self._trail.uses.setdefault(self._names[id(leaf)], set()).add(stack)
        name = func._schema.name.split("::")[1]
        if name not in _MEMORY and func.namespace != "prim":
            numbers = tuple(leaf for leaf in leaves if isinstance(leaf, _PLAIN))
            shapes = tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))
            self._trail.operations.append(Operation(stack, name, numbers, shapes))
        return out


def bare_skeleton(model: nn.Module) -> Skeleton:
    """A skeleton without the hooks that others put on the model, but for those of PyTorch, which compute weights."""
    skeleton = Skeleton(model)
    for module in skeleton.model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils."):
                    del hooks[key]
    return skeleton


@dataclass(frozen=True)
class Walked:
    """A call on which a model runs, the copy that ran, and what it did in eval mode."""

    call: Inputs
    skeleton: Skeleton
    trail: Trail


def walk(skeleton: Skeleton, call: Inputs) -> Walked:
    """Run a model once in eval mode.

    Raises ForwardError and MorphError as `Skeleton.run` does.
    """
    trail = Trail()
    leaves = skeleton.run(call, _Walker(skeleton.first_names(), trail), train=False)
    trail.result = [tuple(leaf.shape) for _, leaf in leaves if isinstance(leaf, Tensor)]
    trail.touched = set(trail.uses)
    return Walked(call, skeleton, trail)


def walk_in_training(walked: Walked) -> None:
    """Add to the trail what the model uses in train mode, if it runs in that."""
    trained = Trail()
    try:
        walked.skeleton.run(walked.call, _Walker(walked.skeleton.first_names(), trained), train=True)
    except (ForwardError, MorphError):  # e.g. a batch norm that refuses a single value
        return
    for name, stacks in trained.uses.items():
        walked.trail.uses.setdefault(name, set()).update(stacks)


def walk_guessing(model: nn.Module) -> Walked | None:
    """Run a model on a call that is guessed from its first layer, on the meta device; None if none is found that it runs on."""
    try:
        skeleton = bare_skeleton(model)
    except Exception:  # whatever cannot be copied or looked at
        return None
    for call in guesses(skeleton.model):
        try:
            return walk(skeleton, call)
        except ForwardError:  # wrong shape: the next guess
            continue
        except MorphError:  # it branches on values, whatever the shape
            return None
    return None


def guess_call(model: nn.Module) -> Inputs | None:
    """The call that `walk_guessing` finds."""
    walked = walk_guessing(model)
    return None if walked is None else walked.call
