"""Outputs are followed as far as Python objects go: what they hold keeps its channels."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from widening import Net, randn, trained

import fastmorph as fm
from fastmorph.graph import follow


@dataclass
class Record:
    logits: Any


class Plain:
    def __init__(self, logits: Any) -> None:
        self.logits = logits


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Any) -> None:
        self.logits = logits


Named = namedtuple("Named", "logits")

FORMS = {
    **{"dataclass": Record, "object": Plain, "slots": Slots, "namedtuple": Named},
    **{"UserDict": lambda h: UserDict(logits=h), "iterator": lambda h: iter([h]), "generator": lambda h: (t for t in (h,))},
    **{"lazy": lambda h: map(torch.tanh, [h]), "deep": lambda h: {"a": (1, [Plain(Record(Slots([h])))])}},
    **{"beside": lambda h: (h.mean(), Plain(h)), "set": lambda h: {h}},
}


def network(form):
    return trained(Net(lambda m, x: form(m.two(torch.relu(m.one(x)))), one=nn.Linear(3, 4), two=nn.Linear(4, 5)))


@pytest.mark.parametrize("name", FORMS)
def test_the_layer_that_makes_an_output_keeps_its_channels(name):
    model = network(FORMS[name])
    with pytest.raises(fm.MorphError, match="layer 'two' cannot get more channels: they are the model's output"):
        fm.widen(model, {"two": 6}, example_inputs=randn(5, 3))
    child = fm.widen(model, {"one": 6}, example_inputs=randn(5, 3), verify=False)
    assert child.two.in_features == 6


def test_a_number_of_channels_that_is_returned_stays():
    model = trained(Net(lambda m, x: (m.two(m.one(x)), m.one(x).shape[1]), one=nn.Linear(3, 4), two=nn.Linear(4, 5)))
    with pytest.raises(
        fm.MorphError,
        match=r"layer 'one' cannot get more channels: (its outputs would have|the model itself would run constant)",
    ):
        fm.widen(model, {"one": 6}, example_inputs=randn(5, 3))


def test_places_of_maxima_that_are_returned():
    model = trained(Net(lambda m, x: (m.two(m.one(x)), m.one(x).argmax(1)), one=nn.Linear(3, 4), two=nn.Linear(4, 5)))
    with pytest.raises(fm.MorphError, match="layer 'one' cannot get more channels"):
        fm.widen(model, {"one": 8}, example_inputs=randn(5, 3))


def test_what_cannot_be_walked_is_refused_by_name():
    def forward(m, x: Tensor) -> Any:
        h = m.one(x)
        return {"logits": m.two(h), "hook": lambda: h}

    model = trained(Net(forward, one=nn.Linear(3, 4), two=nn.Linear(4, 5)))
    with pytest.raises(fm.MorphError, match=r"its output\['hook'\] is a function, .*; return tensors"):
        follow(model, randn(5, 3))
