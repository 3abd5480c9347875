"""A model whose own code pads a map by its layer's sizes, as ports from TensorFlow do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmorph as fm


class SamePadded(nn.Module):
    """Pads by what the layer says of itself, then calls it."""

    def __init__(self, kernel_size, stride):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel_size, stride=stride, bias=False)

    def forward(self, x):
        sizes = zip(x.shape[:1:-1], self.conv.kernel_size[::-1], self.conv.stride[::-1], self.conv.dilation[::-1], strict=True)
        totals = [max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n) for n, k, s, d in sizes]
        widths = [width for total in totals for width in (total // 2, total - total // 2)]
        return torch.tanh(self.conv(nn.functional.pad(x, widths)))


@pytest.mark.parametrize("kernel_size", [1, 2, 3, (1, 4)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "morph",
    [
        lambda model: fm.deepen(model, "conv", hidden_channels=9, activation="relu"),
        lambda model: fm.grow_kernel(model, {"conv": 5}),
        lambda model: fm.insert_subnet(model, "conv", fm.Sequential([(8, 3, "gelu"), (None, (1, 4), None)])),
        lambda model: fm.insert_subnet(model, "conv", fm.Residual(4, 3, "relu")),
    ],
    ids=["deepen", "grow_kernel", "Sequential", "Residual"],
)
def test_it_pads_what_it_padded(morph, kernel_size, stride):
    parent = SamePadded(kernel_size, stride).double()
    child = morph(parent)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    assert fm.verify(parent, child, x)
    assert (child.conv.kernel_size, child.conv.stride) == (parent.conv.kernel_size, parent.conv.stride)


class CastsFirst(nn.Module):
    """Asks a layer for its dtype before it calls it."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 4, 2, stride=2)

    def forward(self, x):
        return self.proj(x.to(self.proj.weight.dtype))


def test_the_dtype_can_be_asked_for():
    parent, x = CastsFirst().double(), torch.randn(1, 3, 6, 6)
    for child in (fm.deepen(parent, "proj", activation="relu"), fm.grow_kernel(parent, {"proj": 3})):
        assert fm.verify(parent, child, x)
        assert (child.proj.weight.dtype, child.float().proj.weight.dtype) == (torch.float64, torch.float32)
        with pytest.raises(RuntimeError):
            nn.functional.conv2d(x, child.proj.weight)
