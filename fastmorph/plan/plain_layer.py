"""A plain layer in the place of one that computes its weight."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fastmorph.certify.outputs import eval_mode
from fastmorph.nn import Replacement
from fastmorph.nn.computed import compute_weights
from fastmorph.plan.layer_types import find_rule
from fastmorph.plan.layers import Layer, check_weight, refusal

_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode")


def make_plain(layer: Layer) -> tuple[Layer, nn.Module]:
    """A plain layer that computes what `layer` does, and what is to stand in its place: itself, with its padding if it has any.

    The layer's own parameters go on where the plain one can have them; else it gets new ones.

    Raises MorphError where the layer does not have the weight that its rule says.
    """
    module, rule = layer.module, layer.rule
    weight, bias = _effective(layer)
    if weight.ndim != rule.spatial_dims + 2:
        raise refusal(
            layer.name,
            f"the rule of {type(module).__name__} gives a weight of shape {tuple(weight.shape)}",
            f"register it with the spatial_dims that it has, and a weight of {rule.spatial_dims + 2} dimensions",
        )
    settings: dict[str, Any] = {"bias": False, "device": "meta", "dtype": weight.dtype}
    channels = [*weight.shape[:2]]
    if rule.spatial_dims:
        settings |= {name: getattr(module, name) for name in _SETTINGS if hasattr(module, name)}
        settings["kernel_size"] = tuple(weight.shape[2:])
        channels[1] *= settings.get("groups", 1)
    if rule.transposed:
        settings["output_padding"] = getattr(module, "output_padding", 0)
    else:
        channels.reverse()
    plain: Any = skip_init(rule.plain, *channels, **settings)
    trains = layer.origin.requires_grad
    plain.weight, plain.bias = _as_parameter(weight, trains), None if bias is None else _as_parameter(bias, trains)
    plain.train(module.training)
    pad = None if rule.pad is None else rule.pad(module)
    whole = plain if pad is None else Replacement(OrderedDict(pad=pad, layer=plain))
    return Layer(layer.name, plain, find_rule(plain)[0] or rule), whole


@torch.no_grad()
def _effective(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that the layer computes with in eval mode; its own parameters where they are that."""
    module, read = layer.module, layer.rule.weight
    compute_weights(module)
    with eval_mode(module):
        weight, again = (module.weight if read is None else read(module) for _ in range(2))
        bias = getattr(module, "bias", None)
    check_weight(layer.name, weight)
    # Without the parent's weights (restructure) there may be anything in them, NaN too.
    if weight.device.type != "meta" and not torch.allclose(weight, again, rtol=0, atol=0, equal_nan=True):
        cause = "its weight is not the same each time that it is computed"
        raise refusal(layer.name, cause, "make it deterministic in eval mode")
    return weight, bias


def _as_parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=requires_grad)
