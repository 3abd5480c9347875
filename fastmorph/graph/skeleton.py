"""A copy of a model without weights: its structure, with tensors that have a shape and no memory."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fastmorph.errors import MorphError
from fastmorph.graph.attention import plain_kernels, use_plain_modules
from fastmorph.graph.bags import noting
from fastmorph.graph.branches import Comparisons, Place
from fastmorph.graph.clone import clone
from fastmorph.graph.options import masks, with_options, without_options
from fastmorph.graph.record import Bools, Record, Run
from fastmorph.graph.rules import rule_of
from fastmorph.graph.tape import Tape
from fastmorph.graph.tracer import Tracer, Watcher
from fastmorph.inputs import Inputs
from fastmorph.outputs import PLAIN, Path, flatten

_BRANCHES = 16  # comparisons of sizes that are tried the other way
_FORMS = {torch.channels_last: 4, torch.channels_last_3d: 5}  # and their numbers of dimensions


class ForwardError(Exception):
    """The model's forward does not run on the given shapes; a clause that names the module, and `module`, its name."""

    def __init__(self, module: str, message: str) -> None:
        super().__init__(message)
        self.module = module


def check_keras(what: str, module: nn.Module) -> None:
    """Raise MorphError, with what to do instead, for a layer or model of Keras."""
    if any(kind.__module__.partition(".")[0] == "keras" for kind in type(module).__mro__):
        raise MorphError(
            f"{what} is a {type(module).__name__} of Keras, which holds its weights in variables of its own, the output's "
            "channels last: let fm.decompose solve for the weights of new layers, given kernel.transpose(3, 2, 0, 1), or the "
            "kernel.T of a Dense, and build these in Keras."
        )


