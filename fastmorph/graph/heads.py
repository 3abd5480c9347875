"""Heads of attention: which channels make one, found where a module arranges a weight's rows in heads and takes a softmax.

A model is followed twice: once as always, which shows into how many rows of how many heads a forward divides what its weights
make; then with the rows of one head as one channel (`Record.whole`), so that what happens inside of a head (rotary positions,
norms over a head, the product of queries and keys) ties nothing, and a class is a head: its rows in all weights, the columns
that read it, and whatever else has an entry for each head. Queries that share keys and values are of one class with these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from fastmorph.errors import MorphError
from fastmorph.graph.coupling import QUERIES
from fastmorph.graph.find import submodule_of
from fastmorph.graph.flow import is_real, line, varying_dims
from fastmorph.graph.growth import Growth
from fastmorph.graph.propose import Found, Refusal, tried
from fastmorph.graph.ragged import positions
from fastmorph.graph.record import Axis, Ints, Record
from fastmorph.graph.structure import Structure
from fastmorph.outputs import Path

_GROUPS, _EACH = frozenset({"groups"}), frozenset({"groups", QUERIES})


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of one module of attention.

    Attributes:
        layer: the name by which it was asked for.
        modules: those that take the softmax, and that hold these and the weights: of several layers, where what they do with
            heads is tied, as by one table of positions.
        queries: (heads,), of each query head, in order, the atom that it is called by.
        groups: (kv_heads,), the classes of heads of keys and values with all their queries, in order.
    """

    layer: str
    modules: tuple[str, ...]
    queries: Tensor
    groups: Ints

    @property
    def repeats(self) -> int:
        """How many query heads share keys and values."""
        return len(self.queries) // len(self.groups)

    def grown(self, structure: Structure, heads: int, kv_heads: int) -> Growth:
        """So many heads: more of the last group, or more query heads in every group, the last of each.

        Raises MorphError if these cannot be copied.
        """
        wide = kv_heads == len(self.groups)
        coupling = structure.coupling(_EACH if wide else _GROUPS)
        last = coupling.of(self.queries[-1:])
        cause = coupling.forbidden(last)
        if cause:
            raise MorphError(f"layer {self.layer!r} cannot get more heads: {cause}; add heads to another layer.")
        before, after = self.repeats, heads // kv_heads
        growth = Growth.of_classes(coupling, last, np.array([after - before if wide else kv_heads - len(self.groups)]))
        return replace(growth, numbers=True, repeats=dict.fromkeys(self.modules, (before, after)))


def by_heads(structure: Structure, layers: Sequence[str]) -> Structure:
    """The structure, followed with the rows of each head as one channel, in all modules of the classes of these.

    Raises MorphError for a layer that is no attention.
    """
    record, model = structure.record, structure.skeleton.model
    arranged = {name: [axis for split in splits for axis in _axes(record, split)] for name, splits in record.splits.items()}
    kinds = set()
    for layer in layers:
        submodule_of(model, layer)
        modules = [name for name, axes in arranged.items() if any(_is_of(axis, layer) for axis in axes)]
        if not modules:
            raise MorphError(
                f"layer {layer!r} has no heads: nowhere are the rows of its weights arranged in heads; name a module of "
                "attention, or pass example_inputs= that reach it."
            )
        kinds |= {type(model.get_submodule(name)) for name in modules}
    whole: dict[tuple[str, int], int] = {}
    for module, splits in record.splits.items():
        for split in splits if type(model.get_submodule(module)) in kinds else ():
            for axis in _axes(record, split):
                size = split.shape[max(varying_dims(split))]
                known = whole.setdefault((axis.name, axis.dim), size)
                whole[axis.name, axis.dim] = min(known, size)
    whole |= {(bias, 0): size for (name, dim), size in whole.items() for bias in _biases(record, record.parameter(name)[dim])}
    return structure.followed_by(
        {key: size for key, size in whole.items() if record.parameter(key[0])[key[1]].size % size == 0}
    )


