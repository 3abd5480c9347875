"""A layer that shares its weight with others gets one of its own, so that the two can grow and train apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fastmorph.elsewhere import values_of
from fastmorph.errors import MorphError
from fastmorph.graph.find import submodule_of
from fastmorph.plan.operators import register_operator
from fastmorph.plan.transaction import Transaction
from fastmorph.transformers.sizes import configs


@dataclass(frozen=True)
class Untie:
    """Give a layer copies of the weight, and of other parameters, that it shares; configs then say that nothing is tied."""

    layer: str

    @property
    def target(self) -> str:
        """The layer."""
        return self.layer

    def apply(self, transaction: Transaction) -> None:
        """Put the copies in the layer of `transaction.model`. In an optimizer their moments start afresh."""
        layer = submodule_of(transaction.model, self.layer)
        others = [module for module in transaction.model.modules() if module is not layer]
        held = {id(parameter) for module in others for parameter in module._parameters.values()}
        shared = {key: old for key, old in layer._parameters.items() if old is not None and id(old) in held}
        if "weight" not in shared:
            raise MorphError(f"layer {self.layer!r} shares its weight with no other, so there is nothing to untie.")
        transaction.settle(layer)
        for key, old in shared.items():
            with torch.no_grad():
                copied = transaction.with_weights
                value = transaction.compute(old, old.shape, partial(_clone, old)) if copied else torch.empty_like(old)
            layer._parameters[key] = new = transaction.keep(nn.Parameter(value, old.requires_grad))
            transaction.lineage.joined(new, old)
        for config in configs(transaction.model):
            if vars(config).get("tie_word_embeddings"):
                config.tie_word_embeddings = False


def _clone(tensor: Tensor) -> Tensor:
    return values_of(tensor).clone()


register_operator(Untie, name="untie")
