"""Width: a layer gets more output channels, and so does everything that shares them; all that reads them cancels the new ones.

Which tensors that are is found by running the model's structure once (see `fastmorph.graph`). The child is of the parent's own
class: its tensors and the sizes that its layers keep are changed, its code is not.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.errors import MorphError
from fastmorph.graph.attributes import update_attributes
from fastmorph.graph.growth import Growth
from fastmorph.graph.guess import traced
from fastmorph.graph.propose import Refusal, find_growth
from fastmorph.graph.record import Record
from fastmorph.graph.skeleton import Skeleton
from fastmorph.widen_fill import FILLS, Filling


@dataclass(frozen=True)
class Widen:
    """Give a layer `channels` output channels, as data (the arguments of `widen`)."""

    layer: str
    channels: int
    fill: str = "pair"

    def apply(self, morphing: Any) -> None:
        """Widen the layer of `morphing.model`, in place.

        Raises MorphError if that cannot be exact, with the module, the cause and the nearest width that would be.
        """
        if self.fill not in FILLS:
            raise MorphError(f"layer {self.layer!r}: fill={self.fill!r} must be one of {', '.join(FILLS)}.")
        model, skeleton = morphing.model, Skeleton(morphing.model)
        inputs, record = traced(skeleton, morphing.example_inputs)
        growth = plan_growth(model, skeleton, record, self.layer, self.channels, inputs)
        if growth is None:
            return
        shapes = growth.shapes()
        if morphing.with_weights:
            morphing.settle()
            filling = Filling(growth, self.fill, morphing.random)
        for name, shape in shapes.items():
            old = _tensor(model, name)
            with torch.no_grad():
                if morphing.with_weights:
                    new, linear, square = filling.tensor(name, old.detach())
                    morphing.replace(old, new, linear=linear, square=square)
                else:
                    morphing.replace(old, old.detach().new_empty(shape), linear=_unset, square=_unset)
        update_attributes(model, growth)


def plan_growth(
    model: nn.Module, skeleton: Skeleton, record: Record, layer: str, channels: int, inputs: tuple[Any, ...]
) -> Growth | None:
    """What must grow for `layer` to have so many output channels; None if it has them.

    Raises MorphError, with the module, the cause and the nearest width that would be exact.
    """
    atoms = channels_of(model, record, layer)
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < len(atoms):
        raise MorphError(f"layer {layer!r} has {len(atoms)} channels: channels={channels!r} must be an int of at least that.")
    if channels == len(atoms):
        return None
    found = find_growth(skeleton, record, atoms, channels, inputs)
    if isinstance(found, Growth):
        return found
    near = sorted({r.near for r in found if r.near is not None}, key=lambda width: abs(width - channels))
    for width in near:
        if isinstance(find_growth(skeleton, record, atoms, width, inputs), Growth):
            cause = next(refusal.cause for refusal in found if refusal.near == width)
            raise MorphError(
                f"layer {layer!r} cannot have {channels} channels: {cause}; the nearest number that works is {width}."
            )
    raise MorphError(f"layer {layer!r} cannot be widened: {found[0].cause}; widen another layer.")


def channels_of(model: nn.Module, record: Record, layer: str) -> Tensor:
    """The atoms of the channels that a layer puts out, in order.

    Raises MorphError if there is no such layer, or it makes none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if layer in record.outputs:
        return record.outputs[layer]
    if layer not in modules:
        near = difflib.get_close_matches(layer, modules, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}" if near else ""
        raise MorphError(f"the model has no layer {layer!r}{hint} (see model.named_modules()).")
    own = {id(parameter) for parameter in modules[layer].parameters(recurse=False)}
    weights = [name for name in record.outputs if id(_tensor(model, name)) in own]
    if len(weights) == 1:
        return record.outputs[weights[0]]
    kind = type(modules[layer]).__name__
    if weights:
        raise MorphError(f"layer {layer!r} makes channels with several weights; name one of {', '.join(map(repr, weights))}.")
    inside = [name for name in record.outputs if name.startswith(layer + ".")]
    if inside:
        hint = f"name a layer in it, e.g. {inside[0].rpartition('.')[0]!r}"
    elif own:
        hint = "name the layer that makes the channels, or run the model on example_inputs= that reach it"
    else:
        hint = "name a layer with a weight"
    raise MorphError(
        f"layer {layer!r} cannot be widened: it is a {kind} that made no channels of its own when the model ran; {hint}."
    )


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), key)
    assert isinstance(tensor, Tensor)
    return tensor


def _unset(moment: Tensor) -> Tensor:
    return moment


__all__ = ["Refusal", "Widen", "channels_of", "plan_growth"]
