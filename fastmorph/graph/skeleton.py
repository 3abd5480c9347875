"""A copy of a model without weights: its structure, with tensors that have a shape and no memory."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fastmorph.errors import MorphError
from fastmorph.graph.attention import plain_kernels, use_plain_modules
from fastmorph.graph.clone import clone
from fastmorph.graph.record import Record
from fastmorph.graph.rules import rule_of
from fastmorph.graph.tracer import Tracer, Watcher
from fastmorph.inputs import Inputs


class ForwardError(Exception):
    """The model's forward does not run on the given shapes; a clause that names the module, and `module`, its name."""

    def __init__(self, module: str, message: str) -> None:
        super().__init__(message)
        self.module = module


class Skeleton:
    """The structure of a model, that can be resized and traced at no cost; the model is not touched.

    Attributes:
        model: a copy whose parameters and buffers are fake tensors.
        names: every name of every parameter and buffer, the first one first, by the first one.
    """

    def __init__(self, model: nn.Module) -> None:
        if type(model).__name__ == "OptimizedModule":
            raise MorphError("the model is compiled by torch.compile: morph the original model, then compile the child.")
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        devices = [tensor.device for _, tensor in _tensors(model) if tensor.device.type != "meta"]
        self._device = devices[0] if devices else torch.device("cpu")
        self._values: dict[str, Tensor] = {}
        self.names: dict[str, list[str]] = {}
        memo: dict[int, Any] = {}
        first: dict[int, str] = {}
        for name, tensor in _tensors(model):
            if is_lazy(tensor):
                raise MorphError(f"the model cannot be traced: {name!r} is lazy and has no shape yet; run the model once.")
            if id(tensor) not in memo:
                memo[id(tensor)] = self._fake(tensor)
                first[id(tensor)] = name
                if tensor.device.type != "meta" and not tensor.is_floating_point():  # an index; weights are not held
                    self._values[name] = tensor.detach()
            self.names.setdefault(first[id(tensor)], []).append(name)
        self.model: nn.Module = clone(model, memo)

    def _fake(self, tensor: Tensor) -> Tensor:
        device = self._device if tensor.device.type == "meta" else tensor.device  # meta: weights to come, or none
        memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return self._wrap(memory, device, tensor)

    def _wrap(self, memory: Tensor, device: torch.device, like: Tensor) -> Tensor:
        """The fake tensor, or parameter, over a tensor on the meta device."""
        fake = FakeTensor(self._mode, memory, device)
        if isinstance(like, nn.Parameter):
            fake._is_param = True  # as nn.Parameter does for subclasses of Tensor, but without running an operator
            fake.requires_grad = like.requires_grad
        return fake

    def inputs(self, inputs: Inputs) -> Inputs:
        """A model's arguments with fake tensors in the place of tensors."""
        fakes: Inputs = pytree.tree_map(lambda leaf: self._fake(leaf) if isinstance(leaf, Tensor) else leaf, inputs)
        return fakes

    def copy(self) -> Skeleton:
        """Another one that can be resized on its own."""
        new = copy.copy(self)
        new._values = dict(self._values)
        new.model = clone(self.model, {id(tensor): tensor for _, tensor in _tensors(self.model)})
        return new

    def resize(self, name: str, shape: tuple[int, ...]) -> None:
        """Give a parameter or buffer, under all its names, another shape."""
        old = _get(self.model, name)
        new = self._wrap(torch.empty(shape, dtype=old.dtype, device="meta"), old.device, old)
        for other in self.names[name]:
            owner, key = _owner(self.model, other)
            tensors: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
            tensors[key] = new
        self._values.pop(name, None)

    def trace(self, inputs: Inputs, *, train: bool | None = None) -> Record:
        """Run the model in eval mode on inputs of these shapes and follow its channels.

        Where parameters are not used in eval mode (auxiliary heads), what is tied in train mode counts too: train=None tries
        that.
        """
        record = Record()
        tensors = dict(_tensors(self.model))
        for name in self.names:
            record.add_parameter(name, tuple(tensors[name].shape))
        self._run(inputs, record, train=False)
        unused = any(name not in record.used for name, _ in self.model.named_parameters())
        if train or (train is None and unused):
            return self._with_train(inputs, record, required=bool(train))
        return record

    def _with_train(self, inputs: Inputs, record: Record, *, required: bool) -> Record:
        both = record.copy()
        both.trained = True
        blocks = len(both.blocks)
        try:
            self._run(inputs, both, train=True)
        except ForwardError:
            if required:
                raise
            return record  # e.g. a batch norm that refuses a single value: then eval mode is all there is to know
        del both.blocks[blocks:]  # exact it must be in eval mode
        return both

    def _run(self, inputs: Inputs, record: Record, *, train: bool) -> None:
        tracer = Tracer(rule_of, record)
        tensors = dict(_tensors(self.model))
        for name in self.names:
            tracer.add_leaf(name, tensors[name], self._values.get(name))
        result = self.run(inputs, tracer, train=train)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                record.result.append(tuple(leaf.shape))
                record.block(tracer.flow(leaf).slots, "they are the model's output")

    def first_names(self) -> dict[int, str]:
        """The first name of each parameter and buffer of the copy, by the tensor's id."""
        tensors = dict(_tensors(self.model))
        return {id(tensors[name]): name for name in self.names}

    def run(self, inputs: Inputs, watcher: Watcher, *, train: bool) -> Any:
        """What the model returns for inputs of these shapes; the watcher sees every operator.

        Raises ForwardError where the model does not run, and MorphError where it branches on values.
        """
        self.model.train(train)
        use_plain_modules(self.model)
        hooks = _follow_modules(self.model, watcher.stack)
        try:
            with plain_kernels(self._device), _silent_errors(), torch.no_grad(), self._mode, watcher:
                args, kwargs = self.inputs(inputs)
                return self.model(*args, **kwargs)
        except MorphError:
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise MorphError(
                f"the model cannot be traced: module {watcher.module} branches on the values of a tensor ({error.func}); "
                "rewrite that part so that it depends on shapes alone."
            ) from error
        except Exception as error:
            raise ForwardError(watcher.stack[-1], f"{watcher.module} fails with {type(error).__name__}: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _get(model: nn.Module, name: str) -> Tensor:
    owner, key = _owner(model, name)
    tensor = owner._parameters.get(key)
    found = owner._buffers.get(key) if tensor is None else tensor
    assert found is not None
    return found


def _follow_modules(model: nn.Module, stack: list[str]) -> list[Any]:
    """Hooks that keep the name of the module that runs on top of the stack."""

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = []
    for name, module in model.named_modules():
        # First of all, so that what other hooks compute counts for the module as well.
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name), prepend=True))
        hooks.append(module.register_forward_hook(leave))
    return hooks


class _Silence(logging.Filter):
    """Drops what a thread logs while it asks for silence."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self.wanted, "here", False)


_SILENCE = _Silence()
logging.getLogger("torch._subclasses.fake_tensor").addFilter(_SILENCE)


@contextmanager
def _silent_errors() -> Iterator[None]:
    """A model that cannot run on some shapes is an answer, which PyTorch would print as a failure."""
    _SILENCE.wanted.here = True
    try:
        yield
    finally:
        _SILENCE.wanted.here = False
