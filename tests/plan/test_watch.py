"""Code around a layer that reads it: refused by name. Without example inputs, each new part is compared with its layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastmorph as fm
from fastmorph.graph.skeleton import Skeleton
from fastmorph.morphs import grow_kernel
from fastmorph.plan import transaction


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.next = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def features(self, x):
        return self.next(torch.relu(self.conv(x)))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Norm(Network):
    def forward(self, x):
        return super().forward(x) / self.conv.weight.norm()


class Penalty(Network):
    def forward(self, x):
        return super().forward(x), sum((layer.weight**2).sum() for layer in (self.conv, self.head))


class Spread(Network):
    def features(self, x):
        return super().features(x / self.conv.weight.detach().std())


class Functional(Network):
    def features(self, x):
        return self.next(F.conv2d(x, self.conv.weight, self.conv.bias, padding=self.conv.padding))


class InTraining(Network):
    """A term of the loss, which eval mode does not have."""

    def forward(self, x):
        out = super().forward(x)
        return (out, self.conv.weight.square().sum()) if self.training else out


class Standardised(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) / (1 + self.layer.weight.abs().max())


READERS = {
    "norm": (Norm, "conv", "the model itself (Norm) reads its weight"),
    "penalty": (Penalty, "conv", "the model itself (Penalty) reads its weight"),
    "spread": (Spread, "conv", "the model itself (Spread) reads its weight"),
    "functional": (Functional, "conv", "the model itself (Functional) reads its weight"),
    "in training": (InTraining, "conv", "the model itself (InTraining) reads its weight"),
    "inside": (
        lambda: nn.Sequential(Standardised(nn.Conv2d(3, 6, 3))),
        "0.layer",
        "module '0' (Standardised) reads its weight",
    ),
}
LOCAL = {
    "deepen": lambda layer: fm.Deepen(layer, activation="relu"),
    "grow_kernel": lambda layer: fm.GrowKernel(layer, 5),
    "sequential": lambda layer: fm.InsertSubnet(layer, fm.Sequential([(28, 3, "relu"), (None, 1)])),
    "residual": lambda layer: fm.InsertSubnet(layer, fm.Residual(4)),
}


@pytest.mark.parametrize("inputs", [None, torch.randn(2, 3, 9, 9)])
@pytest.mark.parametrize("operator", LOCAL)
@pytest.mark.parametrize("reader", READERS)
def test_a_weight_that_is_read_besides_is_refused_by_name(reader, operator, inputs):
    make, layer, words = READERS[reader]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(fm.MorphError) as caught:
        fm.morph(model, LOCAL[operator](layer), example_inputs=inputs, verify=False)
    assert f"layer {layer!r} cannot be morphed: {words}" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_layers_of_such_a_network_can_be_morphed():
    for operator in LOCAL.values():
        assert fm.morph(Norm(), operator("next"), example_inputs=torch.randn(2, 3, 9, 9)).certificate


class Cropped(Network):
    """It cuts off what its layer's padding added, as causal convolutions do."""

    def features(self, x):
        x = self.conv(x)
        return self.next(torch.relu(x[..., : -self.conv.padding[0]]))


class CroppedAtTheEnd(Network):
    def forward(self, x):
        return self.head(self.next(torch.relu(self.conv(x)))[..., : -self.next.padding[1]].mean((2, 3)))


class Kind(Network):
    def features(self, x):
        x = self.conv(x)
        return self.next(torch.relu(x) if isinstance(self.conv, nn.Conv2d) else x)


class Attribute(Network):
    def features(self, x):
        return super().features(x) + len(self.conv.output_padding)


