"""The arguments of one call, in every way that they can be given: each function takes them all, and records them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastmorph as fm


class Keywords(nn.Module):
    """A forward that takes keywords alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, *, image, scale=None):
        x = torch.relu(self.norm(self.conv(image)))
        return self.head(x.mean((2, 3)) if scale is None else x.mean((2, 3)) * scale)


class Batch(NamedTuple):
    image: Tensor
    scale: Tensor | None = None


class Bag(Keywords):
    """A forward that takes all in one bag; `get` takes one thing out of it."""

    def __init__(self, get):
        super().__init__()
        self.get = get

    def forward(self, bag):
        return super().forward(image=self.get(bag, "image"), scale=self.get(bag, "scale"))


class Positional(Keywords):
    def forward(self, image, scale=None):
        return super().forward(image=image, scale=scale)


X, SCALE = torch.randn(2, 3, 9, 8), torch.rand(2, 1)
KEYWORDS = {"image": X, "scale": SCALE}
CALLS = [
    (Keywords, {"image": X}, [((2, 3, 9, 8), "float32", "image")]),
    (Keywords, KEYWORDS, [((2, 3, 9, 8), "float32", "image"), ((2, 1), "float32", "scale")]),
    (Keywords, ((), KEYWORDS), [((2, 3, 9, 8), "float32", "image"), ((2, 1), "float32", "scale")]),
    (Keywords, Batch(X), [((2, 3, 9, 8), "float32", "image")]),
    (Positional, Batch(X, SCALE), [((2, 3, 9, 8), "float32", "image"), ((2, 1), "float32", "scale")]),
    (Positional, X, [((2, 3, 9, 8), "float32")]),
    (Positional, (X, SCALE), [((2, 3, 9, 8), "float32"), ((2, 1), "float32")]),
    (Positional, ((X,), {"scale": SCALE}), [((2, 3, 9, 8), "float32"), ((2, 1), "float32", "scale")]),
    (Positional, KEYWORDS, [((2, 3, 9, 8), "float32", "image"), ((2, 1), "float32", "scale")]),
]
PLAN = [
    fm.Widen("conv", 9),
    fm.Deepen("conv", activation="relu", norm="batch"),
    fm.GrowKernel("conv.first", 5),
    fm.InsertSubnet("head", fm.Sequential([(8, 1, "gelu"), (None,)])),
]


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize(("kind", "inputs", "recorded"), CALLS)
def test_a_call_is_taken_however_it_is_given(kind, inputs, recorded, consume):
    torch.manual_seed(0)
    model = kind().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grown = fm.morph(model, PLAN, example_inputs=inputs, calibrate=[inputs], consume=consume, generator=3)
    assert grown.certificate
    assert grown.history.inputs == tuple(recorded)
    norm = grown.model.conv.norm
    assert not torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))

    parent = kind().eval()
    parent.load_state_dict(before)
    again = fm.Plan.from_toml(grown.history.to_toml())
    child = fm.restructure(parent, again)
    assert {k: v.shape for k, v in child.state_dict().items()} == {k: v.shape for k, v in grown.model.state_dict().items()}
    fm.restructure(parent, PLAN, example_inputs=inputs)


@pytest.mark.parametrize(("kind", "inputs", "recorded"), CALLS)
def test_channels_are_followed_on_every_kind_of_call(kind, inputs, recorded):
    model = kind().eval()
    structure = fm.follow(model, inputs)
    child = fm.widen(model, {"conv": 8}, example_inputs=inputs, structure=structure)
    assert child.conv.out_channels == 8
    names = {row.name for row in fm.coupled(model, "conv", inputs).rows}
    assert {"conv.weight", "norm.weight"} <= names


def looked_for(bag, name):
    if name in bag:
        return bag[name]
    return None


BAGS = {
    "dict": (lambda bag, name: bag.get(name), lambda **given: given),
    "dict in a tuple": (lambda bag, name: bag.get(name), lambda **given: (given,)),
    "keys looked for": (looked_for, lambda **given: given),
    "named tuple": (getattr, Batch),
    "nested": (lambda bag, name: bag["data"][0][1].get(name), lambda **given: {"data": [(3, given)], "names": ["a"]}),
}


@pytest.mark.parametrize("given", [{"image": X}, KEYWORDS])
@pytest.mark.parametrize("bag", BAGS)
def test_bags_are_taken_by_everything(bag, given):
    get, put = BAGS[bag]
    model, inputs = Bag(get).eval(), put(**given)
    call = (inputs,) if type(inputs) is not tuple else inputs
    structure = fm.follow(model, inputs)
    assert {"conv.weight", "norm.weight"} <= {row.name for row in fm.coupled(model, "conv", inputs).rows}
    child = fm.widen(model, {"conv": 8}, example_inputs=inputs, structure=structure)
    assert fm.verify(model, child, *call)
    for consume in (False, True):
        parent = Bag(get).eval()
        before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
        grown = fm.morph(parent, PLAN, example_inputs=inputs, calibrate=[inputs], consume=consume)
        assert grown.certificate
        whole = Bag(get).eval()
        whole.load_state_dict(before)
        assert fm.verify(whole, grown.model, *call)
        fm.restructure(whole, grown.history, example_inputs=inputs).load_state_dict(grown.model.state_dict())


@pytest.mark.parametrize("bag", BAGS)
def test_what_a_bag_may_hold_besides_counts(bag):
    class Optional(Bag):
        """What scales channels one by one, where it is given."""

        def forward(self, bag):
            x, mask = self.conv(self.get(bag, "image")), self.get(bag, "scale")
            return self.head((x if mask is None else x * mask).mean((2, 3)))

    get, put = BAGS[bag]
    for given in ({"image": X}, {"image": X, "scale": torch.rand(2, 6, 9, 8)}):
        with pytest.raises(fm.MorphError, match="data that differ from channel to channel"):
            fm.widen(Optional(get).eval(), {"conv": 8}, example_inputs=put(**given))


def test_a_keyword_is_guessed():
    class Only(Keywords):
        def forward(self, *, image):
            return super().forward(image=image)

    model = Only().eval()
    grown = fm.morph(model, PLAN)
    assert grown.certificate
    assert grown.certificate.on.startswith("random inputs of shape image (2, 3, 64, 64)")
    assert fm.verify(model, grown.model, kwargs={"image": X})
