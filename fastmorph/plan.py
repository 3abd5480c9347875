"""Plans: morphs as data, in TOML and out; nothing in a file is ever evaluated."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastmorph.deepen import Deepen
from fastmorph.errors import MorphError

_OPERATORS = {"deepen": Deepen}
_NAMES = {operator: name for name, operator in _OPERATORS.items()}


@dataclass(frozen=True)
class Plan:
    """Morphs in the order in which they are applied."""

    operators: tuple[Deepen, ...]

    def __init__(self, operators: Sequence[Deepen]) -> None:
        for operator in operators:
            if type(operator) not in _NAMES:
                raise MorphError(f"{operator!r} is not a morph; a plan holds {', '.join(o.__name__ for o in _NAMES)}.")
        object.__setattr__(self, "operators", tuple(operators))

    def __iter__(self) -> Iterator[Deepen]:
        return iter(self.operators)

    def __len__(self) -> int:
        return len(self.operators)

    def to_toml(self) -> str:
        """One [[morph]] table an operator; what is left at None is left out.

        Raises MorphError for an activation that is not given by name.
        """
        tables = []
        for operator in self.operators:
            lines = ["[[morph]]", f'operator = "{_NAMES[type(operator)]}"']
            for field in fields(operator):
                value = getattr(operator, field.name)
                if value is not None:
                    lines.append(f"{field.name} = {_toml(value, operator, field.name)}")
            tables.append("\n".join(lines) + "\n")
        return "\n".join(tables)

    def save(self, path: str | Path) -> None:
        """Write the plan as TOML."""
        Path(path).write_text(self.to_toml(), encoding="utf-8")

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Read what `to_toml` writes. Raises MorphError for an unknown operator or argument, with the known ones."""
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise MorphError(f"the plan is not valid TOML: {error}.") from None
        if set(tables) - {"morph"} or not all(isinstance(entry, dict) for entry in tables.get("morph", [])):
            raise MorphError(f"a plan holds [[morph]] tables only; got {sorted(tables)}.")
        return cls([_operator(dict(entry)) for entry in tables.get("morph", [])])

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a TOML file."""
        return cls.from_toml(Path(path).read_text(encoding="utf-8"))


def _operator(entry: dict[str, Any]) -> Deepen:
    name = entry.pop("operator", None)
    if name not in _OPERATORS:
        raise MorphError(f"operator = {name!r} in the plan must be one of {sorted(_OPERATORS)}.")
    known = [field.name for field in fields(_OPERATORS[name])]
    unknown = sorted(set(entry) - set(known))
    if unknown or "layer" not in entry:
        raise MorphError(f"{name} in the plan takes {', '.join(known)} and needs layer; got {', '.join(entry) or 'nothing'}.")
    return _OPERATORS[name](**{key: _frozen(value) for key, value in entry.items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _toml(value: Any, operator: Deepen, name: str) -> str:
    """JSON's strings, integers and arrays are TOML's."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        raise MorphError(
            f"{name}={value!r} of layer {operator.layer!r} cannot be written to a file: give the activation by its name."
        ) from None
