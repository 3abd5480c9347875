"""Width: a layer gets more output channels, and so does everything that shares them; all that reads them cancels the new ones.

Which tensors that are is found by running the model's structure once (see `fastmorph.graph`). The child is of the parent's
own class: its tensors and the sizes that its modules keep are changed, its code is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastmorph.errors import MorphError
from fastmorph.graph.attributes import update_attributes
from fastmorph.graph.find import channels_of, tensor_of
from fastmorph.graph.growth import Growth
from fastmorph.graph.guess import traced
from fastmorph.graph.propose import Proposals
from fastmorph.graph.skeleton import Skeleton
from fastmorph.morphs.widen_fill import FILLS, Filling

if TYPE_CHECKING:
    from fastmorph.plan.transaction import Transaction


@dataclass(frozen=True)
class Widen:
    """Give a layer `channels` output channels, as data (the arguments of `widen`).

    `fill` says what the new channels begin with: "pair", twins that cancel, "zero", one side zero (the paper's), or
    "duplicate", copies of old channels that share their weight (Net2Wider); see `fastmorph.morphs.widen_fill`.
    """

    layer: str
    channels: int
    fill: str = "pair"

    def apply(self, transaction: Transaction) -> None:
        """Widen the layer of `transaction.model`, in place.

        Raises MorphError if that cannot be exact, with the module, the cause and, if there is one, the nearest width that
        works.
        """
        if self.fill not in FILLS:
            raise MorphError(f"layer {self.layer!r}: fill={self.fill!r} must be one of {', '.join(map(repr, FILLS))}.")
        growth = self._growth(transaction.model, transaction.example_inputs)
        if growth is None:
            return
        shapes = growth.shapes()
        if transaction.with_weights:
            transaction.settle()
        filling = Filling(growth, self.fill, transaction.noise("widen", self.layer)) if transaction.with_weights else None
        for name, shape in shapes.items():
            old = tensor_of(transaction.model, name)
            if filling is None:
                transaction.replace(old, old.detach().new_empty(shape), linear=None, square=None)
            else:
                with torch.no_grad():
                    new, linear, square = filling.tensor(name, old.detach())
                transaction.replace(old, new, linear=linear, square=square)
        update_attributes(transaction.model, growth)

    def _growth(self, model: nn.Module, example_inputs: tuple[Any, ...] | None) -> Growth | None:
        """What must grow for the layer to have so many channels; None if it has them."""
        skeleton = Skeleton(model)
        inputs, record = traced(skeleton, example_inputs)
        atoms = channels_of(model, record, self.layer)
        channels, old = self.channels, len(atoms)
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < old:
            raise MorphError(f"layer {self.layer!r} has {old} channels: channels={channels!r} must be an int of at least that.")
        if channels == old:
            return None
        growth = find_growth(Proposals(skeleton, record, atoms, inputs), self.layer, channels)
        self._check_fill(growth)
        return growth

    def _check_fill(self, growth: Growth) -> None:
        record = growth.coupling.record
        standardised = record.standardised.numpy() & (growth.copies > 0)
        if standardised.any() and self.fill != "pair":
            name = record.axis_of(int(standardised.argmax())).name
            raise MorphError(
                f"layer {self.layer!r}: {name!r} is standardised row by row, which twins alone leave as it is; use fill='pair'."
            )
        if not growth.known and self.fill == "duplicate":
            raise MorphError(
                f"layer {self.layer!r}: the model shuffles its channels, and some new ones take ways that no old one takes, so "
                "that they have none to duplicate; use fill='pair' or 'zero'."
            )


def find_growth(proposals: Proposals, layer: str, channels: int) -> Growth:
    """A growth of `layer` to so many channels.

    Raises MorphError, with the module, the cause and the nearest width that works.
    """
    found = proposals.find(channels)
    if isinstance(found, Growth):
        return found
    nearest = proposals.nearest(channels, found)
    if nearest is None:
        raise MorphError(f"layer {layer!r} cannot get more channels: {found[0].cause}; {found[0].remedy}.")
    width, cause = nearest
    raise MorphError(f"layer {layer!r} cannot have {channels} channels: {cause}; the nearest number that works is {width}.")
