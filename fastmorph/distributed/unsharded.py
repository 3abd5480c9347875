"""A sharded model as it was before it was sharded: its own classes, without the hooks by which PyTorch shards."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastmorph.distributed.shards import RankShelf, whole
from fastmorph.errors import MorphError
from fastmorph.graph.clone import clone
from fastmorph.plan.lineage import Lineage

_ENGINE, _STATE = "torch.distributed", "__composable_api"  # its hooks' module, and its state's place in a module
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "_distribute_module_applied", "_compiled_call_impl")
_WRAPPED = ("_checkpoint_wrapped_module.", "_orig_mod.")


def inner(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel. Raises MorphError for FSDP1, with the way that works."""
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise MorphError(
                f"{f'module {name!r}' if name else 'the model'} is sharded by FullyShardedDataParallel (FSDP1), whose flat "
                "parameters hold no tensor as a whole: take its full state dict (torch.distributed.checkpoint.state_dict."
                "get_model_state_dict), load it into the model sharded by fully_shard (FSDP2), and grow that."
            )
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is a DTensor."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Let go of what a forward left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def plain_name(name: str) -> str:
    """The name of a parameter or module without the wrappers that it stands in."""
    for part in _WRAPPED:
        name = name.replace(part, "")
    return name


def unsharded(model: nn.Module, shelf: RankShelf, architecture: nn.Module | None) -> tuple[nn.Module, Lineage]:
    """A copy of the network that the model was before it was sharded, its parameters elsewhere: in the model's own shards.

    Args:
        model: the sharded model; it is not touched.
        shelf: reads the shards.
        architecture: such a network, on the meta device; None: made from the model's modules and their classes.

    Raises:
        MorphError: it cannot be made so, or is not of the model's parameters.
    """
    parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {plain_name(name): b for name, b in model.named_buffers(remove_duplicate=False)}
    twins: dict[int, nn.Parameter] = {}
    for parameter in parameters.values():
        if id(parameter) not in twins:
            twins[id(parameter)] = twin = nn.Parameter(shelf.sharded(parameter), parameter.requires_grad)
            vars(twin).update({key: mark for key, mark in vars(parameter).items() if not key.startswith("_")})
    with torch.no_grad():
        copies = {id(buffer): whole(buffer.detach()).clone() for buffer in buffers.values()}
    if architecture is None:
        network = _bare(model, {})
        try:
            twin_model = clone(network, {**twins, **copies})
        except (AssertionError, RuntimeError, TypeError) as error:
            raise MorphError(
                f"the model that was sharded cannot be made from its modules ({type(error).__name__}: {error}); pass "
                "architecture=, a function that builds it unsharded."
            ) from error
    else:
        twin_model = architecture
        _fill(twin_model, {name: twins[id(p)] for name, p in parameters.items()}, "_parameters")
        _fill(twin_model, {name: copies[id(b)] for name, b in buffers.items()}, "_buffers")
        twin_model.train(model.training)
    ancestors = {twins[id(parameter)]: parameter for parameter in parameters.values()}
    return twin_model, Lineage((twin, ancestors[twin]) for twin in twin_model.parameters())


def _fill(model: nn.Module, tensors: dict[str, Any], register: str) -> None:
    """Put tensors in a network's places. Raises MorphError where names or shapes differ."""
    for path, module in model.named_modules(remove_duplicate=False):
        held = getattr(module, register)
        for key, old in held.items():
            name = f"{path}.{key}" if path else key
            if old is None:
                continue
            new = tensors.get(name)
            if new is None or new.shape != old.shape:
                found = "none" if new is None else f"one of shape {tuple(new.shape)}"
                raise MorphError(
                    f"architecture= builds a network with {name!r} of shape {tuple(old.shape)}, and the model has {found}; it "
                    "must build the network that was sharded, as it is now."
                )
            held[key] = new


def _bare(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """The module in its own class, parts and all, sharing tensors, without what the engine added."""
    if id(module) in made:
        return made[id(module)]
    wrapped = module._modules.get("_orig_mod") if type(module).__name__ == "OptimizedModule" else None
    if isinstance(module, ActivationWrapper):
        wrapped = module._modules["_checkpoint_wrapped_module"]
    if wrapped is not None:
        made[id(module)] = new = _bare(wrapped, made)
        return new
    kind: Any = type(module)
    if isinstance(module, FSDPModule):
        kind = kind.__mro__[module._orig_cls_mro_index]
    made[id(module)] = new = object.__new__(kind)
    for key, value in vars(module).items():
        if key.startswith(_STATE) or key in _MARKS:
            continue
        if key == "_modules":
            value = {name: part if part is None else _bare(part, made) for name, part in value.items()}
        elif key in ("_parameters", "_buffers"):
            value = dict(value)
        elif isinstance(value, OrderedDict) and key.endswith("hooks"):
            value = OrderedDict((number, hook) for number, hook in value.items() if not _is_of_engine(hook))
        vars(new)[key] = value
    for key, value in vars(module).items():  # flags of hooks that are gone
        if isinstance(value, OrderedDict) and key.startswith("_") and "hooks_" in key:
            base = key[: key.index("hooks_") + 5]
            kept = vars(new).get(base)
            vars(new)[key] = OrderedDict((n, deepcopy(flag)) for n, flag in value.items() if kept is None or n in kept)
    return new


def _is_of_engine(hook: Any) -> bool:
    """Whether a hook is PyTorch's, of sharding; PyTorch wraps hooks of state dicts."""
    hook = getattr(hook, "hook", hook)
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__module__", "") or "").startswith(_ENGINE)
