"""What is wrong with a child, told without fastmorph's own certificate: outputs, and all that must not change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# Largest |child - parent| over the output's largest value, by the coarsest arithmetic; see `fastmorph.Certificate`. Where the
# network's own rounding is larger, 16 times that is the bound.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 8 * 2**-7}
NUMBERS = (bool, int, float, complex)
WORDS = (str, bytes, type(None))


def leaves(value: Any, path: str = "out") -> Iterator[tuple[str, Any]]:
    """(path, leaf) as far as Python objects go, and (path, its type) for each container."""
    if isinstance(value, Tensor):
        yield path, value.detach()
    elif isinstance(value, NUMBERS):
        yield path, torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    elif isinstance(value, WORDS):
        yield path, value
    else:
        yield path, type(value)
        for key, item in _items(value):
            yield from leaves(item, f"{path}.{key}")


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in fields(value)]
    if hasattr(value, "__iter__"):
        return list(enumerate(value))
    slots = getattr(type(value), "__slots__", ())
    return [(name, getattr(value, name)) for name in slots] or list(vars(value).items())


def outputs(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Tensor]]) -> dict[str, Any]:
    """Leaves of one call of a copy of the model, in the model's modes."""
    args, keywords = copy.deepcopy(call)
    torch.manual_seed(0)
    with torch.no_grad():
        return dict(leaves(copied(model)(*args, **keywords)))


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; of weights that hooks computed with gradients, which PyTorch does not copy, the values."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in held})


def difference(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, str]:
    """Largest relative difference and where it is; inf where two cannot be subtracted."""
    if before.keys() != after.keys():
        return float("inf"), f"other outputs: {sorted(after.keys() ^ before.keys())}"
    worst = (0.0, "")
    for path, one in before.items():
        two = after[path]
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            if not (isinstance(one, (type, *WORDS)) and one == two):
                return float("inf"), f"{path} is {two!r}, not {one!r}"
        elif one.shape != two.shape or one.dtype != two.dtype:
            return float("inf"), f"{path} is {two.dtype} {tuple(two.shape)}, not {one.dtype} {tuple(one.shape)}"
        elif one.numel():
            one, two = one.double(), two.double()
            where = one.isfinite()
            if not torch.equal(where, two.isfinite()):
                return float("inf"), f"{path} is not finite"
            apart, scale = (one - two)[where].abs(), one[where].abs()
            # Outputs that vanish, as a channel less its own mean does, are held to what they are made of.
            found = float(apart.max() / scale.max().clamp_min(1e-3)) if where.any() else 0.0
            worst = max(worst, (found, path))
    return worst


def rounding(model: nn.Module, call: Any, grain: torch.dtype, before: dict[str, Any]) -> float:
    """The parent's own rounding: what moves when inputs and parameters move by one unit in the last place of `grain`."""
    eps, worst = torch.finfo(grain).eps, 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def moved(tensor: Tensor, generator: torch.Generator = generator) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            sign = torch.randint(-1, 2, tensor.shape, generator=generator)
            return (tensor.detach().double() * (1 + eps * sign)).to(tensor.dtype)

        other = copied(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(moved(parameter))
        near = tree_map_only(Tensor, moved, call)
        worst = max(worst, difference(before, outputs(other, near))[0])
    return max(worst, eps)


def bound(model: nn.Module, call: Any, grain: torch.dtype, dtype: torch.dtype, before: dict[str, Any]) -> float:
    """The largest relative difference that is no mistake."""
    coarsest = max((grain, dtype), key=lambda kind: torch.finfo(kind).eps)
    measured = rounding(model, call, coarsest, before)
    return max(BOUNDS[dtype], 16 * measured)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a morph must leave as it is: bits, gradients, modes, hooks, attributes."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            kept = dict(value) if isinstance(value, dict) else value
            if isinstance(value, Mapping):
                kept = [(k, id(v)) for k, v in value.items()]
            elif not isinstance(value, (*NUMBERS, *WORDS, tuple)):
                kept = id(value)
            found[f"{name}:{key}"] = kept
        found[f"{name}:class"] = type(module)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name} bits"] = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        found[f"{name} grad"] = (tensor.requires_grad, None if tensor.grad is None else tensor.grad.sum().item())
    return found


def other_modes(parent: nn.Module, child: nn.Module) -> str:
    """A module of the child that is not in the mode of the parent's module of that name, or of the nearest one above it."""
    modes = {name: module.training for name, module in parent.named_modules(remove_duplicate=False)}
    for name, module in child.named_modules(remove_duplicate=False):
        above = name
        while above not in modes:
            above = above.rpartition(".")[0]
        if module.training != modes[above]:
            return f"module {name!r} is {'' if module.training else 'not '}in train mode"
    return ""
