"""Python values as JSON, with their tensors beside them, and back: nothing is pickled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

from fastmorph.errors import MorphError

# A table with one of these keys is not a dict as it stands, but stands for another kind of value.
_TENSOR, _TUPLE, _PAIRS, _COUNTER, _FLOAT = "$tensor", "$tuple", "$pairs", "$counter", "$float"


def encode(value: Any, name: str, tensors: MutableMapping[str, Tensor], near: Tensor | None = None) -> Any:
    """A value as plain data for JSON; each tensor in it goes to `tensors`, under a name that begins with `name`.

    Args:
        value: None, a number, a text, a tensor, or a list, tuple, dict or Counter of such.
        name: by which errors call it.
        tensors: to add to.
        near: a tensor that will be there when it is decoded; those on its device will be put there again.

    Raises MorphError, with the name, for anything else.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {_FLOAT: repr(value)}
        case Tensor():
            tensors[name] = value.detach()
            return {_TENSOR: name, "near": near is not None and value.device == near.device}
        case list():
            return [encode(part, f"{name}.{index}", tensors, near) for index, part in enumerate(value)]
        case tuple():
            return {_TUPLE: encode(list(value), name, tensors, near)}
        case Mapping():
            parts = {key: encode(part, f"{name}.{key}", tensors, near) for key, part in value.items()}
            if type(value) is not Counter and all(isinstance(key, str) and not key.startswith("$") for key in parts):
                return parts
            pairs = [[encode(key, name, tensors), part] for key, part in parts.items()]
            return {_COUNTER if isinstance(value, Counter) else _PAIRS: pairs}
    raise MorphError(f"{name.lstrip('.')} is a {type(value).__name__}, which a file without pickles cannot hold.")


def decode(data: Any, tensors: Mapping[str, Tensor], near: Tensor | None = None) -> Any:
    """The value that `encode` was given."""
    match data:
        case list():
            return [decode(part, tensors, near) for part in data]
        case {"$tensor": name, "near": here}:
            return tensors[name].to(near.device) if here and near is not None else tensors[name]
        case {"$tuple": parts}:
            return tuple(decode(parts, tensors, near))
        case {"$float": text}:
            return float(text)
        case {"$counter": pairs}:
            return Counter({decode(key, tensors): decode(part, tensors, near) for key, part in pairs})
        case {"$pairs": pairs}:
            return {decode(key, tensors): decode(part, tensors, near) for key, part in pairs}
        case dict():
            return {key: decode(part, tensors, near) for key, part in data.items()}
    return data
