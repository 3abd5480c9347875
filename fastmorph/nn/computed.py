"""Weights that a hook computes before each call: `torch.nn.utils.weight_norm` and `spectral_norm`, as they were of old.

Such a weight is an attribute, neither a parameter nor a buffer. It may be older than the parameters that it is computed from,
and PyTorch refuses to copy one that was computed with gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

WeightHook = WeightNorm | SpectralNorm


def weight_hooks(module: nn.Module) -> dict[int, WeightHook]:
    """The hooks of a module that compute a tensor of its own, by their keys."""
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, WeightHook)}


@torch.no_grad()
def compute_weights(module: nn.Module) -> None:
    """Bring what a module's hooks compute up to date, as a call in eval mode does."""
    for hook in weight_hooks(module).values():
        arguments = (False,) if isinstance(hook, SpectralNorm) else ()
        setattr(module, hook.name, hook.compute_weight(module, *arguments))


def computed_copies(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy(model, memo)`: copies, without gradients, of what hooks compute."""
    computed = [vars(module).get(hook.name) for module in model.modules() for hook in weight_hooks(module).values()]
    return {id(tensor): tensor.detach().clone() for tensor in computed if isinstance(tensor, Tensor)}
