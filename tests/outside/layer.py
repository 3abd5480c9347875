"""A convolution whose weight is masked in every call, and how the library reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastmorph as fm


class MaskedConv2d(nn.Conv2d):
    """Some taps of the kernel are cut off."""

    mask: Tensor

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5).to(self.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * self.mask, self.bias)


fm.register_layer(MaskedConv2d, spatial_dims=2, weight=lambda layer: layer.weight * layer.mask)
