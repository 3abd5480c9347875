"""Running a model so that nothing of it, and nothing of the process, is touched."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastmorph.certify.arithmetic import Arithmetic, WeightsChanged
from fastmorph.certify.outputs import copied, widened
from fastmorph.errors import MorphError
from fastmorph.graph.clone import clone
from fastmorph.inputs import Inputs
from fastmorph.outputs import Outputs, flatten

# PyTorch's generators, Python's and numpy's are the process's, and so is cuDNN's precision: one run at a time has them.
_ALONE = threading.RLock()

LayerOutputs = dict[tuple[str, int], tuple[str, list[Tensor]]]  # a layer's name and which of its calls: its kind and its output


@dataclass(frozen=True)
class Run:
    """What a model returned, flat, and whether it computed some of it in fewer bits than it was asked to.

    `layers` has the outputs of each layer, the model itself excepted, where they were kept.
    """

    outputs: Outputs
    islands: bool
    layers: LayerOutputs


def run(
    model: nn.Module,
    who: str,
    mode: str,
    call: Inputs,
    dtype: torch.dtype,
    *,
    shaken: bool = False,
    keep_layers: bool = False,
) -> Run:
    """Run the model in `mode` on copies of the inputs: in float64 if `dtype` is that, else as it is.

    The modules that run are copies that share the parameters and have buffers and attributes of their own. A weight is cast
    to float64 as it is used. A model that writes into its parameters, and one with TorchScript inside or with tensor
    subclasses for parameters, runs on copies of them instead.

    Values that enter arithmetic coarser than `dtype` are moved by their rounding where `shaken`. Raises `MorphError` where the
    model cannot be run, and on the meta device.
    """
    model, exact = bare(model), dtype == torch.float64
    tensors = chain(model.parameters(), model.buffers(), pytree.tree_leaves(call))
    devices = {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)}

    if "meta" in devices:
        raise MorphError(
            "The models or the inputs are on the meta device, where there are no values to compare: load the weights."
        )

    def once(share: bool) -> Run:
        twin = _twin(model, exact, share)
        twin.train(mode == "train")
        layers = _kept_layers(twin) if keep_layers else {}
        # Copies of the inputs too: a model that works in place must not change what the next run sees.
        args, kwargs = pytree.tree_map(lambda leaf: copied(leaf, exact), tuple(call))
        with isolated(devices), Arithmetic(twin.parameters() if share else (), dtype, shaken=shaken) as arithmetic:
            outputs = dict(flatten(twin(*args, **kwargs)))  # walked inside, where iterators still compute
        return Run(outputs, bool(arithmetic.islands), layers)

    try:
        with isolated(devices):
            try:
                return once(_can_share(model))
            except WeightsChanged:
                return once(False)
    except Exception as error:
        what = f"The float64 copy of the {who}" if exact else f"The {who}"
        hint = " Without it algebra cannot be told from rounding; let the module follow its weights' dtype." * exact
        raise MorphError(f"{what} could not be run in {mode} mode: {type(error).__name__}: {error}.{hint}") from error


def _twin(model: nn.Module, exact: bool, share: bool) -> nn.Module:
    """A copy of the modules; where they `share` parameters, these are aliases of the model's, in the model's own dtype."""
    memo: dict[int, Any] = {}
    if share:
        for parameter in model.parameters():
            with_grad = parameter.requires_grad and not parameter.is_inference()
            alias = torch.Tensor._make_subclass(type(parameter), parameter.detach(), with_grad)
            vars(alias).update(vars(parameter))
            memo[id(parameter)] = alias
        memo |= {id(buffer): copied(buffer, exact) for buffer in model.buffers()}
    for module in model.modules():
        for value in vars(module).values():
            if type(value) is Tensor:  # PyTorch copies none that has a history
                memo.setdefault(id(value), copied(value, False))
    twin = clone(model, memo) if share else deepcopy(model, memo)
    if exact and not share:
        twin.double()
        for tensor in chain(twin.parameters(), twin.buffers()):
            if tensor.is_complex():  # .double() leaves these as they are
                tensor.data = widened(tensor.data)
    return twin


def _kept_layers(model: nn.Module) -> LayerOutputs:
    """Where every layer of the model, itself excepted, will leave copies of its outputs when it runs."""
    layers: LayerOutputs = {}
    calls: Counter[str] = Counter()

    def leave(name: str, module: nn.Module, output: Any) -> None:
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else [output]
        tensors = [part.detach().clone() for part in parts if isinstance(part, Tensor)]
        calls[name] += 1
        layers[name, calls[name]] = (type(module).__name__, tensors)

    for name, module in model.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            module.register_forward_hook(lambda module, _, output, name=name: leave(name, module, output))
    return layers


def _can_share(model: nn.Module) -> bool:
    """Whether the model can run on aliases of its parameters: not TorchScript, which holds them itself, nor wrappers."""
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    return not scripted and not any(map(is_traceable_wrapper_subclass, chain(model.parameters(), model.buffers())))


def bare(model: nn.Module) -> nn.Module:
    """The network inside a data-parallel wrapper or a compiled module, which computes the same."""
    parallel = isinstance(model, (DataParallel, DistributedDataParallel))
    inner = getattr(model, "module" if parallel else "_orig_mod", None)
    return bare(inner) if isinstance(inner, nn.Module) else model


@contextmanager
def isolated(devices: set[str]) -> Iterator[None]:
    """No gradients, no autocast and no inference mode, one thread at a time, and the generators put back after.

    So every run starts from one state of them, and parent and child draw the same numbers. On CUDA, cuDNN keeps float32
    convolutions and RNNs out of TF32 meanwhile: no float32 tolerance holds its 1e-3. That alone is seen by other threads.
    Matrix products use TF32 only where the user asked for it, and then their rounding is the user's.
    """
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with _ALONE, ExitStack() as stack:
        for manager in (torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(cuda, device_type="cuda")):
            stack.enter_context(manager)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 (the generator that models use)
        for device in devices | {"cpu"}:
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type == "meta":  # what forward makes has to have values
            stack.enter_context(torch.device("cpu"))
        if "cuda" in devices:
            cudnn: Any = torch.backends.cudnn
            for operations in (cudnn.conv, cudnn.rnn):
                stack.callback(setattr, operations, "fp32_precision", operations.fp32_precision)
                operations.fp32_precision = "ieee"
        yield
