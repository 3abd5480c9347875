"""`grow_kernel`: the whole output map is preserved, at every setting of a convolution; names stay where they can."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fastmorph as fm

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Sums of at most 4 * 4**3 products of normal numbers, in another order: some hundred roundings of numbers of size 10.
BOUND = 1e-12


def run(module, x):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        return module(x)


def assert_same(parent, child, x):
    with torch.no_grad():
        before, after = run(parent, x), run(child, x)
    torch.testing.assert_close(after, before, rtol=0, atol=BOUND)


@st.composite
def convolutions(draw):
    """A convolution with any settings, an input that it takes, and a size to grow to."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 4 if dims < 3 else 3)) for _ in range(dims))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    conv = CONVS[dims - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=tuple(draw(st.integers(1, 3)) for _ in range(dims)) if padding != "same" else 1,
        padding=tuple(draw(st.integers(0, 2)) for _ in range(dims)) if padding == "numbers" else padding,
        dilation=tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )
    size = tuple(k + draw(st.integers(0, 3)) for k in kernel)
    x = torch.randn(2, conv.in_channels, *(draw(st.integers(4, 10)) for _ in range(dims)), dtype=torch.float64)
    return conv, x, size


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=convolutions())
def test_every_convolution_keeps_its_whole_map(case):
    conv, x, size = case
    try:
        run(conv, x)
    except RuntimeError:
        assume(False)  # an input smaller than the kernel, or than reflection needs
    child = fm.grow_kernel(conv, {"": size})
    assert_same(conv, child, x)
    grown = child if type(child) is type(conv) else child.conv
    assert grown.kernel_size == size == tuple(grown.weight.shape[2:])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), dims=st.integers(1, 3))
def test_every_transposed_convolution_keeps_its_whole_map(data, dims):
    groups = data.draw(st.integers(1, 2))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
    stride = tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
    conv = TRANSPOSED[dims - 1](
        2 * groups,
        3 * groups,
        kernel,
        stride=stride,
        padding=tuple(data.draw(st.integers(0, k - 1)) for k in kernel),
        output_padding=tuple(data.draw(st.integers(0, s - 1)) for s in stride),
        dilation=data.draw(st.integers(1, 2)),
        groups=groups,
        bias=data.draw(st.booleans()),
        dtype=torch.float64,
    )
    child = fm.grow_kernel(conv, {"": tuple(k + 2 * data.draw(st.integers(0, 1)) for k in kernel)})
    assert_same(conv, child, torch.randn(2, 2 * groups, *(4,) * dims, dtype=torch.float64))


def test_symmetric_growth_keeps_module_and_names():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, (1, 3), padding="same", bias=False))
    child = fm.grow_kernel(model, {"0": 5, "2": (3, 5)})
    assert list(child.state_dict()) == list(model.state_dict())
    assert (child[0].kernel_size, child[0].padding, child[2].padding) == ((5, 5), (2, 2), "same")
    assert model[0].kernel_size == (3, 3)
    assert child[0].weight[:, :, 1:-1, 1:-1].equal(model[0].weight)
    assert child[0].weight.count_nonzero() == model[0].weight.count_nonzero()


def test_growth_by_an_odd_number_pads_in_a_module_of_its_own():
    child = fm.grow_kernel(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1)), {"0": 4})
    assert list(child.state_dict()) == ["0.conv.weight", "0.conv.bias"]
    assert child[0].pad.padding == (1, 2, 1, 2)


def test_the_child_trains_on_the_new_taps_and_hooks_run_once():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"))
    shapes = []
    model[0].register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    model[0].eval()
    child = fm.grow_kernel(model, {"0": 4})
    child(torch.randn(1, 2, 6, 6)).square().sum().backward()
    assert shapes == [(1, 2, 6, 6)]
    assert child[0].conv.weight.grad.count_nonzero() == child[0].conv.weight.numel()
    assert not child[0].conv.training


def test_a_layer_used_twice_and_one_of_a_subclass():
    class Mine(nn.Conv1d):
        mark = 3

    conv = Mine(2, 2, 3, padding=1, dtype=torch.float64).requires_grad_(False)
    model = nn.Sequential(conv, nn.Tanh(), conv)
    child = fm.grow_kernel(model, {"2": 7})
    assert child[0] is child[2]
    assert type(child[0]) is Mine
    assert not child[0].weight.requires_grad
    assert_same(model, child, torch.randn(1, 2, 9, dtype=torch.float64))


@pytest.mark.parametrize(
    ("layer", "size", "words"),
    [
        (nn.Linear(2, 2), 3, "no kernel"),
        (nn.ReLU(), 3, "it is a ReLU"),
        (nn.Conv2d(2, 2, 3), 2, "smaller than its kernel"),
        (nn.Conv2d(2, 2, 3), (5, 2), "smaller than its kernel"),
        (nn.Conv2d(2, 2, 3), (5, 5, 5), "is not a positive int, nor 2 of them"),
        (nn.Conv2d(2, 2, 3), (5, "5"), "is not a positive int"),
        (nn.ConvTranspose2d(2, 2, 3), 4, "even number"),
    ],
)
def test_what_cannot_grow_is_refused_by_name(layer, size, words):
    with pytest.raises(fm.MorphError, match="layer '0'") as caught:
        fm.grow_kernel(nn.Sequential(layer), {"0": size})
    assert words in str(caught.value)
    with pytest.raises(fm.MorphError, match="kernel_size='5' must be"):
        fm.GrowKernel("0", "5")
