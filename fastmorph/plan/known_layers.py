"""The layer classes that are known from the start: PyTorch's own, and those of packages that need not be installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import batch_norm

from fastmorph.nn import SamePad
from fastmorph.plan.layer_types import register_layer


def _standardised(layer: Any) -> Tensor:
    """The weight with each output channel's mean and variance taken out (Qiao et al. 2019), as the layers compute it.

    Scaled ones multiply by a gain (Brock et al. 2021).
    """
    gain = (layer.gain * layer.scale).view(-1) if hasattr(layer, "gain") else None
    rows = layer.weight.reshape(1, layer.weight.shape[0], -1)
    return batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=layer.eps).reshape_as(layer.weight)


def _same_pad(layer: Any) -> nn.Module | None:
    """Padding by the map's size; layers whose padding does not depend on it have switched it off."""
    return SamePad(layer.kernel_size, layer.stride, layer.dilation) if getattr(layer, "same_pad", True) else None


def _own_pad(layer: Any) -> nn.Module | None:
    return layer.pad


register_layer(nn.Linear, spatial_dims=0)
register_layer(nn.Conv1d, spatial_dims=1)
register_layer(nn.Conv2d, spatial_dims=2)
register_layer(nn.Conv3d, spatial_dims=3)
register_layer(nn.ConvTranspose1d, spatial_dims=1, transposed=True)
register_layer(nn.ConvTranspose2d, spatial_dims=2, transposed=True)
register_layer(nn.ConvTranspose3d, spatial_dims=3, transposed=True)

register_layer("timm.layers.linear.Linear", spatial_dims=0)
register_layer("timm.layers.conv2d_same.Conv2dSame", spatial_dims=2, pad=_same_pad)
for _name in ("StdConv2d", "ScaledStdConv2d"):
    register_layer(f"timm.layers.std_conv.{_name}", spatial_dims=2, weight=_standardised)
    register_layer(f"timm.layers.std_conv.{_name}Same", spatial_dims=2, weight=_standardised, pad=_same_pad)
register_layer(
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d", spatial_dims=2, weight=_standardised, pad=_own_pad
)
register_layer("transformers.pytorch_utils.Conv1D", spatial_dims=0, weight=lambda layer: layer.weight.T)
