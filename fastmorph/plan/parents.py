"""Models that cannot be morphed as they are: wrapped, sharded or compiled ones; and children that their class cannot save."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmorph.errors import MorphError
from fastmorph.graph.skeleton import check_keras

Shapes = Mapping[str, tuple[int, ...]]
_SHARDED = {"FullyShardedDataParallel": "FSDP", "FSDPModule": "FSDP2 (fully_shard)"}


def check_parent(model: nn.Module) -> None:
    """Raise MorphError, with what to do instead, for a model whose child could not be made or could not train."""
    for name, module in model.named_modules():
        what = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise MorphError(
                f"{what} is TorchScript, whose code is fixed and whose copies PyTorch does not train: morph with the nn.Module "
                "that it was made from, then script the child."
            )
        if type(module).__name__ == "OptimizedModule":
            raise MorphError(
                f"{what} is compiled by torch.compile: morph the original model, then compile the child (the original is its "
                "_orig_mod, and shares the optimizer)."
            )
        check_keras(what, module)
        if isinstance(module, DistributedDataParallel):
            raise MorphError(
                f"{what} is wrapped in DistributedDataParallel, which goes on reducing the parent's gradients: morph its "
                ".module on each process, with one seed (generator=), then wrap the child anew; or let "
                "fastmorph.distributed.morph do that."
            )
        sharded = next((_SHARDED[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _SHARDED), None)
        if sharded is not None:
            raise MorphError(
                f"{what} is sharded by {sharded}, so that no process holds whole weights: "
                + (
                    "fastmorph.distributed.morph grows it shard by shard."
                    if "FSDP2" in sharded
                    else "gather its full state dict into an unsharded copy of the model and morph that, or into one "
                    "sharded by fully_shard, which fastmorph.distributed.morph grows shard by shard."
                )
            )
    for name, parameter in model.named_parameters():
        if type(parameter.data).__module__.startswith("torch.distributed"):
            raise MorphError(
                f"the parameter {name!r} is a {type(parameter.data).__name__}, distributed over a mesh: "
                "fastmorph.distributed.morph grows the model shard by shard."
            )


def check_targets(model: nn.Module, operators: Iterable[Any]) -> None:
    """Raise MorphError, with the name, for a target that is a module or anything else but a name."""
    for target in (operator.target for operator in operators):
        if not isinstance(target, str):
            names = [name for name, module in model.named_modules() if module is target]
            hint = f"its name is {names[0]!r}" if names else "see model.named_modules()"
            raise MorphError(f"a morph takes the name of a layer, not a {type(target).__name__}: {hint}.")


# --- children that their class cannot hold -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CannotSave:
    """Stands in the place of a child's `save_pretrained`, whose files its class would load into other layers, or fresh ones."""

    kind: str
    changed: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raise MorphError."""
        raise MorphError(
            f"{self.kind}.save_pretrained would write a checkpoint that from_pretrained cannot load: {self.changed!r} is not "
            "as the config says. Save child.state_dict(), Morphed.history and the parent's config instead; to load, make the "
            "parent from its config, then fastmorph.restructure(parent, history) and load_state_dict."
        )


def savable(model: nn.Module) -> dict[str, Shapes]:
    """By name, the shapes of the tensors in each module that can `save_pretrained`."""
    found: dict[str, Shapes] = {}
    for name, module in model.named_modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            found[name] = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    return found


def _is_as_configured(module: nn.Module, shapes: Shapes) -> bool:
    """Whether the module's class makes one of these tensors, whose parts count what its parts count, from its config."""
    try:
        with torch.device("meta"):
            fresh = type(module)(deepcopy(module.config))
    except Exception:  # a class that is made otherwise, or a config that it refuses
        return False
    if {key: tuple(tensor.shape) for key, tensor in fresh.state_dict().items()} != shapes:
        return False
    counted = ([(name, _counts(part)) for name, part in each.named_modules()] for each in (module, fresh))
    return next(counted) == next(counted)


def _counts(module: nn.Module) -> dict[str, int]:
    """What a module counts, without widths that its tensors tell."""
    numbers = ((key, value) for key, value in vars(module).items() if type(value) is int and not key.startswith("_"))
    return {key: value for key, value in numbers if not re.search(r"embed|hidden|model|width", key)}


def guard_saving(child: nn.Module, before: Mapping[str, Shapes]) -> None:
    """Let `save_pretrained` raise where a module has other tensors than `before`, as `savable` found them in the parent.

    Unless its config says so too.
    """
    for name, after in savable(child).items():
        known = before.get(name, after)
        changed = next((key for key in [*known, *after] if known.get(key) != after.get(key)), None)
        module = child.get_submodule(name)
        if changed is not None and not _is_as_configured(module, after):
            vars(module)["save_pretrained"] = CannotSave(type(module).__name__, changed)
