"""The numbers that layers keep beside their tensors, brought in line with them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fastmorph.graph.find import tensor_of
from fastmorph.graph.growth import Growth

# Layers whose numbers are known: they follow from the tensors.
_REFRESHED = (
    *(_ConvNd, _NormBase, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.PReLU, nn.GroupNorm, nn.LayerNorm),
    nn.RMSNorm,
)
_REPEATS = re.compile(r"group|rep", re.IGNORECASE)  # num_key_value_groups, n_rep, ...


def update_attributes(model: nn.Module, growth: Growth) -> None:
    """Set out_channels, num_features, groups and the like of all layers that grow; the tensors have grown already."""
    record = growth.coupling.record
    for module_name, rows in record.depthwise:
        _set(model.get_submodule(module_name), "groups", len(rows), growth.total(rows))
    for grouping in record.groupings:
        if grouping.attribute and not growth.coupling.is_wider(grouping):
            groups = grouping.groups * growth.total(grouping.channels) // len(grouping.channels)
            _set(model.get_submodule(grouping.module), grouping.attribute, grouping.groups, groups)
    for module_name, atoms in dict(reversed(record.norms)).items():  # the first of a module that runs several times
        module = model.get_submodule(module_name)
        for attribute in ("num_features", "num_channels"):
            old = getattr(module, attribute, None)
            if isinstance(old, int) and 0 < old <= len(atoms):
                setattr(module, attribute, growth.total(atoms[:old]))
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
            module.normalized_shape = (growth.total(atoms),)
    if growth.numbers:
        for module_name in record.sized:
            sizes, cuts = _new_numbers(growth, module_name)
            repeats = growth.repeats.get(module_name)
            _renumber(model.get_submodule(module_name), sizes, cuts, repeats, lists=module_name not in growth.plain)
    grown = {id(tensor_of(model, name)) for name in growth.names}
    for module in model.modules():
        if any(id(held) in grown for held in (*module._parameters.values(), *module._buffers.values())):
            _refresh(module)


def _set(module: nn.Module, attribute: str, old: int, new: int) -> None:
    if getattr(module, attribute, None) == old:
        setattr(module, attribute, new)


def _new_numbers(growth: Growth, module: str) -> tuple[dict[int, int], dict[tuple[int, ...], tuple[int, ...]]]:
    """What becomes of sizes, and of sequences of them, that the module's forward handles."""
    record = growth.coupling.record
    grown: dict[int, set[int]] = {}
    for (size, _), line in record.sizes(module).items():
        grown.setdefault(size, set()).add(growth.total(line))
    if module not in growth.cautious:
        grown = {old: new - {old} for old, new in grown.items()}
    cuts = {sizes: tuple(map(growth.total, lines)) for sizes, lines in record.cuts.get(module, [])}
    return {old: new.pop() for old, new in grown.items() if len(new) == 1}, cuts


def _renumber(
    module: nn.Module,
    sizes: dict[int, int],
    cuts: dict[tuple[int, ...], tuple[int, ...]],
    repeats: tuple[int, int] | None,
    *,
    lists: bool,
) -> None:
    """Replace the module's own numbers, and those in its tuples and lists, that are sizes.

    How many query heads share keys and values is the size of no channels: such a number is known by its value and its name.
    """

    def renumbered(value: Any) -> Any:
        if type(value) is int:
            return sizes.get(value, value)
        flat = all(type(item) is int for item in value)
        return type(value)((flat and cuts.get(tuple(value))) or (map(renumbered, value) if lists else value))

    if not isinstance(module, _REFRESHED):
        for key, value in list(vars(module).items()):
            if repeats is not None and value == repeats[0] and _REPEATS.search(key):
                setattr(module, key, repeats[1])
            elif not key.startswith("_") and _is_of_ints(value) and renumbered(value) != value:
                setattr(module, key, renumbered(value))


def _is_of_ints(value: Any) -> bool:
    """An int, or a list or tuple of such."""
    return type(value) is int or (type(value) in (list, tuple) and all(map(_is_of_ints, value)))


def _refresh(module: nn.Module) -> None:
    """Read the layer's sizes off its weight."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if weight is not None else ()
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = shape
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = shape
