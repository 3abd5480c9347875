"""Operators as TOML tables, and back: fields by name, parts as tables with their kind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from typing import Any

from fastmorph.errors import MorphError
from fastmorph.plan.operators import OPERATORS, PARTS, Names
from fastmorph.plan.transaction import Operator

_PLAIN = "layer"  # the kind of a table that names none


def read_operator(table: Mapping[str, Any]) -> Operator:
    """The operator of a [[morph]] table. Raises MorphError for an unknown name or field, with the known ones."""
    made: Operator = _make(OPERATORS, table, remedy="; import the module that registers it, on the command line by --import")
    return made


def operator_lines(operator: Operator) -> Iterator[str]:
    """The lines of an operator's [[morph]] table. Raises MorphError for a field that no file can hold."""
    yield "[[morph]]"
    yield f"operator = {_text(OPERATORS.name_of(type(operator)))}"
    yield from _lines("morph", operator, operator.target)


def _make(names: Names, table: Mapping[str, Any], default: str | None = None, remedy: str = "") -> Any:
    """The frozen dataclass that a table says."""
    key = names.key
    name = table.get(key, default)
    cls = names.classes.get(name) if isinstance(name, str) else None
    if cls is None:
        raise MorphError(f"{key} = {name!r} in the plan must be one of {sorted(names.classes)}{remedy}.")
    known, given = signature(cls).parameters, {field: value for field, value in table.items() if field != key}
    needs = [field for field, parameter in known.items() if parameter.default is Parameter.empty]
    if set(given) - set(known) or set(needs) - set(given):
        needed = f" and needs {', '.join(needs)}" if needs else ""
        raise MorphError(
            f"{name} in the plan takes {', '.join(known) or 'nothing'}{needed}; got {', '.join(given) or 'nothing'}."
        )
    try:
        return cls(**{field: _read(value) for field, value in given.items()})
    except TypeError as error:
        raise MorphError(f"{name} in the plan: {error}.") from None


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_read, value))
    return _make(PARTS, value, default=_PLAIN) if isinstance(value, dict) else value


def _lines(path: str, part: Any, target: str) -> Iterator[str]:
    """The lines of a dataclass's fields, its parts last, as tables; what is None is left out."""
    nested = {}
    for key, value in ((field.name, getattr(part, field.name)) for field in fields(part)):
        parts = value if isinstance(value, tuple | list) and value else [value]
        if all(PARTS.name_of(type(item)) for item in parts):
            nested[f"[{path}.{key}]" if parts is not value else f"[[{path}.{key}]]"] = f"{path}.{key}", parts
        elif value is not None:
            try:
                yield f"{key} = {_text(value)}"
            except (TypeError, ValueError):
                raise MorphError(
                    f"{key}={value!r} of layer {target!r} cannot be written to a file: {_remedy(value)}."
                ) from None
    for header, (inside, parts) in nested.items():
        for item in parts:
            kind = PARTS.name_of(type(item))
            yield header
            yield from [] if kind == _PLAIN else [f"kind = {_text(kind)}"]
            yield from _lines(inside, item, target)


def _text(value: Any) -> str:
    """A value in TOML: JSON's texts and numbers are, but for DEL, infinities and NaN."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    if not isinstance(value, str | int | float):
        raise TypeError
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def _remedy(value: Any) -> str:
    if is_dataclass(value):
        return f"register its class, by fastmorph.register_part({type(value).__name__}, name=...)"
    return "give the activation by its name" if callable(value) else "use finite numbers, texts and parts that are registered"
