"""Which layers can be morphed, how a layer's weight becomes an equation, and how it is replaced in a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

import fastmorph.plan.known_layers  # noqa: F401 - registers them
from fastmorph.elsewhere import Elsewhere
from fastmorph.errors import MorphError
from fastmorph.nn.computed import weight_hooks
from fastmorph.plan.layer_types import LayerRule, find_rule

# Modules whose own forward reads a sublayer's weight instead of calling it: the sublayer cannot become two.
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_SIZES = (
    *("in_features", "out_features", "in_channels", "out_channels"),
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that can be morphed.

    Attributes:
        name: its dotted name.
        module: a plain nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, or their transposed kin where asked for; before
            `make_plain`, a module of any class that has a rule.
        rule: how it is read.
    """

    name: str
    module: Any
    rule: LayerRule

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return self.rule.spatial_dims

    @property
    def is_plain(self) -> bool:
        """Whether it computes with its own parameters as PyTorch's layers do."""
        computed = parametrize.is_parametrized(self.module) or weight_hooks(self.module)
        return self.rule.cls is self.rule.plain and not computed

    @property
    def origins(self) -> list[nn.Parameter]:
        """The parameters that its weight is, or is computed from."""
        return _origins(self.module)

    @property
    def origin(self) -> nn.Parameter:
        """The parameter that its weight is, or is computed from: one of the weight's size, where there is one."""
        parameters = self.origins
        size = max(parameter.numel() for parameter in parameters)
        return next(parameter for parameter in parameters if parameter.numel() == size)

    @property
    def groups(self) -> int:
        """Number of independent equations."""
        return self.module.groups if self.dims else 1

    @property
    def channels(self) -> tuple[int, int]:
        """Output and input channels of all groups together."""
        if self.dims:
            return self.module.out_channels, self.module.in_channels
        return self.module.out_features, self.module.in_features

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size K."""
        return tuple(self.module.weight.shape[2:])

    def grouped_weight(self) -> Tensor:
        """The weight as a batch of equations, (groups, Co / groups, Ci / groups, *K)."""
        weight = self.module.weight.detach()
        return weight.reshape(self.groups, -1, *weight.shape[1:])

    def padding(self, kernel: tuple[int, ...] | None = None) -> list[tuple[int, int]]:
        """Padding before and after each spatial dimension, in input pixels; as it would be for another kernel size."""
        given, sides = self.module.padding, []
        for dim, (size, dilation) in enumerate(zip(kernel or self.kernel, self.module.dilation, strict=True)):
            if given == "same":  # PyTorch puts the odd one behind
                total = dilation * (size - 1)
                sides.append((total // 2, total - total // 2))
            else:
                sides.append((0, 0) if given == "valid" else (given[dim], given[dim]))
        return sides


def find_layer(model: nn.Module, name: str, *, transposed: bool = False) -> Layer:
    """The layer called `name`, if replacing it can preserve what the model computes.

    Transposed convolutions are found where the caller can do with them.

    Raises MorphError, with the layer, the cause and the remedy.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}" if near else ""
        raise MorphError(f"the model has no layer {name!r}{hint} (see model.named_modules()).")
    module = modules[name]
    rule, override = find_rule(module)
    if rule is None or (rule.transposed and not transposed):
        kinds = ["Linear", *(f"Conv{dims}d" for dims in (1, 2, 3))] + [f"ConvTranspose{d}d" for d in (1, 2, 3) if transposed]
        remedy = f"name one of {', '.join(f'nn.{kind}' for kind in kinds)}, or of a class that fm.register_layer knows"
        raise refusal(name, f"it is a {type(module).__name__}", remedy)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
        raise refusal(name, "it is lazy and has no weight yet", "run the model once on a batch")
    if not _origins(module) or _is_computed_elsewhere(module, rule):
        raise refusal(
            name,
            "its weight is computed anew from other tensors (by pruning or a hook)",
            "bake it first, e.g. torch.nn.utils.prune.remove(layer, 'weight')",
        )
    if override is not None:
        plain = f"nn.{rule.plain.__name__}"
        raise refusal(
            name, override, f"say by fm.register_layer how to read its weight, or replace it by an equivalent {plain}"
        )
    layer = Layer(name, module, rule)
    if layer.is_plain:
        check_weight(name, module.weight)
    check_surroundings(model, name, module)
    return layer


