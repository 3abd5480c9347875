"""Layers of other forms: a product of two inputs, and bags of vectors that are looked up."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from widening import FILLS, Net, randn, trained, widened


@pytest.mark.parametrize("fill", FILLS)
def test_into_and_out_of_a_bilinear_layer(fill):
    def forward(m, x, y):
        return m.head(torch.relu(m.product(torch.relu(m.one(x)), m.two(y))))

    model = trained(Net(forward, one=nn.Linear(3, 4), two=nn.Linear(2, 5), product=nn.Bilinear(4, 5, 6), head=nn.Linear(6, 2)))
    child = widened(model, {"one": 7, "two": 8, "product": 9}, randn(3, 3), randn(3, 2), fill=fill)
    product = child.product
    assert (product.out_features, product.in1_features, product.in2_features) == product.weight.shape == (9, 7, 8)


@pytest.mark.parametrize("fill", FILLS)
def test_both_inputs_of_a_bilinear_layer_share_channels(fill):
    def forward(m, x):
        x = m.one(x)
        return m.head(m.product(x, torch.relu(x)))

    model = trained(Net(forward, one=nn.Linear(3, 4), product=nn.Bilinear(4, 4, 5), head=nn.Linear(5, 2)))
    child = widened(model, {"one": 7}, randn(3, 3), fill=fill)
    assert child.product.weight.shape == (5, 7, 7)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("fill", FILLS)
def test_an_embedding_bag(fill, mode):
    model = trained(nn.Sequential(nn.EmbeddingBag(9, 4, mode=mode), nn.ReLU(), nn.Linear(4, 2)))
    child = widened(model, {"0": 7}, torch.arange(6).view(2, 3), fill=fill)
    assert child[0].embedding_dim == 7
