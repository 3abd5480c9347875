"""Batch norm that is the identity at birth."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmorph.errors import MorphError

_Norm = TypeVar("_Norm", bound=_BatchNorm)


class BatchNormLast(nn.BatchNorm1d):
    """Batch norm over the last dimension, (*, C) to (*, C): for the output of `torch.nn.Linear` on any leading shape.

    State dict, dtypes and errors are `torch.nn.BatchNorm1d`'s; its own reading of three dimensions is (N, C, L).
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` would replace this class with that reading.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (*, C) over all leading dimensions together."""
        return super().forward(input.reshape(-1, input.shape[-1])).reshape(input.shape)


class _BatchNormMap(_BatchNorm):
    """Batch norm over maps with a batch dimension, (N, C, *), or without one, (C, *), as convolutions take them."""

    dims: int

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel; a map without a batch dimension is a batch of one."""
        return super().forward(input[None])[0] if input.ndim == self.dims + 1 else super().forward(input)


class BatchNormMap1d(_BatchNormMap, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (N, C, L) and (C, L); two dimensions are a map, never features (N, C)."""

    dims = 1


class BatchNormMap2d(_BatchNormMap, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for (N, C, H, W) and (C, H, W)."""

    dims = 2


class BatchNormMap3d(_BatchNormMap, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for (N, C, D, H, W) and (C, D, H, W)."""

    dims = 3


def identity_batch_norm(norm: _Norm, mean: Tensor | float = 0.0, var: Tensor | float = 1.0) -> _Norm:
    """Make a batch norm the identity in eval mode, up to its own rounding, and return it.

    Sets running_mean = bias = mean, running_var = var and weight = sqrt(var + eps) in place; `mean` and `var` are
    numbers or (C,). The square root is taken in float64, of the variance as the norm holds it, and rounded once. In
    train mode the norm is the identity only as far as a batch has these statistics.

    Raises:
        MorphError: the norm lacks running statistics or weight and bias, or the mean and var given are not finite, not
            of shape (C,), or var is negative.
    """
    if norm.running_mean is None or norm.running_var is None or not norm.affine:
        raise MorphError(
            "only a batch norm with running statistics and with weight and bias can be the identity; build it with "
            "affine=True and track_running_stats=True."
        )
    # On the CPU, because not every device has float64; in the norm's dtype, because that is the variance it will see.
    held = [torch.as_tensor(value, device="cpu").to(norm.running_var.dtype) for value in (mean, var)]
    if any(value.shape not in ((), norm.running_mean.shape) for value in held):
        raise MorphError(f"mean and var must be numbers or of shape ({norm.num_features},), one entry a channel.")
    if not all(value.isfinite().all() for value in held) or (held[1] < 0).any():
        raise MorphError(f"mean and var must be finite in {held[1].dtype} and var not negative; calibrate on such inputs.")
    with torch.no_grad():
        norm.running_mean.copy_(held[0])
        norm.running_var.copy_(held[1])
        norm.weight.copy_((held[1].double() + norm.eps).sqrt())
        norm.bias.copy_(held[0])
    return norm
