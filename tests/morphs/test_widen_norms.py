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