@pytest.mark.parametrize("inputs", [None, torch.randn(2, 3, 9, 9)])
@pytest.mark.parametrize(
    ("kind", "operator", "words"),
    [
        (Cropped, fm.GrowKernel("conv", 5), "'conv' cannot be morphed: in the child the model itself runs slice"),
        (CroppedAtTheEnd, fm.GrowKernel("next", 5), "'next' cannot be morphed: in the child the model itself runs slice"),
        (Kind, fm.Deepen("conv"), "in the child module 'next' runs convolution"),
        (Attribute, fm.Deepen("conv"), "does not run on the child"),
    ],
)
def test_sizes_and_kinds_that_code_reads(kind, operator, words, inputs):
    with pytest.raises(fm.MorphError) as caught:
        fm.morph(kind(), operator, example_inputs=inputs, verify=False)
    assert words in str(caught.value)
    assert "reads sizes or attributes of its layers" in str(caught.value)


@pytest.mark.parametrize("kind", [Cropped, CroppedAtTheEnd])
def test_sizes_that_the_child_still_shows(kind):
    """A layer that becomes several shows the sizes that it had."""
    model, x = kind(), torch.randn(2, 3, 9, 9)
    assert fm.morph(model, fm.Deepen("conv"), example_inputs=x).certificate
    assert fm.morph(model, fm.InsertSubnet("next", fm.Residual(4)), example_inputs=x).certificate


# --- without example inputs --------------------------------------------------------------------------------------------------


