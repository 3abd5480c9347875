"""Layers by name: which channels they make."""

from __future__ import annotations

import difflib

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

from fastmorph.errors import MorphError
from fastmorph.graph.record import Record
from fastmorph.nn.computed import weight_hooks


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this name."""
    path, _, key = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), key)
    assert isinstance(tensor, Tensor)
    return tensor


def weights_of(model: nn.Module, record: Record) -> dict[int, str]:
    """The weights that made channels: the tensors' ids and names."""
    return {id(tensor_of(model, name)): name for name in record.outputs}


def submodule_of(model: nn.Module, name: str) -> nn.Module:
    """The module of this name; MorphError, with names like it, if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        near = difflib.get_close_matches(name, [name for name, _ in model.named_modules(remove_duplicate=False)], n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}" if near else ""
        raise MorphError(f"the model has no layer {name!r}{hint} (see model.named_modules()).") from None


def backbone_hint(model: nn.Module) -> str:
    """What else can be done with a model that cannot be followed: a detector takes lists of images and branches on values."""
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        return ""
    return " The model has a backbone: morph model.backbone alone, and put the child in its place."


def how_to_bake(model: nn.Module, name: str) -> str | None:
    """Where a module, or what holds a tensor of that name, computes its weight: how to make that a plain one, a clause."""
    modules = dict(model.named_modules())
    while name not in modules:
        name = name.rpartition(".")[0]
    module = modules[name]
    how = None
    for hook in weight_hooks(module).values():
        how = "remove_spectral_norm(layer)" if isinstance(hook, SpectralNorm) else "remove_weight_norm(layer)"
    if is_parametrized(module, "weight"):
        how = "parametrize.remove_parametrizations(layer, 'weight')"
    return f"bake the weight of {name!r} first: torch.nn.utils.{how}" if how else None


def channels_of(model: nn.Module, record: Record, layer: str, weights: dict[int, str]) -> Tensor:
    """The atoms of the channels that a layer, or a weight, makes, in order; `weights` as `weights_of` gives them.

    Raises MorphError if there is no such layer, or it made none.
    """
    if layer in record.outputs:
        return record.outputs[layer]
    module = submodule_of(model, layer)
    own = [id(parameter) for parameter in module.parameters(recurse=False)]
    if is_parametrized(module):
        own += [id(parameter) for parameter in module.get_submodule("parametrizations").parameters()]
    made = [weights[parameter] for parameter in own if parameter in weights]
    if len(made) == 1:
        return record.outputs[made[0]]
    if made:
        raise MorphError(f"layer {layer!r} makes channels with several weights; name one of {', '.join(map(repr, made))}.")
    inside = [] if is_parametrized(module) else [name for name in record.outputs if name.startswith(layer and layer + ".")]
    if inside:
        hint = f"name a layer in it, e.g. {inside[0].rpartition('.')[0]!r}"
    elif baking := how_to_bake(model, layer):
        hint = baking
    elif own:
        hint = "name the layer that makes the channels, or pass example_inputs= that reach this one"
    else:
        hint = "name a layer with a weight"
    kind = type(module).__name__
    raise MorphError(f"layer {layer!r} cannot be widened: it is a {kind} and makes no channels of its own; {hint}.")
