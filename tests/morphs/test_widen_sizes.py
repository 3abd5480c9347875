"""Forwards with sizes of their own: numbers that modules keep grow along, what is cut in equal parts grows in equal parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from widening import FILLS, randn, trained, widened

import fastmorph as fm


class Halves(nn.Module):
    """Two branches, each on a half of the channels, whose size is a number in the module."""

    def __init__(self, channels):
        super().__init__()
        self.stem, self.half = nn.Conv2d(3, channels, 1), channels // 2
        self.one, self.two = nn.Conv2d(self.half, self.half, 3, padding=1), nn.Conv2d(self.half, self.half, 1)
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        a, b = torch.split(x, self.half, 1)
        return self.head(torch.cat([self.one(a), b + self.two(torch.relu(a))], 1))


class Parts(nn.Module):
    """Depthwise convolutions on unequal parts of the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.sizes = nn.Conv2d(3, 12, 1), (6, 4, 2)
        self.branches = nn.ModuleList(nn.Conv2d(size, size, 3, padding=1, groups=size) for size in self.sizes)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        parts = torch.split(self.stem(x), self.sizes, 1)
        return self.head(torch.cat([branch(part) for branch, part in zip(self.branches, parts, strict=True)], 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.size, self.width = 3, 4, 12
        self.stem, self.qkv, self.proj = nn.Linear(5, 6), nn.Linear(6, 36), nn.Linear(12, 6)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(len(x), -1, self.width))


class ShiftedAttention(Attention):
    """Its shift happens to be as large as it has heads."""

    def __init__(self):
        super().__init__()
        self.shift = [3, 3]

    def forward(self, x):
        return super().forward(x.roll(self.shift[0], 1)).roll(-self.shift[1], 1)


class PaddedShortcut(nn.Module):
    """A residual block that pads its input with channels of zeros, as ResNets for CIFAR do."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.pad = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), (0, 0, 0, 0, 1, 3)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(self.body(x) + F.pad(x, self.pad)))


@pytest.mark.parametrize("fill", FILLS)
def test_a_number_in_the_module(fill):
    child = widened(trained(Halves(8)), {"stem": 14}, randn(2, 3, 5, 5), fill=fill)
    assert child.half == 7
    assert child.one.in_channels == child.two.in_channels == 7


def test_a_part_of_another_layers_output():
    child = widened(trained(Halves(8)), {"two": 6}, randn(2, 3, 5, 5))
    assert (child.half, child.stem.out_channels) == (6, 12)


@pytest.mark.parametrize("fill", FILLS)
def test_unequal_parts(fill):
    child = widened(trained(Parts()), {"branches.1": 7}, randn(2, 3, 5, 5), fill=fill)
    assert child.sizes == (6, 7, 2)
    assert child.stem.out_channels == 15


@pytest.mark.parametrize("fill", FILLS)
def test_heads_of_attention_are_copied_whole(fill):
    child = widened(trained(Attention()), {"qkv": 60}, randn(2, 7, 5), fill=fill)
    assert (child.heads, child.size, child.width) == (5, 4, 20)
    with pytest.raises(fm.MorphError, match="they come in steps of 12; the nearest number that works is 48"):
        fm.widen(trained(Attention()), {"qkv": 50}, example_inputs=randn(2, 7, 5))


def test_a_number_that_only_looks_like_a_size():
    child = widened(trained(ShiftedAttention()), {"qkv": 60}, randn(2, 7, 5))
    assert (child.heads, child.shift) == (5, [3, 3])


@pytest.mark.parametrize("layer", ["stem", "body"])
@pytest.mark.parametrize("fill", FILLS)
def test_channels_of_zeros(layer, fill):
    widened(trained(PaddedShortcut()), {layer: 9}, randn(2, 3, 5, 5), fill=fill)


def test_a_number_in_the_code_is_refused():
    class Fixed(Halves):
        def forward(self, x):
            self.half = 4
            return super().forward(x)

    sentence = (
        "layer 'stem' cannot get more channels: the model itself fails with ValueError: .*; let that module take its sizes"
    )
    with pytest.raises(fm.MorphError, match=sentence):
        fm.widen(trained(Fixed(8)), {"stem": 14}, example_inputs=randn(2, 3, 5, 5))


class Shuffled(nn.Module):
    """Units that pass a half of the channels by, and shuffle both halves together, as ShuffleNetV2 does."""

    def __init__(self, units=3, half=6):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 2 * half, 1), nn.Conv2d(2 * half, 2, 1)
        self.units = nn.ModuleList(
            nn.Sequential(nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU()) for _ in range(units)
        )

    def forward(self, x):
        x = self.stem(x)
        for unit in self.units:
            a, b = x.chunk(2, 1)
            x = F.channel_shuffle(torch.cat([a, unit(b)], 1), 2)
        return self.head(x)


@pytest.mark.parametrize("fill", ["pair", "zero"])
def test_shuffles_put_old_channels_at_new_places(fill):
    model = trained(Shuffled())
    child = widened(model, {"units.1.0": 8}, randn(2, 3, 5, 5), fill=fill)
    assert [unit[0].out_channels for unit in child.units] == [8, 8, 8]
    assert not torch.equal(child.units[1][0].weight[:6, :6], model.units[1][0].weight)


def test_shuffles_name_a_width_that_has_a_place_for_all():
    refusals = []
    for width in range(7, 12):
        try:
            fm.widen(trained(Shuffled(5, 6)), {"units.1.0": width}, example_inputs=randn(2, 3, 5, 5))
        except fm.MorphError as refusal:
            refusals.append(str(refusal))
    assert refusals
    assert all("shuffles; the nearest number that works is " in refusal for refusal in refusals)


class Auxiliary(nn.Module):
    """A head that runs in train mode alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.extra = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Sequential(nn.Conv2d(4, 2, 1))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.dropout(self.norm(self.stem(x)), 0.5, self.training)
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


def test_what_runs_in_train_mode_alone_grows_too():
    child = widened(trained(Auxiliary()), {"stem": 7}, randn(2, 3, 5, 5))
    assert child.extra[0].in_channels == 7
    child.train()(randn(2, 3, 5, 5))
