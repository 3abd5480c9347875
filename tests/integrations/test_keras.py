"""Keras 3 on PyTorch: its layers deepen by the equation, on arrays, and its models are refused with the way to do that."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn

import fastmorph as fm

os.environ.setdefault("KERAS_BACKEND", "torch")
pytestmark = [
    pytest.mark.skipif(os.environ["KERAS_BACKEND"] != "torch", reason="Keras runs on another backend"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def keras():
    return pytest.importorskip("keras", reason="keras is not installed (requirements-others.txt)")


def net(keras, hidden=()):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((9, 8, 3)),
            *([layers.ZeroPadding2D(2), layers.Conv2D(hidden[0], 3, use_bias=False, name="first")] if hidden else []),
            layers.Conv2D(6, 3, name="conv") if hidden else layers.Conv2D(6, 5, padding="same", name="conv"),
            layers.Activation("relu"),
            layers.Flatten(),
            *([layers.Dense(hidden[1], use_bias=False, name="dense_first")] if hidden else []),
            layers.Dense(10, name="dense"),
        ]
    )


def test_a_keras_network_deepens_by_the_equation_on_its_kernels(keras):
    keras.utils.set_random_seed(0)
    parent, child = net(keras), net(keras, (24, 450))
    for layer in parent.layers:
        if layer.weights and layer.name in ("conv", "dense"):
            kernel, bias = layer.get_weights()
            convolution = kernel.ndim == 4
            axes, hidden = ((3, 2, 0, 1), 24) if convolution else ((1, 0), 450)  # Keras: (*K, in, out); PyTorch: (out, in, *K)
            answer = fm.decompose(kernel.transpose(axes), hidden, (3, 3), spatial_dims=kernel.ndim - 2, generator=0)
            back = np.argsort(axes)
            child.get_layer("first" if convolution else "dense_first").set_weights([answer.first.transpose(back)])
            child.get_layer(layer.name).set_weights([answer.second.transpose(back), bias])
    x = np.random.default_rng(0).standard_normal((2, 9, 8, 3)).astype(np.float32)
    expected, found = (keras.ops.convert_to_numpy(model(x)) for model in (parent, child))
    # two layers of float32, each of whose outputs is a sum of at most 432 products
    assert np.abs(found - expected).max() <= 432 * np.finfo(np.float32).eps * np.abs(expected).max()


def test_a_keras_model_is_refused_with_what_to_do(keras):
    model, x = net(keras), torch.randn(2, 9, 8, 3)
    for refused in (
        lambda: fm.candidates(model, x),
        lambda: fm.widen(model, {"conv": 12}, example_inputs=x),
        lambda: fm.deepen(nn.Sequential(nn.Linear(3, 3), model.get_layer("dense")), "0"),
    ):
        with pytest.raises(fm.MorphError, match=r"of Keras, which holds its weights .* fm\.decompose"):
            refused()