def _is_computed_elsewhere(module: nn.Module, rule: LayerRule) -> bool:
    """Whether something that we do not know gives the layer its weight."""
    if parametrize.is_parametrized(module, "weight") or any(hook.name == "weight" for hook in weight_hooks(module).values()):
        return False
    pruned = any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
    return pruned or "weight" in vars(module) or (rule.weight is None and module._parameters.get("weight") is None)


def check_weight(name: str, weight: Any) -> None:
    """Refuse a layer whose weight is no plain floating-point tensor."""
    if (
        type(weight) not in (Tensor, nn.Parameter, Elsewhere)
        or not weight.is_floating_point()
        or torch.finfo(weight.dtype).bits < 16
    ):
        raise refusal(
            name,
            f"its weight is a {type(weight).__name__} of {weight.dtype} (quantised, complex, sharded or of another library)",
            "convert the layer to a plain floating-point one",
        )


def _origins(module: nn.Module) -> list[nn.Parameter]:
    """What a layer's weight is computed from."""
    biases = ("bias", "parametrizations.bias")
    return [parameter for name, parameter in module.named_parameters() if not name.startswith(biases)]


def check_surroundings(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse what other modules do with this one, or with its weight, besides calling it.

    Raises MorphError, with the layer, the cause and the remedy.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for owner_name, attribute, owner in _owners(model, module):
        if isinstance(owner, _READ_WEIGHTS):
            raise refusal(
                name,
                f"{type(owner).__name__} {owner_name!r} reads the weight of its {attribute!r} instead of calling it",
                "morph another layer, or replace that module by one that calls its layers",
            )
    own, origins = set(module.modules()), _origins(module)
    for other_name, other in modules.items():
        for key, value in vars(other).items():
            if not key.startswith("_") and any(item is module for item in _items(value)):
                raise refusal(
                    name,
                    f"{type(other).__name__} {other_name!r} also keeps it in its attribute {key!r}, outside PyTorch's registry",
                    "keep it as a submodule (nn.ModuleList, nn.ModuleDict) only",
                )
        if other not in own:
            for key, parameter in other._parameters.items():
                if parameter is not None and any(_same_memory(parameter, origin) for origin in origins):
                    raise refusal(
                        name,
                        f"its weight is tied to {other_name + '.' + key!r}",
                        "untie it first: layer.weight = torch.nn.Parameter(layer.weight.detach().clone())",
                    )


def _items(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    else:
        yield value


def _same_memory(one: Tensor, two: Any) -> bool:
    if one is two:
        return True
    if isinstance(one, Elsewhere) or isinstance(two, Elsewhere):
        return False
    if isinstance(one, nn.parameter.UninitializedParameter) or not one.numel():
        return False
    return one.device == two.device and one.device.type != "meta" and one.data_ptr() == two.data_ptr()


def refusal(name: str, cause: str, remedy: str) -> MorphError:
    """The error for a layer that cannot be morphed."""
    return MorphError(f"layer {name!r} cannot be morphed: {cause}; {remedy}.")


def _owners(model: nn.Module, module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Every registered place of `module`: (owner's name, attribute, owner)."""
    for owner_name, owner in model.named_modules():
        for attribute, child in owner._modules.items():
            if child is module:
                yield owner_name, attribute, owner


def unhooked(module: nn.Module) -> nn.Module:
    """The same module, its tensors and parts shared, without the hooks that others put on it."""
    bare = module.__new__(type(module))
    vars(bare).update(vars(module))
    for hooks in _HOOKS:
        setattr(bare, hooks, getattr(nn.Module(), hooks))
    bare._forward_pre_hooks.update(weight_hooks(module))
    return bare


def sizes_of(module: nn.Module) -> dict[str, Any]:
    """A layer's constructor arguments, as its attributes have them."""
    return {name: vars(module)[name] for name in _SIZES if name in vars(module)}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `model` has `old`, with its hooks and mode; returns the model (`new` if it was `old`).

    `old` keeps none of its hooks, so that it may stand inside `new`. Sizes of `old` (stride, kernel_size, ...) can be read off
    `new`, unless it says otherwise: a forward that computes a padding from them gets what it got.
    """
    for size, value in sizes_of(old).items():
        vars(new).setdefault(size, value)
    bare = nn.Module()
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
        setattr(old, hooks, getattr(bare, hooks))
    for key in weight_hooks(new):  # these work on the module whose weight they compute
        old._forward_pre_hooks[key] = new._forward_pre_hooks.pop(key)
    new.train(old.training)
    if old is model:
        return new
    for _, attribute, owner in list(_owners(model, old)):
        owner._modules[attribute] = new
    return model