class Unguessable(nn.Module):
    """Two inputs, and sizes that no guess has."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, stride=2, padding=(1, 0), padding_mode="reflect"), nn.Linear(5, 7)

    def forward(self, image, vector):
        return self.conv(image).sum() + self.linear(vector).sum()


@pytest.mark.parametrize("kind", [Network, Unguessable])
@pytest.mark.parametrize("consume", [False, True])
def test_each_new_part_is_compared_with_its_layer(kind, consume):
    model = kind()
    layers = ["conv", "head"] if kind is Network else ["conv", "linear"]
    plan = [fm.Deepen(layers[0], activation="relu", norm="batch"), fm.Deepen(layers[1])]
    grown = fm.morph(model, [*plan, fm.GrowKernel(f"{layers[0]}.first", 5)], consume=consume)
    assert grown.certificate
    compared = [row.output for row in grown.certificate.rows]
    assert compared[:2] == [f"layer {name!r}" for name in layers]
    assert grown.certificate.on == "each new part and the layer that it replaces, on a random input of its own"
    assert grown.certificate.on in str(grown.certificate)
    assert "each new part" in grown.certificate.to_json()
    assert fm.morph(kind(), plan, verify=False).certificate is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 5, stride=3, dilation=2, padding=4, padding_mode="circular"),
        nn.Conv2d(4, 6, (3, 2), padding="same", groups=2),
        nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"),
        nn.Linear(5, 3),
    ],
)
def test_parts_of_every_kind_are_compared(layer, dtype):
    for operator in LOCAL.values():
        if isinstance(layer, nn.Linear) and operator is LOCAL["grow_kernel"]:
            continue
        morph = operator("") if operator is not LOCAL["sequential"] else fm.InsertSubnet("", fm.Residual(2))
        if isinstance(morph, fm.GrowKernel) and max(layer.kernel_size) > morph.kernel_size:
            with pytest.raises(fm.MorphError, match="smaller than its kernel"):
                fm.morph(layer.to(dtype), morph)
            continue
        assert fm.morph(layer.to(dtype), morph).certificate


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("kind", [Network, Unguessable])
def test_a_part_that_computes_something_else_is_refused(kind, consume, monkeypatch):
    def wrong(self, module, value, name="weight"):
        right(self, module, value * 1.001, name)

    right = transaction.Transaction.fill
    monkeypatch.setattr(transaction.Transaction, "fill", wrong)
    with pytest.raises(fm.MorphError, match=r"(?s)does not compute what.*differs by itself is layer 'conv'"):
        fm.morph(kind(), [fm.Deepen("conv")], consume=consume)
    fm.morph(kind(), [fm.Deepen("conv")], verify=False)


def test_padding_that_is_put_elsewhere_is_refused(monkeypatch):
    """The border is part of the map."""
    monkeypatch.setattr(grow_kernel, "_padding", lambda layer, size, before, after: ({}, (2, 2), "reflect"))
    with pytest.raises(fm.MorphError, match="does not compute what"):
        fm.morph(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), [fm.GrowKernel("0", 5)])


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 6), nn.Linear(6, 8)

    def forward(self, x):
        return torch.relu(self.linear(self.embedding(x)))


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize(("kind", "layer", "shape"), [(Network, "conv", "(2, 3, 64, 64)"), (Tokens, "embedding", "(2, 16)")])
def test_morphs_of_the_whole_network_are_verified_on_guessed_inputs(kind, layer, shape, consume):
    torch.manual_seed(0)
    grown = fm.morph(kind(), [fm.Widen(layer, 9)], consume=consume)
    assert grown.certificate
    assert grown.certificate.on == f"random inputs of shape {shape}"
    assert {row.precision for row in grown.certificate.rows} == ({"float32"} if consume else {"float32", "float64"})
    assert fm.morph(kind(), [fm.Widen(layer, 9)], verify=False).certificate is None


def test_a_wrong_child_is_refused_without_example_inputs(monkeypatch):
    right = transaction.Transaction.replace

    def wrong(self, old, new, **maps):
        right(self, old, new * 1.01, **maps)

    monkeypatch.setattr(transaction.Transaction, "replace", wrong)
    with pytest.raises(fm.MorphError, match=r"(?s)does not compute what its parent computes.*random inputs of shape"):
        fm.widen(Network(), {"conv": 9})


def test_recorded_inputs_are_verified_on():
    x = {"image": torch.randn(2, 3, 8, 8), "vector": torch.randn(2, 5)}
    model = Unguessable()
    grown = fm.morph(model, [fm.Deepen("linear"), fm.Widen("linear.first", 24)], example_inputs=x)
    assert grown.certificate.on == ""
    again = fm.morph(model, grown.history)
    assert again.certificate
    assert again.certificate.on == "random inputs of shape image (2, 3, 8, 8), vector (2, 5)"


# --- what the inputs do not reach --------------------------------------------------------------------------------------------


class Auxiliary(Network):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(4, 5)

    def forward(self, x, also=False):
        x = super().forward(x)
        return self.extra(x) if also else x


def test_layers_that_the_inputs_do_not_reach_are_compared_by_themselves(monkeypatch):
    x = torch.randn(2, 3, 9, 9)
    grown = fm.morph(Auxiliary(), [fm.Deepen("extra"), fm.Deepen("head")], example_inputs=x)
    assert grown.untouched == ("extra.weight", "extra.bias")
    assert [row.output for row in grown.certificate.rows if "layer" in row.output] == ["layer 'extra'"]
    assert grown.certificate.on.startswith("the inputs given, and where they do not reach a layer, each new part")
    assert fm.morph(Auxiliary(), [fm.Deepen("extra")], example_inputs=(x, True)).untouched == ()
    assert fm.morph(Auxiliary(), [fm.Widen("conv", 8)], example_inputs=x).untouched == ("extra.weight", "extra.bias")

    right = transaction.Transaction.fill
    monkeypatch.setattr(
        transaction.Transaction, "fill", lambda self, module, value, name="weight": right(self, module, value * 1.01, name)
    )
    with pytest.raises(fm.MorphError, match="differs by itself is layer 'extra'"):
        fm.morph(Auxiliary(), [fm.Deepen("extra")], example_inputs=x)


def test_without_inputs_a_layer_is_deepened_by_one_run_in_each_mode_and_one_of_the_child(monkeypatch):
    runs, run = [], Skeleton.run

    def counted(*args, train, **kwargs):
        runs.append(train)
        return run(*args, train=train, **kwargs)

    monkeypatch.setattr(Skeleton, "run", counted)
    fm.deepen(Network(), "conv", activation="relu")
    assert runs == [False, True, False]
