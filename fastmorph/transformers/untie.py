"""A layer that shares its weight with others gets one of its own, so that the two can grow and train apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastmorph.elsewhere import values_of
from fastmorph.errors import MorphError
from fastmorph.graph.find import submodule_of
from fastmorph.plan.operators import register_operator
from fastmorph.plan.transaction import Transaction
from fastmorph.transformers.sizes import configs


@dataclass(frozen=True)
class Untie:
    """Give a layer a copy of the weight that it shares; configs then say that nothing is tied."""

    layer: str

    @property
    def target(self) -> str:
        """The layer."""
        return self.layer

    def apply(self, transaction: Transaction) -> None:
        """Put the copy in the layer of `transaction.model`. In an optimizer its moments start afresh."""
        layer = submodule_of(transaction.model, self.layer)
        old = layer._parameters.get("weight")
        held = [module for module in transaction.model.modules() if any(p is old for p in module._parameters.values())]
        if old is None or len(held) < 2:
            raise MorphError(f"layer {self.layer!r} shares its weight with no other, so there is nothing to untie.")
        transaction.settle(layer)
        with torch.no_grad():
            copied = transaction.with_weights
            value = transaction.compute(old, old.shape, lambda: values_of(old).clone()) if copied else torch.empty_like(old)
        layer._parameters["weight"] = new = transaction.keep(nn.Parameter(value, old.requires_grad))
        transaction.lineage.joined(new, old)
        for config in configs(transaction.model):
            if vars(config).get("tie_word_embeddings"):
                config.tie_word_embeddings = False


register_operator(Untie, name="untie")
