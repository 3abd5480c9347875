"""Outputs of any kind, as a flat mapping from paths to leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Path = tuple[object, ...]
Outputs = dict[Path, Any]

PLAIN = (type, type(None), str, bytes, torch.dtype, torch.device, torch.layout, Enum)  # no numbers, but equal or not
_LONGEST = 100_000  # items taken from an iterator: one without end is refused


def flatten(value: Any, path: Path = (), around: tuple[int, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) for each leaf, and (path, its type) for each container, which tells a list from a tuple.

    Leaves are tensors (numbers and arrays among them), values of the `PLAIN` types, and whatever cannot be walked.
    An iterator is consumed. `around` are the identities of the containers that hold `value`, to end a cycle at.
    """
    if isinstance(value, Tensor) and not value.is_nested:
        yield path, value.detach() if value.layout == torch.strided else value.detach().to_dense()
        return
    if isinstance(value, (bool, int, float, complex, np.generic, np.ndarray)) and not isinstance(value, Enum):
        array = np.asarray(value)  # by way of numpy, which keeps a Python float's 64 bits
        yield path, torch.tensor(array, device="cpu") if array.dtype.kind in "biufc" else repr(value)
        return
    if isinstance(value, PLAIN):
        yield path, value
        return
    if id(value) in around:
        yield path, f"the container {len(around) - around.index(id(value))} levels above"
        return
    items = _items(value)
    if items is None:
        yield path, value
        return
    yield path, type(value)
    for key, item in items:
        yield from flatten(item, (*path, key), (*around, id(value)))


def _items(value: Any) -> Iterable[tuple[object, Any]] | None:
    """What a container holds, by name or number; None for what cannot be walked."""
    if isinstance(value, Tensor):  # a nested one
        return enumerate(value.unbind())
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return zip(value._fields, value, strict=True)
    if isinstance(value, Set):
        return enumerate(sorted(value, key=_order) if len(value) > 1 else value)
    if isinstance(value, Sequence):
        return enumerate(value)
    if isinstance(value, Iterator):
        taken = list(islice(value, _LONGEST + 1))
        return enumerate(taken) if len(taken) <= _LONGEST else None
    leaves = pytree.tree_leaves(value, is_leaf=lambda node: node is not value)
    if len(leaves) != 1 or leaves[0] is not value:  # a container registered with PyTorch
        return enumerate(leaves)
    if callable(value) and not is_dataclass(value):
        return None  # a function computes what its variables do not tell
    names = [field.name for field in fields(value)] if is_dataclass(value) else []
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    names += getattr(value, "__dict__", ())
    held = [name for name in dict.fromkeys(names) if name not in ("__dict__", "__weakref__") and hasattr(value, name)]
    return [(name, getattr(value, name)) for name in held] or None


def _order(member: Any) -> tuple[Any, ...]:
    """An order of a set's members that parent and child share: by kind, shape and size."""
    if isinstance(member, Tensor):
        return "Tensor", (*member.shape,), float(member.double().sum()) if member.numel() else 0.0
    return type(member).__name__, (), repr(member)
