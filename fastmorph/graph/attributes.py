"""The numbers that layers keep beside their tensors, brought in line with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from fastmorph.graph.find import tensor_of
from fastmorph.graph.growth import Growth
from fastmorph.nn.computed import compute_weights

# Layers whose numbers are known: they follow from the tensors.
_REFRESHED = (
    *(_ConvNd, _NormBase, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.PReLU, nn.GroupNorm, nn.LayerNorm),
    nn.RMSNorm,
)
# Of modules of attention that get more heads: names of numbers that count something else; of widths, which heads may leave as
# they are; of how many query heads share keys and values, which is the size of nothing.
_NO_HEADS = re.compile(
    r"window|layer|position|max|len|bucket|distance|chunk|stride|patch|rotary|idx|index|block|scal|pad|seq"
    r"|(?<!all_)head_(dim|size)|dim_head|value_proj_dim|(^|_)d_(k|v|kv)$"
)
_WIDTH = re.compile(r"model|embed|hidden|width")
_REPEATS = re.compile(r"rep|(value|kv)_groups")


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
            module = model.get_submodule(module_name)
            if not isinstance(module, _REFRESHED):
                _Numbers(growth, module_name).renumber(module)
            for key, value in list(vars(module).items()) if growth.way else ():
                if type(value) is float:
                    setattr(module, key, _new_roots(growth, module_name).get(value, value))
    grown = {id(tensor_of(model, name)) for name in growth.names}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        if is_parametrized(module):
            held += module.get_submodule("parametrizations").parameters()
        if any(id(tensor) in grown for tensor in held):
            compute_weights(module)
            refresh(module)


def new_factors(buffers: Mapping[str, Tensor], growth: Growth) -> dict[str, Tensor]:
    """Buffers without dimensions that hold a root of a stream's width, as factors of embeddings do: what becomes of them."""
    found = {}
    for name, buffer in buffers.items() if growth.way and growth.numbers else ():
        if buffer.is_floating_point() and not buffer.ndim and not buffer.is_meta:
            for old, new in _new_roots(growth, name.rpartition(".")[0]).items():
                if buffer == buffer.new_tensor(old):
                    found[name] = buffer.new_tensor(new)
    return found


def _new_roots(growth: Growth, module: str) -> dict[float, float]:
    """What becomes of the root of a stream's width, and of one over that, where a module handles the stream."""
    stream = growth.streamed
    grown = {(size, stream.total(line)) for (size, _), line in growth.coupling.record.sizes(module).items()}
    return {old**power: new**power for old, new in grown if new > old for power in (0.5, -0.5)}


def _set(module: nn.Module, attribute: str, old: int, new: int) -> None:
    if getattr(module, attribute, None) == old:
        setattr(module, attribute, new)


class _Numbers:
    """What becomes of the numbers of one module.

    Attributes:
        sizes: of sizes that its forward handles; `unsure` are those that are also the size of something that stays.
        cuts: of sequences of such sizes.
        repeats: of how many query heads share keys and values, where that is known of the module.
    """

    def __init__(self, growth: Growth, module: str) -> None:
        record = growth.coupling.record
        self.repeats = growth.repeats.get(module)
        grown: dict[int, set[int]] = {}
        for (size, _), line in record.sizes(module).items():
            if self.repeats is None or not _recurs(line):
                grown.setdefault(size, set()).add(growth.total(line))
        new = {old: found - {old} for old, found in grown.items()}
        self.sizes = {old: found.pop() for old, found in new.items() if len(found) == 1}
        self.unsure = {old for old in self.sizes if old in grown[old]}
        self.cuts = {sizes: tuple(map(growth.total, lines)) for sizes, lines in record.cuts.get(module, [])}
        self._cautious, self._lists = module in growth.cautious, module not in growth.plain

    def renumber(self, module: nn.Module) -> None:
        """Replace the module's own numbers, and those in its tuples and lists, that are such sizes."""
        for key, value in list(vars(module).items()):
            if not key.startswith("_") and _is_of_ints(value) and (new := self._after(key, value)) != value:
                setattr(module, key, new)

    def _after(self, key: str, value: Any) -> Any:
        if self.repeats is not None and _NO_HEADS.search(key):
            return value
        if self.repeats is not None and value == self.repeats[0] and _REPEATS.search(key):
            return self.repeats[1]
        if self.repeats is not None and self._cautious and _WIDTH.search(key):
            return value
        return self._replaced(value, wary=self._cautious and self.repeats is None)

    def _replaced(self, value: Any, *, wary: bool) -> Any:
        if type(value) is int:
            return value if wary and value in self.unsure else self.sizes.get(value, value)
        cut = self.cuts.get(tuple(value)) if all(type(item) is int for item in value) else None
        if cut is None and self._lists:
            cut = tuple(self._replaced(item, wary=wary) for item in value)
        return value if cut is None else type(value)(cut)


def _recurs(line: Tensor) -> bool:
    """Whether something comes again behind something else: heads of one example of a batch behind those of another."""
    return len(torch.unique(line)) != len(torch.unique_consecutive(line))


def _is_of_ints(value: Any) -> bool:
    """An int, or a list or tuple of such."""
    return type(value) is int or (type(value) in (list, tuple) and all(map(_is_of_ints, value)))


def refresh(module: nn.Module) -> None:
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
