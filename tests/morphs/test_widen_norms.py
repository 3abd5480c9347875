"""Norms over channels allow whole groups, or whole multiples of all channels; what else is asked names the nearest width."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from widening import FILLS, Net, randn, trained, widened

import fastmorph as fm


def network(norm, width=8):
    return trained(
        nn.Sequential(nn.Conv2d(3, width, 3), norm, nn.GELU(), nn.Conv2d(width, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    )


def transformer_block():
    def forward(m, x):
        x = m.stem(x)
        x = x + m.down(torch.relu(m.up(m.norm(x)))) * m.gamma
        return m.head(m.last(x).mean(1))

    return trained(
        Net(
            forward,
            stem=nn.Linear(3, 6),
            norm=nn.LayerNorm(6),
            up=nn.Linear(6, 10),
            down=nn.Linear(10, 6),
            gamma=nn.Parameter(torch.ones(6)),
            last=nn.RMSNorm(6, eps=1e-6),
            head=nn.Linear(6, 2),
        )
    )


@pytest.mark.parametrize("fill", FILLS)
def test_layer_norm_by_whole_multiples(fill):
    model, x = transformer_block(), randn(2, 4, 3)
    child = widened(model, {"down": 18}, x, fill=fill)
    assert child.norm.normalized_shape == child.last.normalized_shape == (18,)
    assert child.stem.out_features == child.up.in_features == 18
    widened(model, {"up": 13}, x, fill=fill)  # between the norms, any number


def test_layer_norm_names_the_multiple():
    sentence = "layer 'down' cannot have 13 channels: they are normalised together, .*; the nearest number that works is 12"
    with pytest.raises(fm.MorphError, match=sentence):
        fm.widen(transformer_block(), {"down": 13}, example_inputs=randn(2, 4, 3))


def test_copies_are_read_apart():
    child = widened(transformer_block(), {"down": 12}, randn(2, 4, 3))
    columns = child.up.weight.unflatten(1, (6, 2))
    assert not torch.equal(columns[..., 0], columns[..., 1])


@pytest.mark.parametrize("fill", FILLS)
def test_group_norm_by_whole_groups(fill):
    child = widened(network(nn.GroupNorm(4, 8)), {"0": 12}, randn(2, 3, 6, 6), fill=fill)
    assert (child[1].num_groups, child[1].num_channels) == (6, 12)


def test_group_norm_names_the_step():
    sentence = "layer '0' cannot have 11 channels: they come in steps of 2; the nearest number that works is 1[02]"
    with pytest.raises(fm.MorphError, match=sentence):
        fm.widen(network(nn.GroupNorm(4, 8)), {"0": 11}, example_inputs=randn(2, 3, 6, 6))


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.GroupNorm(8, 8)]
)
def test_norms_of_single_channels_take_any_number(norm):
    child = widened(network(norm), {"0": 11}, randn(2, 3, 6, 6))
    assert getattr(child[1], "num_features", None) == 11 or child[1].num_groups == 11


@pytest.mark.parametrize("fill", FILLS)
def test_statistics_of_all_channels_by_whole_multiples(fill):
    def forward(m, x):
        x = m.one(x)
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        gate = torch.sigmoid(m.gate(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)))
        return m.two(x * gate)

    model = trained(Net(forward, one=nn.Conv2d(3, 5, 1), gate=nn.Conv2d(2, 1, 3, padding=1), two=nn.Conv2d(5, 2, 1)))
    widened(model, {"one": 10}, randn(2, 3, 6, 6), fill=fill)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = nn.functional.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_standardised_weights_take_twins():
    model = trained(nn.Sequential(Standardised(3, 6, 3), nn.ReLU(), Standardised(6, 5, 2), nn.ReLU(), nn.Conv2d(5, 2, 1)))
    child = widened(model, {"0": 10}, randn(2, 3, 6, 6))
    assert child[2].weight[:, 6:].abs().min() > 0
    with pytest.raises(fm.MorphError, match=r"they come in steps of 2; the nearest number that works is (8|10)"):
        fm.widen(model, {"0": 9}, example_inputs=randn(2, 3, 6, 6))
    with pytest.raises(fm.MorphError, match=r"'2.weight' is standardised row by row, .*; use fill='pair'"):
        fm.widen(model, {"0": 10}, example_inputs=randn(2, 3, 6, 6), fill="zero")


# --- norms over a mixture of what grows and what stays ------------------------------------------------------------------------

OVER_CHANNELS = {
    "layer": lambda: nn.LayerNorm(9),
    "rms": lambda: nn.RMSNorm(9),
    "group": lambda: nn.GroupNorm(1, 9),
    "groups": lambda: nn.GroupNorm(3, 9),
    "mean": lambda: Net(lambda m, x: x - x.mean(1, keepdim=True)),
    "written": lambda: Net(
        lambda m, x: (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True, correction=0) + 1e-5)
    ),
    "grouped": lambda: Net(lambda m, x: (x.unflatten(1, (3, 3)) - x.unflatten(1, (3, 3)).mean(2, keepdim=True)).flatten(1)),
}


def mixture(norm, other):
    """A norm over 5 channels of a layer and 4 others."""

    def forward(m, x):
        return m.head(torch.tanh(m.norm(torch.cat([torch.relu(m.one(x)), other(m, x)], 1))))

    return trained(Net(forward, one=nn.Linear(4, 5), two=nn.Linear(4, 4), norm=OVER_CHANNELS[norm](), head=nn.Linear(9, 3)))


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("norm", OVER_CHANNELS)
@pytest.mark.parametrize("others", ["the input", "a constant"])
def test_a_norm_over_channels_that_stay_is_refused(norm, others, fill):
    other = {"the input": lambda m, x: x, "a constant": lambda m, x: x.new_full((len(x), 4), 0.5)}[others]
    model = mixture(norm, other)
    causes = "they come in steps of 3" if "group" in norm and norm != "group" else "together with others that stay as they are"
    with pytest.raises(fm.MorphError, match=causes):  # groups of 3 that hold no others may be more
        fm.widen(model, {"one": 10}, example_inputs=randn(6, 4), fill=fill)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("norm", ["layer", "rms", "group", "mean"])
def test_a_norm_over_two_layers_doubles_both(norm, fill):
    child = widened(mixture(norm, lambda m, x: m.two(x)), {"one": 10}, randn(6, 4), fill=fill)
    assert (child.one.out_features, child.two.out_features, child.head.in_features) == (10, 8, 18)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("norm", ["layer", "rms", "mean"])
def test_a_norm_over_a_chunk_of_a_layers_channels(norm, fill):
    """Those of the chunk come in multiples, and so do all; or the others grow alone."""

    def forward(m, x):
        a, b = m.one(x).chunk(2, 1)
        return m.head(torch.tanh(torch.cat([m.norm(a), b], 1)))

    norms = {"layer": nn.LayerNorm(4), "rms": nn.RMSNorm(4), "mean": Net(lambda m, x: x - x.mean(1, keepdim=True))}
    model = trained(Net(forward, one=nn.Linear(3, 8), norm=norms[norm], head=nn.Linear(8, 3)))
    for channels in (16, 24):
        widened(model, {"one": channels}, randn(6, 3), fill=fill)
    with pytest.raises(fm.MorphError, match="layer 'one' cannot"):
        fm.widen(model, {"one": 10}, example_inputs=randn(6, 3), fill=fill)
