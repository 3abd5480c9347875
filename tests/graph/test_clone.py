"""A clone is what a deep copy is, whatever modules keep beside their tensors."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastmorph.graph.clone import clone


class Odd(nn.Module):
    """Keeps modules in lists, methods, hooks and one tensor twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again = self.one
        self.two.weight = self.one.weight
        self.held, self.table = [self.one, self.two], {"sizes": [3, (3, 3)], "first": self.one}
        self.run = self.forward
        self.mode: list[int] = []
        self.register_buffer("kept", torch.ones(3), persistent=False)
        self.one.register_forward_hook(lambda module, given, out: out + 1)
        self.eval()

    def forward(self, x):
        return self.held[1](torch.relu(self.table["first"](x))) + self.kept


class Copied(nn.Linear):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo):
        return Copied(self.in_features, self.out_features + 1)


def tensors(model):
    return {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}


def test_it_is_a_deep_copy():
    model = Odd()
    new = clone(model, tensors(model))
    assert type(new) is Odd
    assert [name for name, _ in new.named_modules()] == [name for name, _ in model.named_modules()]
    assert new.again is new.one is new.held[0] is new.table["first"] is not model.one
    assert new.two is new.held[1]
    assert new.run.__self__ is new
    assert new.two.weight is new.one.weight is model.one.weight, "tensors are those of the memo"
    new.table["sizes"].append(4)
    new.mode.append(1)
    assert (model.table["sizes"], model.mode) == ([3, (3, 3)], [])
    assert new.state_dict().keys() == model.state_dict().keys()
    new.one.register_forward_pre_hook(lambda *_: None)
    new.two.register_forward_hook(lambda *_: None)
    assert (len(model.one._forward_pre_hooks), len(model.two._forward_hooks)) == (0, 0)
    x = torch.randn(2, 3)
    assert torch.equal(new.run(x), copy.deepcopy(model)(x))
    new.two.bias = nn.Parameter(torch.zeros(3))
    assert model.two.bias is not new.two.bias
    assert not new.training


def test_classes_that_copy_themselves_are_asked():
    model = nn.Sequential(Copied(2, 3), nn.LSTM(3, 3))
    assert clone(model, tensors(model))[0].out_features == 4
