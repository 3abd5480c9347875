"""Operators for many layers at once: names with wildcards, and widths as factors of what a layer has.

    fm.Widen("layer1.*.conv1", "x1.5")

A `*` stands for anything inside one part of a dotted name, `?` for one character, `[...]` for one of those, and `**` for any
number of parts. "x1.5" is 1.5 times the layer's own output channels, rounded to an integer. Both are decided when the operator
has its turn; a history holds what they came to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

from torch import nn

from fastmorph.errors import MorphError
from fastmorph.plan.layer_types import find_rule

T = TypeVar("T")

_FACTOR = re.compile(r"x(\d+(?:\.\d+)?)")
_SCALED = ("channels", "hidden_channels")


def has_pattern(operator: Any) -> bool:
    """Whether an operator's name may stand for several."""
    return isinstance(operator.target, str) and bool(set(operator.target) & set("*?["))


def has_factor(operator: Any) -> bool:
    """Whether one of its numbers is a factor."""
    return any(isinstance(getattr(operator, key, None), str) for key in _SCALED)


def expanded(operator: T, model: nn.Module) -> list[T]:
    """An operator for each layer that it names, with numbers for its factors; itself, where it has neither.

    Raises MorphError for a pattern that no layer matches, and for a factor of a module that makes no channels, or below 1.
    """
    target: object = operator.target  # type: ignore[attr-defined]
    return [_scaled(one, one.target, model) for one in named(operator, model)] if isinstance(target, str) else [operator]  # type: ignore[attr-defined]


def named(operator: T, model: nn.Module) -> list[T]:
    """The same, with factors as they are."""
    if not has_pattern(operator):
        return [operator]
    target: str = operator.target  # type: ignore[attr-defined]
    names = list(_matching(target, model))
    if not names:
        raise MorphError(
            f"no layer's name matches {target!r}; * stands for one part of a name, ** for any number of them (see "
            "model.named_modules())."
        )
    if getattr(type(operator), "from_last", False):  # what comes behind gets another name
        names.reverse()
    keys = [field.name for field in fields(cast(Any, operator)) if getattr(operator, field.name) is target]
    return [replace(cast(Any, operator), **{keys[0]: name}) for name in names]


def may_match_inside(pattern: str, module: str) -> bool:
    """Whether some name inside of a module could match."""

    def meet(parts: list[str], names: list[str]) -> bool:
        if not parts or not names:
            return bool(parts)
        if parts[0] == "**":
            return meet(parts[1:], names) or meet(parts, names[1:])
        return re.fullmatch(_expression(parts[0]), f"{names[0]}.") is not None and meet(parts[1:], names[1:])

    return meet(pattern.split("."), module.split(".") if module else [])


def _matching(pattern: str, model: nn.Module) -> Iterator[str]:
    """The names of the layers that can be morphed, in the order of the model; of other modules where it matches no layer."""
    parts = (r"(?:[^.]+\.)*" if part == "**" else _expression(part) for part in pattern.split("."))
    whole = re.compile("".join(parts))
    found = [(name, module) for name, module in model.named_modules() if whole.fullmatch(f"{name}.")]
    layers = [name for name, module in found if find_rule(module)[0] is not None]
    yield from layers or [name for name, _ in found]


def _expression(part: str) -> str:
    """A regular expression for one part of a name and the dot behind it."""
    words = {"*": "[^.]*", "?": "[^.]"}
    tokens = re.split(r"(\*|\?|\[[^\]]+\])", part)
    sets = (token.replace("[!", "[^", 1) if token[:1] == "[" and token[-1:] == "]" else re.escape(token) for token in tokens)
    return "".join(words.get(token, other) for token, other in zip(tokens, sets, strict=True)) + r"\."


def _scaled(operator: T, name: str, model: nn.Module) -> T:
    changes = {}
    for key in _SCALED:
        text = getattr(operator, key, None)
        if isinstance(text, str):
            match = _FACTOR.fullmatch(text)
            factor = float(match[1]) if match else math.nan
            if not 1 <= factor < math.inf:
                raise MorphError(f"layer {name!r}: {key}={text!r} is neither a number nor a factor from x1 on, such as 'x1.5'.")
            changes[key] = round(factor * _channels(name, model))
    return cast(T, replace(cast(Any, operator), **changes)) if changes else operator


def _channels(name: str, model: nn.Module) -> int:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise MorphError(f"the model has no layer {name!r} (see model.named_modules()).") from None
    for key in ("out_channels", "out_features", "embedding_dim"):
        if isinstance(getattr(module, key, None), int):
            return cast(int, getattr(module, key))
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim < 2:
        raise MorphError(f"layer {name!r} is a {type(module).__name__}, of no number of channels; give a number for a factor.")
    return int(weight.shape[0])
