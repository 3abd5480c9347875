"""What cannot be exact is refused in a sentence with the module, the cause and the remedy; nothing inexact gets through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widening import FILLS, Net, randn, trained, widened

import fastmorph as fm
from fastmorph.graph import coupled


def two_layers(between, **more):
    """A 1x1 convolution to 8 channels, something, and a convolution that reads 8."""
    modules = {"one": nn.Conv2d(3, 8, 1), "two": nn.Conv2d(8, 2, 1), **more}
    return trained(Net(lambda m, x: m.two(between(m, m.one(x))), **modules))


def parameter(*shape):
    return nn.Parameter(torch.ones(shape))


FORBIDDEN = {
    "softmax": (lambda m, x: x.softmax(1), "the model itself takes softmax over them"),
    "sum": (lambda m, x: x * x.sum(1, keepdim=True), "takes sum over them"),
    "length": (lambda m, x: F.normalize(x), "takes linalg_vector_norm over them"),
    "local response": (lambda m, x: F.local_response_norm(x, 3), "slides a window along them"),
    "order": (lambda m, x: x.sort(1).values, "takes sort over them"),
    "running sum": (lambda m, x: x.cumsum(1), "takes cumsum over them"),
    "attention over channels": (
        lambda m, x: ((x.flatten(2) @ x.flatten(2).mT).softmax(1) @ x.flatten(2)).unflatten(2, (5, 5)),
        "takes softmax over them",
    ),
    "Gram matrix": (
        lambda m, x: torch.einsum("bchw,bdhw->bcd", x, x).sum((1, 2))[:, None, None, None] * x,
        "takes sum over them",
    ),
    "ramp": (lambda m, x: x * torch.arange(8.0, dtype=x.dtype).view(8, 1, 1), "differ from channel to channel"),
    "table": (
        lambda m, x: x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype).view(-1, 1, 1),
        "differ from channel to channel",
    ),
    "number of channels": (lambda m, x: x * x.shape[1] ** -0.5, "would run"),
    "shift by a size": (lambda m, x: x.roll(x.shape[1] // 4, 2), "would run"),
    "part by a size": (lambda m, x: x * x[:, :, : x.shape[1] // 4].mean((2, 3), keepdim=True), "would run"),
    "frame by a size": (lambda m, x: x * F.pad(x, (x.shape[1] // 4,) * 4).mean((2, 3), keepdim=True), "would run"),
    "fixed slice": (lambda m, x: torch.cat([x[:, :3], x[:, 3:8]], 1), "the model itself|'two' fails"),
    "fixed reshape": (lambda m, x: x.reshape(-1, 8, 5, 5), "cannot get more channels: 'two' fails with RuntimeError"),
    "always dropout": (lambda m, x: F.dropout(x, 0.5, True), "draws random numbers for them|differ from channel to channel"),
    "noise": (lambda m, x: x + torch.randn_like(x), "differ from channel to channel"),
    "ones summed": (lambda m, x: x * torch.ones(x.shape[1], dtype=x.dtype).sum(), "would run"),
    "ramp's mean": (lambda m, x: x * torch.arange(x.shape[1], dtype=x.dtype).mean(), "would run"),
    "size as a tensor": (lambda m, x: x / x.new_tensor(x.shape[1]), "would run"),
    "size of zeros": (lambda m, x: x + x.new_zeros(1, x.shape[1]).exp() @ x.new_ones(x.shape[1]), "would run"),
    "picked channels": (lambda m, x: x[:, [0, 1, 2, 3, 4, 5, 6, 7]], "looks them up|would"),
    "input": (lambda m, x: x + m.image, "differ from channel to channel"),
    "kernel over channels": (lambda m, x: m.along(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None] * x, "slides a kernel"),
    "weight by a function": (
        lambda m, x: F.conv2d(x, m.raw.abs()) * 0 + F.conv2d(x, m.raw.exp()),
        "with a tensor that it computes",
    ),
    "squared weight": (
        lambda m, x: F.conv2d(x, m.raw * m.raw),
        "'raw' sums over them by a function of its entries that is not",
    ),
    "maximum's place": (lambda m, x: x * (x.max(1).indices[:, None] + 1), "takes positions along them|takes max"),
}
MORE = {
    "squared weight": {"raw": parameter(8, 8, 1, 1)},
    "kernel over channels": {"along": nn.Conv1d(1, 1, 3, padding=1)},
    "weight by a function": {"raw": parameter(8, 8, 1, 1)},
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_mixes_channels(case):
    between, cause = FORBIDDEN[case]
    model, x = two_layers(between, **MORE.get(case, {})), randn(2, 3, 5, 5)
    model.image = randn(2, 8, 5, 5)
    for fill in FILLS:
        if fill == "zero" and case in ("sum", "length"):  # of channels and zeros: the same, so that zeros alone serve
            widened(model, {"one": 12}, x, fill=fill)
            continue
        with pytest.raises(fm.MorphError, match=cause) as refusal:
            fm.widen(model, {"one": 12}, example_inputs=x, fill=fill)
        assert "layer 'one' cannot " in str(refusal.value)


def test_the_models_output():
    model = two_layers(lambda m, x: x.relu())
    with pytest.raises(
        fm.MorphError, match="layer 'two' cannot get more channels: they are the model's output; widen another layer"
    ):
        fm.widen(model, {"two": 4}, example_inputs=randn(2, 3, 5, 5))
    model = trained(Net(lambda m, x: (m.two(m.one(x)), {"features": m.one(x)}), one=nn.Linear(3, 4), two=nn.Linear(4, 2)))
    with pytest.raises(fm.MorphError, match="they are the model's output"):
        fm.widen(model, {"one": 6}, example_inputs=randn(2, 3))


def test_a_branch_on_values():
    model = trained(Net(lambda m, x: m.one(x) if x.sum() > 0 else m.one(-x), one=nn.Linear(3, 3)))
    with pytest.raises(fm.MorphError, match=r"the model itself branches on the values of a tensor .*; rewrite that part"):
        fm.widen(model, {"one": 4}, example_inputs=randn(2, 3))


def test_what_is_no_layer():
    model, x = two_layers(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(8), unused=nn.Linear(3, 3)), randn(2, 3, 5, 5)
    for layer, cause in {
        "ona": "has no layer 'ona'; did you mean 'one'",
        "norm": "'norm' cannot be widened: it is a BatchNorm2d and makes no channels of its own; name the layer that makes",
        "unused": "pass example_inputs= that reach this one",
        "": "it is a Net and makes no channels of its own; name a layer in it, e.g. 'one'",
    }.items():
        with pytest.raises(fm.MorphError, match=cause):
            fm.widen(model, {layer: 9}, example_inputs=x)
    with pytest.raises(fm.MorphError, match="channels='8' is neither a number nor a factor"):
        fm.widen(model, {"one": "8"}, example_inputs=x)
    for channels in (7, 8.0, True, -1):
        with pytest.raises(fm.MorphError, match="must be an int of at least that"):
            fm.widen(model, {"one": channels}, example_inputs=x)
    with pytest.raises(fm.MorphError, match="fill='noise' must be one of 'pair', 'zero', 'duplicate'"):
        fm.widen(model, {"one": 9}, example_inputs=x, fill="noise")
    with pytest.raises(fm.MorphError, match="does not run on the example inputs: 'one' fails with RuntimeError"):
        fm.widen(model, {"one": 9}, example_inputs=randn(2, 4, 5, 5))


def test_what_cannot_be_traced():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(fm.MorphError, match="is lazy and has no shape yet; run the model once"):
        coupled(lazy, "1", torch.zeros(1, 3))
    compiled = type("OptimizedModule", (nn.Sequential,), {})(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(fm.MorphError, match=r"compiled by torch\.compile: morph the original model"):
        coupled(compiled, "0", torch.zeros(1, 3))


def test_as_many_as_there_are_changes_nothing():
    model, x = two_layers(lambda m, x: x.relu()), randn(2, 3, 5, 5)
    child = fm.widen(model, {"one": 8}, example_inputs=x)
    assert all(torch.equal(value, child.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_weight_that_makes_and_reads():
    model = trained(Net(lambda m, x: F.linear(torch.relu(m.one(x)), m.one.weight.t()), one=nn.Linear(3, 4)))
    with pytest.raises(fm.MorphError, match=r"'one.weight' both makes them and sums over them"):
        fm.widen(model, {"one": 6}, example_inputs=randn(2, 3))


def test_steps_name_the_nearest_width():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    x = randn(2, 3, 6, 6)
    with pytest.raises(
        fm.MorphError,
        match=r"layer '1' cannot have 13 channels: they come in steps of .*; the nearest number that works is 1[24]",
    ):
        fm.widen(model, {"1": 13}, example_inputs=x)
    widened(model, {"1": 12}, x)


def test_empty_inputs_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    with pytest.raises(fm.MorphError, match="the example inputs are empty"):
        fm.widen(model, {"0": 8}, example_inputs=torch.randn(0, 3, 9, 9))


def test_the_model_itself_is_named_where_it_normalises():
    class Centred(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[1](x - x.mean(1, keepdim=True))

    model = Centred(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    with pytest.raises(fm.MorphError, match=r"normalised together|the model itself normalises over them"):
        fm.widen(model, {"0": 5}, example_inputs=torch.randn(1, 3, 9, 9))
    assert "the model itself normalises over them" in str(fm.coupled(model, "0", torch.randn(1, 3, 9, 9)))
