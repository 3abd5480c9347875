"""Statistics for inserted BatchNorms, from real batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.certify.outputs import eval_mode
from fastmorph.errors import MorphError
from fastmorph.inputs import as_call
from fastmorph.nn import BatchNormLast, identity_batch_norm


class _Moments:
    """Count, mean and sum of squared deviations per channel, merged batch by batch in float64 (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.deviations: Any = 0.0

    def add(self, norm: Any, arguments: tuple[Tensor, ...]) -> None:
        """Take in one input of the norm; registered as its forward pre-hook."""
        dim = -1 if isinstance(norm, BatchNormLast) else arguments[0].ndim - norm.dims - 1
        values = arguments[0].double().movedim(dim, 0).flatten(1)  # (C, count)
        count, mean = values.shape[1], values.mean(1)
        shift, total = mean - self.mean, self.count + count
        self.mean += shift * (count / total)
        self.deviations += (values - mean[:, None]).square().sum(1)
        self.deviations += shift.square() * (self.count * count / total)
        self.count = total


@torch.no_grad()
def calibrate_norms(model: nn.Module, norms: Sequence[nn.Module], batches: Iterable[Any]) -> None:
    """Give each BatchNorm the mean and variance of what it sees over `batches`, and leave it the identity in eval mode.

    In train mode a BatchNorm uses the batch's own statistics: it is the identity there only as far as those match the
    calibrated ones. The variance is the biased one, which train mode divides by.

    Args:
        model: runs in eval mode; its modes are restored.
        norms: BatchNorms in it.
        batches: each one call's arguments, as `morph` takes them.

    Raises:
        MorphError: there are no norms, or no batch reached one of them.
    """
    if not norms:
        raise MorphError("calibrate= is for norm='batch', and no inserted layer has a norm; leave it out.")
    moments = [_Moments() for _ in norms]
    handles = [norm.register_forward_pre_hook(each.add) for norm, each in zip(norms, moments, strict=True)]
    try:
        with eval_mode(model):
            for batch in batches:
                call = as_call(batch, model)
                model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for norm, each in zip(norms, moments, strict=True):
        if each.count == 0:
            raise MorphError("no calibration batch reached an inserted norm; pass batches that run through the whole model.")
        identity_batch_norm(norm, each.mean, each.deviations / each.count)  # type: ignore[type-var]
