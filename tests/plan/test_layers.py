"""Layers that compute their weight: read by a rule, replaced by a plain layer, and morphed as one, borders included."""

from __future__ import annotations

import copy
import importlib
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm_parts import timm_part
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastmorph as fm
from bench.zoo.models import build, missing

PLANS = {
    "deepen": [fm.Deepen("0", activation="relu", norm="batch")],
    "narrow": [fm.Deepen("0", hidden_channels=28, kernel_sizes=(2, 3))],
    "grow": [fm.GrowKernel("0", (4, 5))],
    "sequential": [fm.InsertSubnet("0", fm.Sequential([(30, 3, "relu"), (30, 2, None), (None, 2)]))],
    "stacked": [fm.InsertSubnet("0", fm.Stacked([fm.Sequential([(None, 3)]), fm.Sequential([(40, 3, "relu"), (None, 1)])]))],
    "residual": [fm.InsertSubnet("0", fm.Residual(4))],
}


class Masked(nn.Conv2d):
    """A convolution with some of its weights held at zero."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mask", (torch.arange(self.weight.numel()).reshape(self.weight.shape) % 3 > 0).double())

    def forward(self, input):
        return self._conv_forward(input, self.weight * self.mask, self.bias)


class Half(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return torch.tanh(weight) / 2


class OnlyCallsSuper(nn.Conv2d):
    """Needs no rule."""

    def forward(self, x):
        """Do what a convolution does."""
        return super().forward(x)


fm.register_layer(Masked, spatial_dims=2, weight=lambda layer: layer.weight * layer.mask)


def old(kind, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(nn.utils, kind)(layer)


def parametrised(layer, **parametrisations):
    for name, parametrisation in parametrisations.items():
        parametrize.register_parametrization(layer, name, parametrisation)
    return layer


CONV = (6, 4, 3)
MAKERS = {
    "StdConv2d": lambda: timm_part("layers.std_conv", "StdConv2d")(*CONV, stride=2, bias=True),
    "StdConv2dSame": lambda: timm_part("layers.std_conv", "StdConv2dSame")(*CONV, stride=2, dilation=2),
    "StdConv2dSame static": lambda: timm_part("layers.std_conv", "StdConv2dSame")(*CONV),
    "ScaledStdConv2d": lambda: timm_part("layers.std_conv", "ScaledStdConv2d")(*CONV, groups=2, gain_init=0.7),
    "ScaledStdConv2dSame": lambda: timm_part("layers.std_conv", "ScaledStdConv2dSame")(*CONV, stride=(3, 2), gamma=1.7),
    "Conv2dSame": lambda: timm_part("layers.conv2d_same", "Conv2dSame")(*CONV, stride=(2, 3)),
    "Conv2dSame even": lambda: timm_part("layers.conv2d_same", "Conv2dSame")(6, 4, (2, 3)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(*CONV, padding=1)),
    "old weight_norm": lambda: old("weight_norm", nn.Conv2d(*CONV, padding=1)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(*CONV, padding=(0, 1))),
    "old spectral_norm": lambda: old("spectral_norm", nn.Conv2d(*CONV, padding=(0, 1))),
    "parametrisations": lambda: parametrised(nn.Conv2d(*CONV, padding="same"), weight=Half(), bias=Half()),
    "masked": lambda: Masked(*CONV, padding=1, padding_mode="reflect"),
    "parametrised and masked": lambda: parametrised(Masked(*CONV, padding=1), weight=Half()),
    "only calls super": lambda: OnlyCallsSuper(*CONV, padding=1),
}


def network(name):
    torch.manual_seed(0)
    model = nn.Sequential(MAKERS[name](), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model(torch.randn(2, 6, 9, 9, dtype=torch.float64))
    return model


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MAKERS)
def test_the_effective_weight_is_morphed_and_the_whole_map_kept(name, plan):
    model = network(name).train()  # where spectral norms move, and must not here
    model(torch.randn(2, 6, 9, 9, dtype=torch.float64))  # leaves an old hook's weight computed with gradients
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    grown = fm.morph(model, PLANS[plan], generator=torch.Generator().manual_seed(1))
    assert all(module.training for each in (model, grown.model) for module in each.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the parent is as it was"
    model.eval(), grown.model.eval()
    for size in ((9, 9), (8, 11), (12, 7)):
        x = torch.randn(2, 6, *size, dtype=torch.float64)
        expected = model[0](x)
        calls.clear()
        got = grown.model[0](x)
        assert calls == [expected.shape], "hooks go on"
        assert (got - expected).abs().max() <= 1e-9 * expected.abs().max()
    again = fm.morph(model, grown.history).model
    assert all(
        torch.equal(one, two) for one, two in zip(again.state_dict().values(), grown.model.state_dict().values(), strict=True)
    )
    empty = fm.restructure(model, grown.history)
    empty.load_state_dict(grown.model.state_dict())
    assert torch.equal(empty.eval()(x), grown.model(x))


@pytest.mark.parametrize("name", ["masked", "Conv2dSame", "old weight_norm"])
def test_a_parent_may_be_consumed(name):
    parent, model = network(name), network(name)
    origin = next(p for n, p in model[0].named_parameters() if n != "bias" and p.ndim == 4)
    child = fm.morph(model, PLANS["deepen"], consume=True).model
    assert child is model
    assert not origin.numel(), "what the weight was computed from is freed"
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(child.eval()(x), parent.eval()(x), rtol=0, atol=1e-9)


def test_restructure_on_the_meta_device():
    for name in ("ScaledStdConv2dSame", "spectral_norm", "masked"):
        model = network(name)
        child = fm.morph(model, PLANS["deepen"]).model
        with torch.device("meta"):
            empty = fm.restructure(copy.deepcopy(model).to("meta"), PLANS["deepen"])
        assert {key: value.shape for key, value in empty.state_dict().items()} == {
            key: value.shape for key, value in child.state_dict().items()
        }


def test_same_padding_is_tensorflows():
    """An output pixel i of a dimension sees input pixels i * stride - front onwards, front by the definition, in float64."""
    for n, k, s, d in [(7, 3, 2, 1), (8, 3, 2, 1), (9, 4, 3, 2), (5, 2, 1, 1), (5, 1, 3, 1)]:
        total = max((int(np.ceil(n / s)) - 1) * s + (k - 1) * d + 1 - n, 0)
        x = np.random.default_rng(n).standard_normal(n)
        padded = np.pad(x, (total // 2, total - total // 2))
        got = fm.nn.SamePad((k,), (s,), (d,))(torch.from_numpy(x)[None, None])
        assert np.array_equal(got[0, 0].numpy(), padded)
        assert F.conv1d(got, torch.ones(1, 1, k).double(), stride=s, dilation=d).shape[-1] == -(-n // s)


def test_a_standardisation_is_baked_in_numpy():
    model = network("ScaledStdConv2d")
    layer, child = model[0], fm.grow_kernel(model, {"0": 5})
    weight = layer.weight.detach().numpy().reshape(4, -1)
    centred = weight - weight.mean(1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + layer.eps)
    expected = (expected * layer.gain.detach().numpy().reshape(4, 1) * layer.scale).reshape(layer.weight.shape)
    assert type(child[0]) is nn.Conv2d
    np.testing.assert_allclose(child[0].weight.detach()[:, :, 1:-1, 1:-1].numpy(), expected, rtol=0, atol=1e-12)


def test_linear_layers_of_other_shapes():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x @ self.weight + self.bias

    fm.register_layer(Transposed, spatial_dims=0, weight=lambda layer: layer.weight.T)
    model = nn.Sequential(Transposed()).double()
    child = fm.deepen(model, "0", hidden_channels=7, activation="gelu")
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(child(x), model(x), rtol=0, atol=1e-9)
    assert child[0].second.bias.equal(model[0].bias)


def test_gpt2s_linear_layers():
    if missing("transformers"):
        pytest.skip("transformers is not installed (requirements-zoo.txt)")
    conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(6, 4)).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(fm.deepen(model, "0")(x), model(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("padding", [0, 1])
def test_transposed_convolutions_grow(padding):
    conv = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=padding, groups=2)
    model = nn.Sequential(parametrizations.weight_norm(conv)).double()
    child = fm.grow_kernel(model, {"0": (5, 3)})
    assert type(child[0]) is nn.ConvTranspose2d
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(child(x), model(x), rtol=0, atol=1e-12)


def test_a_child_with_same_padding_grows_again(tmp_path):
    model = network("Conv2dSame")
    plan = [fm.Deepen("0", activation="relu"), fm.Deepen("0.layer.second"), fm.Widen("0.layer.first", 24)]
    for size in (9, 10):
        x = torch.randn(2, 6, size, size + 2, dtype=torch.float64)
        grown = fm.morph(model, plan, example_inputs=x)
        assert grown.certificate
        torch.testing.assert_close(grown.model(x[:, :, 1:]), model(x[:, :, 1:]), rtol=0, atol=1e-9)
    grown.history.save(tmp_path / "plan.toml")
    replayed = fm.morph(model, fm.Plan.load(tmp_path / "plan.toml")).model
    assert all(torch.equal(*pair) for pair in zip(replayed.parameters(), grown.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["nf_regnet_b0", "tf_efficientnet_lite0"])
def test_networks_of_timm(name):
    if missing("timm"):
        pytest.skip("timm is not installed (requirements-zoo.txt)")
    model, (x,) = build(f"timm/{name}")
    kinds = {"ScaledStdConv2d", "Conv2dSame"}
    layers = [
        layer for layer, module in model.named_modules() if type(module).__name__ in kinds and module.kernel_size > (1, 1)
    ]
    assert layers
    for plan in ([fm.Deepen(layers[0], activation="relu")], [fm.GrowKernel(layers[-1], 5)]):
        certificate = fm.morph(model, plan, example_inputs=x).certificate
        assert certificate
        assert certificate.max_rel <= 1e-9


# --- the optimizer -----------------------------------------------------------------------------------------------------------


def trained(model):
    optimizer = torch.optim.Adam([{"params": [p]} for p in model.parameters()], lr=0.01)
    model(torch.randn(2, 6, 9, 9, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", MAKERS)
def test_the_optimizer_goes_on(name):
    model = network(name)
    optimizer = trained(model)
    grown = fm.morph(model, PLANS["grow"], optimizer=optimizer)
    held = [p for group in grown.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in grown.model.parameters()}, "what a weight was computed from is gone"
    (weight,) = (p for p in grown.model[0].parameters() if p.ndim == 4)
    kept = name.startswith(("Conv2dSame", "only"))
    assert (weight in grown.optimizer.state) is kept, "a weight that is the layer's own goes on with its moments"
    (index,) = (i for i, group in enumerate(grown.optimizer.param_groups) if any(p is weight for p in group["params"]))
    (origin,) = optimizer.param_groups[index]["params"]
    assert origin.ndim == 4
    assert origin.shape[0] == 4


# --- refusals ----------------------------------------------------------------------------------------------------------------


class OtherSuper(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class SkipsAParent(Masked):
    def forward(self, x):
        return super(Masked, self).forward(x)


class CallsConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias)


class TwoInputs(nn.Conv2d):
    def forward(self, x, scale=1):
        return super().forward(x)


class WeightProperty(nn.Linear):
    @property
    def weight(self):
        return self._parameters["weight"] * 2


def of_class(layer, cls):
    layer.__class__ = cls
    return layer


class Borrowed(nn.Conv2d):
    forward = OnlyCallsSuper.forward


class Random(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * torch.rand(()), self.bias)


fm.register_layer(Random, spatial_dims=2, weight=lambda layer: layer.weight * torch.rand(()))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (OtherSuper(3, 4, 3), "OtherSuper has a forward of its own; say by fm.register_layer"),
        (SkipsAParent(3, 4, 3), "SkipsAParent has a forward of its own"),
        (CallsConvForward(3, 4, 3), "CallsConvForward has a conv_forward of its own"),
        (TwoInputs(3, 4, 3), "TwoInputs has a forward of its own"),
        (Borrowed(3, 4, 3), "Borrowed has a forward of its own"),
        (of_class(nn.Linear(3, 4), WeightProperty), "WeightProperty has a weight of its own"),
        (Random(3, 4, 3), "not the same each time"),
        (nn.Identity(), "fm.register_layer knows"),
    ],
)
def test_what_is_not_certain_is_refused(layer, words):
    with pytest.raises(fm.MorphError, match=words):
        fm.deepen(nn.Sequential(layer), "0")


def test_a_tied_origin_is_refused():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    model[1].weight = model[0].parametrizations.weight.original1
    with pytest.raises(fm.MorphError, match=r"tied to '1\.weight'"):
        fm.deepen(model, "0")


def test_a_clash_raises():
    class Mine(nn.Conv2d):
        pass

    fm.register_layer(f"{Mine.__module__}.{Mine.__qualname__}", spatial_dims=2)
    for cls in (Mine, Masked, nn.Linear, "timm.layers.std_conv.StdConv2d"):
        with pytest.raises(fm.MorphError, match="has a rule already"):
            fm.register_layer(cls, spatial_dims=2)


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (int, {"spatial_dims": 2}, "a class of nn.Module"),
        (nn.Bilinear, {"spatial_dims": 4}, "0 for a linear layer"),
        (nn.Bilinear, {"spatial_dims": 0, "transposed": True}, "transposed one has at least 1"),
    ],
)
def test_rules_that_are_none(cls, options, words):
    with pytest.raises(fm.MorphError, match=words):
        fm.register_layer(cls, **options)


def test_a_rule_of_the_wrong_shape_is_told():
    class Wrong(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    fm.register_layer(Wrong, spatial_dims=1)
    with pytest.raises(fm.MorphError, match=r"the rule of Wrong gives a weight of shape \(4, 3, 3, 3\)"):
        fm.deepen(nn.Sequential(Wrong(3, 4, 3)), "0")
