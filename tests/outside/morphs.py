"""Two morphs of linear layers: `Reorder` replaces tensors, `Factor` replaces a module and queues an equation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastmorph as fm


@dataclass(frozen=True)
class Reorder:
    """Shuffle the outputs of one linear layer, and the inputs of the one that reads them, which undoes it."""

    maker: str
    reader: str

    @property
    def target(self) -> str:
        return self.maker

    def apply(self, transaction: fm.Transaction) -> None:
        maker, reader = (transaction.find_layer(name).module for name in (self.maker, self.reader))
        generator = torch.Generator().manual_seed(transaction.noise("reorder", self.maker).seed)
        order = torch.randperm(maker.out_features, generator=generator)

        def rows(tensor: Tensor) -> Tensor:
            return tensor[order.to(tensor.device)]

        def columns(tensor: Tensor) -> Tensor:
            return tensor[:, order.to(tensor.device)]

        for tensor, shuffle in ((maker.weight, rows), (maker.bias, rows), (reader.weight, columns)):
            transaction.replace(tensor, shuffle(tensor.detach()), linear=shuffle, square=shuffle)


@dataclass(frozen=True)
class Between:
    """What stands between two layers: so many channels, and as many scales of 1 where asked for."""

    channels: int
    scaled: bool = False


@dataclass(frozen=True)
class Factor:
    """Make a linear layer two, with `between` in the middle."""

    where: str
    between: Between
    gain: float = 1.0

    @property
    def target(self) -> str:
        return self.where

    def apply(self, transaction: fm.Transaction) -> None:
        layer = transaction.find_layer(self.where)
        old, channels = layer.module, self.between.channels
        made = {"device": "meta" if transaction.with_weights else old.weight.device, "dtype": old.weight.dtype}
        one = nn.Linear(old.in_features, channels, bias=False, **made)
        two = nn.Linear(channels, old.out_features, bias=False, **made)
        two.bias = old.bias
        problem = fm.Problem(old.weight.detach(), channels, spatial_dims=0)

        def assign(found: fm.Decomposition) -> None:
            transaction.fill(one, found.first * self.gain)
            transaction.fill(two, found.second / self.gain)

        transaction.solve(problem, assign, layer=self.where, modules=[one, two])
        transaction.replace_module(old, nn.Sequential(one, two), near=old.weight)


fm.register_operator(Reorder, name="outside.reorder")
fm.register_operator(Factor, name="outside.factor")
fm.register_part(Between, name="outside.between")