def _axes(record: Record, split: Tensor) -> list[Axis]:
    """The dimension of a weight whose indices, neighbours in the last dimension, are arranged here; none if they are not."""
    if len(varying_dims(split)) < 2 or not is_real(split):
        return []
    rows = split.transpose(-1, max(varying_dims(split)))
    axes = record.axes_of(split.reshape(-1))
    together = bool((rows.diff(dim=-1) == 1).all())
    aligned = all(((rows[..., 0] - axis.start) % rows.shape[-1] == 0).all() for axis in axes)
    return axes if together and len(axes) == 1 and aligned and axes[0].parameter else []


def _biases(record: Record, axis: Axis) -> Iterator[str]:
    """Vectors of the same module that are as long as the dimension."""
    module = axis.name.rpartition(".")[0]
    for other in record.axes:
        if other.parameter and other.size == axis.size and other.name.rpartition(".")[0] == module:
            yield from [other.name] if len(record.parameter(other.name)) == 1 else []


def _is_of(axis: Axis, layer: str) -> bool:
    return not layer or axis.name == layer or axis.name.startswith(layer + ".")


def find_heads(structure: Structure, layer: str) -> Heads:
    """The heads of a module of attention, or of the one whose queries a layer makes.

    Args:
        structure: as `by_heads` gives it.
        layer: dotted name.

    Raises MorphError if there are none, or those of several modules.
    """
    record, coupling = structure.record, structure.coupling(_GROUPS)
    scores = [(module, label) for module, label in record.scores if is_real(label)]
    found: dict[str, Tensor] = {}
    for _, label in scores:
        axis = record.axis_of(int(label[0]))
        if _is_of(axis, layer):
            found.setdefault(axis.name, torch.from_numpy(_in_order(label.numpy())))
    if not found:
        raise MorphError(
            f"layer {layer!r} has no heads of its own that a softmax keeps apart; name the module of attention, or the layer "
            "that makes its queries."
        )
    if len(found) > 1:
        names = ", ".join(repr(name.rpartition(".")[0]) for name in found)
        raise MorphError(
            f"layer {layer!r} holds several modules of attention, whose queries come from {names}; name one of these."
        )
    (queries,) = found.values()
    classes = coupling.of(queries)
    groups = _in_order(classes)
    if (np.unique(classes, return_counts=True)[1] * len(groups) != len(queries)).any():
        raise MorphError(f"layer {layer!r} cannot get more heads: its keys and values serve different numbers of query heads.")
    mine = [(module, label) for module, label in scores if np.isin(coupling.of(label), groups).any()]
    modules = [name for module, label in mine for name in (module, _holder(module, record.axis_of(int(label[0]))))]
    return Heads(layer, tuple(dict.fromkeys(modules)), queries, groups)


def _holder(module: str, queries: Axis) -> str:
    """The module that holds both the one that takes a softmax and the weight of its queries."""
    pairs = zip(module.split("."), queries.name.split("."), strict=False)
    return ".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _in_order(values: Ints) -> Ints:
    """Each value once, in the order of their first places."""
    return values[np.sort(np.unique(values, return_index=True)[1])]


def try_heads(structure: Structure, growth: Growth) -> Found | Refusal:
    """The growth if the model can follow: with widths that its modules keep as they are, with others, with all numbers kept."""
    attempts = (replace(growth, cautious=frozenset(growth.repeats)), growth, replace(growth, numbers=False))
    refusals = []
    for attempt in attempts:
        found = tried(structure, attempt)
        if isinstance(found, Found):
            return found
        refusals.append(found)
    return refusals[0]


def outputs_by_head(growth: Growth) -> dict[Path, tuple[int, Ints]]:
    """The model's outputs that hold something of each head, as caches do: along which dimension, and where old heads are."""
    found = {}
    for path, shape, labels in growth.coupling.record.returned:
        for label in labels:
            for dim in sorted(varying_dims(label)):
                atoms = line(label, dim)
                if growth.total(atoms) > shape[dim]:
                    classes = growth.coupling.of(atoms)
                    begins = np.flatnonzero(np.append(True, np.diff(classes) != 0))
                    lengths = np.diff(np.append(begins, len(classes)))
                    sizes = lengths * (1 + growth.copies[atoms.numpy()[begins]].astype(np.int64))
                    found[path] = dim, np.flatnonzero(positions(sizes) < np.repeat(lengths, sizes))
    return found
