"""Widening layers whose weight is g v / ||v||: what they make and what they read, by parametrizations and by hooks of old."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import fastmorph as fm

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")

WAYS = {"parametrization": (weight_norm, "0.parametrizations.weight.original"), "hook": (old_weight_norm, "0.weight_")}
X = torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(norm, **options):
    """Weights of all sizes, and norms that are no ones."""
    torch.manual_seed(0)
    layers = [norm(nn.Conv2d(3, 4, 3), **options), nn.ReLU(), norm(nn.Conv2d(4, 6, 3), **options), nn.BatchNorm2d(6), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), norm(nn.Linear(6 * 3 * 4, 5), **options)).double().eval()
    for parameter in model.parameters():
        parameter.data *= 0.5 + torch.rand_like(parameter)
    return model


def weight(layer):
    """The weight by its formula, from whichever names its parts have."""
    (_, g), (_, v) = sorted((n, p.detach().numpy()) for n, p in layer.named_parameters() if "bias" not in n)
    return g * v / np.sqrt(np.square(v).sum(axis=tuple(range(1, v.ndim)), keepdims=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fill", ["pair", "zero", "duplicate"])
@pytest.mark.parametrize(("layer", "channels"), [(0, 8), (0, 9), (2, 10)])
def test_what_is_made_and_what_is_read_stays(way, fill, layer, channels):
    norm, _ = WAYS[way]
    parent = network(norm)
    before = parent(X)
    grown = fm.morph(parent, fm.Widen(str(layer), channels, fill), example_inputs=X, generator=1)
    child = grown.model
    assert grown.certificate
    assert type(child[0]) is type(parent[0])
    assert child[layer].out_channels == weight(child[layer]).shape[0] == channels
    assert torch.allclose(child(X), before, rtol=1e-12, atol=1e-13)
    assert torch.equal(parent(X), before)
    new = fm.restructure(network(norm), grown.history)
    new.load_state_dict(child.state_dict())
    assert torch.equal(new(X), child(X))


@pytest.mark.parametrize("way", WAYS)
def test_old_entries_of_the_weight_stay_and_new_ones_are_dense(way):
    norm, _ = WAYS[way]
    parent = network(norm)
    child = fm.widen(parent, {"0": 8, "2": 10}, example_inputs=X)
    for layer in (0, 2):
        old = weight(parent[layer])
        new = weight(child[layer])
        assert (new != 0).all()
        np.testing.assert_allclose(new[: old.shape[0], : old.shape[1]], old, rtol=1e-13, err_msg=f"layer {layer}")
    v = next(p for name, p in child[2].named_parameters() if name.endswith(("original1", "weight_v")))
    assert (v != 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_goes_on(way):
    parent = network(WAYS[way][0])
    optimizer = torch.optim.Adam(parent.parameters())
    parent(X).square().sum().backward()
    optimizer.step()
    grown = fm.morph(parent, fm.Widen("0", 8), example_inputs=X, optimizer=optimizer)
    grown.model(X).square().sum().backward()
    grown.optimizer.step()
    held = {parameter for group in grown.optimizer.param_groups for parameter in group["params"]}
    assert held == set(grown.model.parameters())
    names = {name: grown.optimizer.state[p]["step"].item() for name, p in grown.model.named_parameters()}
    assert {name for name, steps in names.items() if steps == 1} == {  # their gradients are no linear map of the old ones
        name for name in names if name.startswith("2.") and name != "2.bias"
    }


@pytest.mark.parametrize("way", WAYS)
def test_what_is_coupled_with_it_is_told(way):
    norm, name = WAYS[way]
    rows = {row.name for row in fm.coupled(network(norm), "0", X).rows}
    assert {f"{name}{end}" for end in (("g", "v") if way == "hook" else ("0", "1"))} <= rows


@pytest.mark.parametrize(
    ("norm", "options", "remedy"),
    [
        (spectral_norm, {}, r"remove_parametrizations\(layer, 'weight'\)"),
        (orthogonal, {}, r"remove_parametrizations\(layer, 'weight'\)"),
        (weight_norm, {"dim": 1}, r"remove_parametrizations\(layer, 'weight'\)"),
        (old_spectral_norm, {}, r"remove_spectral_norm\(layer\)"),
        (old_weight_norm, {"dim": None}, r"remove_weight_norm\(layer\)"),
    ],
)
@pytest.mark.parametrize("layer", ["0", "2"])
def test_other_computed_weights_are_refused_with_the_remedy(norm, options, remedy, layer):
    if norm is orthogonal:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Identity(), norm(nn.Conv2d(4, 6, 3)), nn.ReLU(), nn.Conv2d(6, 2, 1)
        ).double()
    else:
        model = network(norm, **options)
    with pytest.raises(fm.MorphError, match=rf"bake the weight of '\d' first: torch\.nn\.utils\..*{remedy}"):
        fm.widen(model, {layer: 12}, example_inputs=X)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fill", ["pair", "zero", "duplicate"])
@pytest.mark.parametrize(("layer", "channels"), [(0, 8), (0, 7), (2, 9)])
def test_a_transposed_convolution_is_normed_by_its_inputs(way, fill, layer, channels):
    torch.manual_seed(0)
    norm, _ = WAYS[way]
    layers = [nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), norm(nn.ConvTranspose2d(4, 6, 3, stride=2)), nn.ReLU()]
    parent = nn.Sequential(*layers, nn.Conv2d(6, 2, 1)).double().eval()
    child = fm.widen(parent, {str(layer): channels}, fill=fill, example_inputs=X)
    assert all(parameter.isfinite().all() for parameter in child.parameters())
    assert torch.allclose(child(X), parent(X), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("fill", ["pair", "zero", "duplicate"])
def test_whole_multiples_under_a_norm_over_channels(fill):
    torch.manual_seed(0)
    layers = [weight_norm(nn.Conv2d(3, 4, 3)), nn.GroupNorm(1, 4), nn.ReLU(), weight_norm(nn.ConvTranspose2d(4, 5, 3))]
    parent = nn.Sequential(*layers, nn.Tanh(), nn.Conv2d(5, 2, 1)).double().eval()
    child = fm.widen(parent, {"0": 12}, fill=fill, example_inputs=X)
    assert torch.allclose(child(X), parent(X), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("fill", ["pair", "zero", "duplicate"])
def test_a_spectral_hook_that_does_not_fit_is_refused_by_a_sentence(fill):
    torch.manual_seed(0)
    layers = [nn.Conv1d(3, 2, 1), torch.nn.utils.spectral_norm(nn.Conv1d(2, 6, 3, padding=1)), nn.Conv1d(6, 6, 3)]
    parent, x = nn.Sequential(*layers).double().eval(), torch.randn(2, 3, 8, dtype=torch.float64)
    with pytest.raises(fm.MorphError, match="layer '0' cannot"):
        fm.widen(parent, {"0": 6}, fill=fill, example_inputs=x)