class Skeleton:
    """The structure of a model, that can be resized and traced at no cost; the model is not touched.

    Attributes:
        model: a copy whose parameters and buffers are fake tensors.
        names: every name of every parameter and buffer, the first one first, by the first one.
        values: of indices, and of buffers without dimensions, what they hold.
    """

    def __init__(self, model: nn.Module) -> None:
        if type(model).__name__ == "OptimizedModule":
            raise MorphError("the model is compiled by torch.compile: morph the original model, then compile the child.")
        for name, module in model.named_modules():
            check_keras(f"module {name!r}" if name else "the model", module)
            if isinstance(module, torch.jit.ScriptModule):
                raise MorphError(
                    f"the model cannot be traced: {f'module {name!r}' if name else 'it'} is TorchScript, whose operators "
                    "cannot be seen; put the nn.Module that it was made from in its place."
                )
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        devices = [tensor.device for _, tensor in _tensors(model) if tensor.device.type != "meta"]
        self._device = devices[0] if devices else torch.device("cpu")
        self.values: dict[str, Tensor] = {}
        self.names: dict[str, list[str]] = {}
        memo: dict[int, Any] = {}
        first: dict[int, str] = {}
        for name, tensor in _tensors(model):
            if is_lazy(tensor):
                raise MorphError(f"the model cannot be traced: {name!r} is lazy and has no shape yet; run the model once.")
            if id(tensor) not in memo:
                memo[id(tensor)] = self._fake(tensor)
                first[id(tensor)] = name
                # An index, or a factor that code multiplies by; weights are not held.
                if tensor.device.type != "meta" and not (
                    tensor.is_floating_point() and (tensor.ndim or isinstance(tensor, nn.Parameter))
                ):
                    self.values[name] = tensor.detach()
            self.names.setdefault(first[id(tensor)], []).append(name)
        # PyTorch copies nothing that was computed with gradients.
        memo |= {id(tensor): tensor.detach().clone() for tensor in _attributes(model) if not tensor.is_leaf}
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
        new.values = dict(self.values)
        computed = (tensor for tensor in _attributes(self.model) if isinstance(tensor, FakeTensor))
        new.model = clone(self.model, {id(tensor): tensor for tensor in (*dict(_tensors(self.model)).values(), *computed)})
        return new

    def resize(self, name: str, shape: tuple[int, ...]) -> None:
        """Give a parameter or buffer, under all its names, another shape."""
        old = _get(self.model, name)
        form = next((form for form in _FORMS if _is_of(old, form)), torch.contiguous_format)
        new = self._wrap(torch.empty(shape, dtype=old.dtype, device="meta", memory_format=form), old.device, old)
        for other in self.names[name]:
            owner, key = _owner(self.model, other)
            tensors: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
            tensors[key] = new
        self.values.pop(name, None)

    def trace(
        self,
        inputs: Inputs,
        *,
        also: Sequence[Inputs] = (),
        runs: Sequence[Run] = (),
        whole: Mapping[tuple[str, int], int] = MappingProxyType({}),
        taped: bool = False,
        untaped: Mapping[tuple[str, int], Bools] = MappingProxyType({}),
    ) -> Record:
        """Run the model in eval mode on inputs of these shapes and follow its channels.

        Where that leaves something open, what is found in further runs counts too: on the inputs `also`, as far as the model
        runs on them; with more and with fewer optional arguments; with comparisons of sizes the other way (see
        `fastmorph.graph.branches`); and in train mode, where eval mode does not use all parameters (auxiliary heads). With
        `runs`, exactly these are made instead, and `taped` if the record is to have what they did, but for what is `untaped`.

        Raises ForwardError where the model does not run on `inputs`, or in any of `runs`.
        """
        record = Record(whole, untaped)
        tensors = dict(_tensors(self.model))
        for name in self.names:
            record.add_parameter(name, tuple(tensors[name].shape))
        if runs:
            for run in runs:
                self._run(run, record, tape=Tape() if taped and not run.train else None)
            return record
        first, shapes = Run(self.inputs(inputs)), dict[tuple[int, ...], None]()
        places = self._run(first, record, shapes, Tape() if taped else None)
        fewer = without_options(self.model, first.inputs)
        further = [*(Run(self.inputs(more)) for more in also), *map(Run, fewer), *map(first.turn, places)]
        for name, calls in with_options(self.model, first.inputs, shapes, self._asked_for(first.inputs)):
            for call in calls:
                more, _ = self._tried(Run(self.inputs(call), option=name), record, taped)
                if more is not record:  # it runs on that shape
                    record = more
                    break
        for run in further:  # it grows: there may be more comparisons in another branch
            record, found = self._tried(run, record, taped)
            further += [run.turn(place) for place in found if place not in places][: max(0, _BRANCHES - len(further))]
            places |= found
        if any(name not in record.used for name, _ in self.model.named_parameters()):
            record, _ = self._tried(replace(first, train=True), record)
        return record

    def with_masks(self, record: Record) -> Record:
        """A record with further runs in which modules are given masks, where that uses parameters that it does not know."""
        shapes = dict[tuple[int, ...], None]()
        self._run(record.runs[0], record.copy(), shapes)
        for tries in masks(self.model, sorted({name for name, _ in self.model.named_parameters()} - record.used), shapes):
            for owner, option, shape in tries:
                run = replace(record.runs[0], option=option, mask=(owner, shape))
                more, _ = self._tried(run, record, bool(record.tapes))
                if more.used > record.used:
                    record = more
                    break
        return record

    def _asked_for(self, inputs: Inputs) -> Iterable[Path]:
        """Places in bags of inputs at which the model looks for one in vain."""
        noted, found = noting(inputs)
        if noted is not None:
            with suppress(ForwardError, MorphError):  # it ran without notes: it wants dicts of just that class
                self.run(noted, Watcher(), train=False)
        return found

    def _tried(self, run: Run, record: Record, taped: bool = False) -> tuple[Record, dict[Place, None]]:
        """A record with a further run, and the places where that compares sizes; the same record if the model does not run.

        So it is e.g. where a comparison turned is an assertion, or where a batch norm refuses a single value in train mode.
        """
        both = record.copy()
        try:
            return both, self._run(run, both, tape=Tape() if taped and not run.train else None)
        except ForwardError:
            return record, {}
        except MorphError:
            if run.train:
                raise
            return record, {}

    def _run(
        self, run: Run, record: Record, shapes: dict[tuple[int, ...], None] | None = None, tape: Tape | None = None
    ) -> dict[Place, None]:
        """Follow one run; returns the places where code compares sizes. `shapes` gets those of what modules return."""
        tracer, blocks = Tracer(rule_of, record, tape), len(record.blocks)
        comparisons = Comparisons(tracer, run.turned)
        tensors = dict(_tensors(self.model))
        for name in self.names:
            tracer.add_leaf(name, tensors[name], self.values.get(name))
        masked = nullcontext() if run.mask is None else self._masked(run.option, *run.mask)
        leaves = self.run(run.inputs, tracer, comparisons, masked, train=run.train, shapes=shapes)
        for path, leaf in leaves:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise MorphError(
                    f"the model cannot be traced: its output{''.join(f'[{key!r}]' for key in path)} is a "
                    f"{type(leaf).__name__}, and which channels that holds cannot be seen; return tensors, or objects of them."
                )
            if not isinstance(leaf, Tensor):
                record.result.append(leaf)
                continue
            if tape is not None:
                tape.outputs.append((path, tracer.ref(leaf)))
            number = tracer.value(leaf)
            record.result.append(tuple(leaf.shape) if number is None else number.tolist())
            record.block(tracer.flow(leaf).slots, "they are the model's output", output=True)
            if not run.train and leaf.is_floating_point():
                record.returned.append((path, tuple(leaf.shape), tracer.flow(leaf).varying))
        if run.train:
            del record.blocks[blocks:]  # exact it must be in eval mode
        elif run.option:
            told = f"where {run.option!r} is given, which example_inputs= does not give, "
            record.blocks[blocks:] = [replace(block, cause=told + block.cause) for block in record.blocks[blocks:]]
        record.runs.append(run)
        if tape is not None:
            record.tapes.append(tape)
        return comparisons.found

    @contextmanager
    def _masked(self, option: str, owner: str, shape: tuple[int, ...]) -> Iterator[None]:
        """Give a module a mask inside."""
        mask = self._fake(torch.empty(shape, dtype=torch.bool, device="meta"))

        def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, option: mask}

        hook = self.model.get_submodule(owner).register_forward_pre_hook(give, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def first_names(self) -> dict[int, str]:
        """The first name of each parameter and buffer of the copy, by the tensor's id."""
        tensors = dict(_tensors(self.model))
        return {id(tensors[name]): name for name in self.names}

    def run(
        self,
        inputs: Inputs,
        watcher: Watcher,
        *inner: AbstractContextManager[Any],
        train: bool,
        shapes: dict[tuple[int, ...], None] | None = None,
    ) -> list[tuple[Path, Any]]:
        """The leaves of what the model returns for inputs of these shapes; the watcher sees every operator.

        `shapes` gets those of what modules return.

        Raises ForwardError where the model does not run, and MorphError where it branches on values.
        """
        self.model.train(train)
        use_plain_modules(self.model)
        hooks = _follow_modules(self.model, watcher.stack, shapes)
        try:
            with ExitStack() as stack:
                for manager in (plain_kernels(self._device), _silent_errors(), torch.no_grad(), self._mode, watcher, *inner):
                    stack.enter_context(manager)
                args, kwargs = self.inputs(inputs)
                return list(flatten(self.model(*args, **kwargs)))  # inside, for what is computed when it is looked at
        except MorphError:
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise MorphError(
                f"the model cannot be traced: {watcher.module} branches on the values of a tensor ({error.func}); "
                "rewrite that part so that it depends on shapes alone."
            ) from error
        except Exception as error:
            raise ForwardError(watcher.stack[-1], f"{watcher.module} fails with {type(error).__name__}: {error}") from error
        finally:
            for hook in hooks:
                hook.remove()


def _is_of(tensor: Tensor, form: torch.memory_format) -> bool:
    """Whether a tensor lies in memory in this form, and not in the usual one as well."""
    return tensor.ndim == _FORMS[form] and tensor.is_contiguous(memory_format=form) and not tensor.is_contiguous()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _attributes(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep without PyTorch's knowledge."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _get(model: nn.Module, name: str) -> Tensor:
    owner, key = _owner(model, name)
    tensor = owner._parameters.get(key)
    found = owner._buffers.get(key) if tensor is None else tensor
    assert found is not None
    return found


def _follow_modules(model: nn.Module, stack: list[str], shapes: dict[tuple[int, ...], None] | None = None) -> list[Any]:
    """Hooks that keep the name of the module that runs on top of the stack, and put the shapes of results in `shapes`."""

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()
        if shapes is not None and isinstance(output, Tensor):
            shapes.setdefault(tuple(output.shape))

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
