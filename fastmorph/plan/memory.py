"""What a morph may ask for: sizes that no memory here could hold are refused before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastmorph.equation import problem

_CHANNELS, _KERNELS = ("channels", "hidden_channels"), ("kernel_size", "kernel_sizes")
_CHANNEL_BYTES = 64  # a new channel takes more than this with its indices, its noise and the weights that read it


def check_memory(what: str, size: int, device: torch.device | None) -> None:
    """Refuse what takes more bytes than there are on a device (or for None and the meta device, on the CPU).

    Raises MorphError that says how much it would take.
    """
    problem.check_memory(what, size, device, "give smaller sizes")


def check_sizes(operator: object, name: str, module: nn.Module | None) -> None:
    """Refuse an operator whose channels and kernel sizes alone tell that what it makes fits into no memory.

    The operator and its parts each make at least one tensor of so many channels and taps, times the smaller number of channels
    of the operator's own layer, where that is known, and keep some numbers about each new channel.

    Raises MorphError with the layer and the bytes.
    """
    found = None if module is None else module._parameters.get("weight")
    weight = found if found is not None and not is_lazy(found) and found.ndim > 1 else torch.empty(1, 1, device="meta")
    shape = tuple(weight.shape)
    smaller = max(1, min(shape[:2]) // int(getattr(module, "groups", 1)))
    for part in _parts(operator):
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        channels = [values[key] for key in _CHANNELS if isinstance(values.get(key), int)]
        taps = [_taps(values[key], len(shape) - 2) for key in _KERNELS if key in values]
        count = max([1, *channels])
        weights = count * max([1, *taps]) * (smaller if part is operator else 1) * weight.itemsize
        check_memory(f"layer {name!r}: {part!r}", max(weights, count * _CHANNEL_BYTES), weight.device)


def _parts(value: Any) -> Iterator[Any]:
    """A dataclass, and those inside."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _parts(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in fields(value):
            yield from _parts(getattr(value, field.name))


def _taps(size: Any, dims: int) -> int:
    """Taps of a kernel, the largest where there are several; 1 for what is no size, which others refuse."""
    if isinstance(size, tuple | list):
        if len(size) == dims and all(isinstance(number, int) for number in size):
            return prod(size)
        return max((_taps(item, dims) for item in size), default=1)
    return size**dims if isinstance(size, int) and size > 0 else 1
