"""The numbers that layers keep beside their tensors, brought in line with them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fastmorph.graph.growth import Growth


def update_attributes(model: nn.Module, growth: Growth) -> None:
    """Set out_channels, num_features, groups and the like of all layers that grow; the tensors have grown already."""
    record = growth.coupling.record
    for module_name, rows in record.depthwise:
        _set(model.get_submodule(module_name), "groups", len(rows), growth.total(rows))
    for choice in record.choices:
        if choice.attribute and not growth.coupling.is_wider(choice):
            groups = choice.groups * growth.total(choice.channels) // len(choice.channels)
            _set(model.get_submodule(choice.module), choice.attribute, choice.groups, groups)
    for module_name, atoms in record.sites:
        module = model.get_submodule(module_name)
        for attribute in ("num_features", "num_channels"):
            old = getattr(module, attribute, None)
            if isinstance(old, int) and 0 < old <= len(atoms):
                setattr(module, attribute, growth.total(atoms[:old]))
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
            module.normalized_shape = (growth.total(atoms),)
    for name in growth.shapes():
        for module in _owners(model, name):
            _refresh(module)


def _owners(model: nn.Module, name: str) -> Iterable[nn.Module]:
    tensor = model.get_submodule(name.rpartition(".")[0])
    parameter = getattr(tensor, name.rpartition(".")[2])
    return [m for m in model.modules() if any(t is parameter for t in [*m._parameters.values(), *m._buffers.values()])]


def _set(module: nn.Module, attribute: str, old: int, new: int) -> None:
    if getattr(module, attribute, None) == old:
        setattr(module, attribute, new)


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
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = shape
