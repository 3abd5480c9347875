"""Plans: morphs as data, in TOML and out; nothing in a file is ever evaluated."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.equation.randomness import VERSION
from fastmorph.errors import MorphError
from fastmorph.morphs.deepen import Deepen
from fastmorph.morphs.grow_kernel import GrowKernel
from fastmorph.morphs.insert_subnet import InsertSubnet
from fastmorph.morphs.subnet import LayerSpec, Residual, Sequential, Skip, Stacked
from fastmorph.morphs.widen import Widen
from fastmorph.plan.transaction import Operator

_OPERATORS: dict[str, Any] = {"deepen": Deepen, "widen": Widen, "grow_kernel": GrowKernel, "insert_subnet": InsertSubnet}
_NAMES = {operator: name for name, operator in _OPERATORS.items()}
# What a table inside an operator's is: by the key "kind", or a layer where it has none.
_KINDS: dict[str, Any] = {"sequential": Sequential, "stacked": Stacked, "skip": Skip, "residual": Residual}
Inputs = tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Plan:
    """Morphs in the order in which they are applied.

    Attributes:
        operators: `Deepen`, `Widen`, `GrowKernel`, `InsertSubnet`.
        seed: of all noise; None: drawn when the plan is run.
        inputs: (shape, dtype) of each positional argument of the model, for operators that follow channels through it; None:
            not known. The dtype is PyTorch's name, "float32".
        noise: version of the noise that a seed stands for; this fastmorph's own.

    Raises MorphError for anything else.
    """

    operators: tuple[Operator, ...]
    seed: int | None = None
    inputs: Inputs | None = None
    noise: int = VERSION

    def __init__(
        self,
        operators: Sequence[Operator],
        seed: int | None = None,
        inputs: Sequence[tuple[Sequence[int], str]] | None = None,
        noise: int = VERSION,
    ) -> None:
        for operator in operators:
            if type(operator) not in _NAMES:
                raise MorphError(f"{operator!r} is not a morph; a plan holds {', '.join(o.__name__ for o in _NAMES)}.")
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            raise MorphError(f"seed={seed!r} of a plan must be an integer from 0 to 2**63 - 1.")
        if type(noise) is not int or noise != VERSION:
            raise MorphError(
                f"noise={noise!r} of a plan: its seed stands for noise of another version than this fastmorph's, which is "
                f"{VERSION}, and would give another child; run it with the fastmorph that recorded it, or leave noise out to "
                "have another child."
            )
        for shape, dtype in inputs or ():
            sizes = all(type(size) is int and size >= 0 for size in shape)
            if not sizes or not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise MorphError(f"{(shape, dtype)!r} in the plan's inputs is no shape and dtype, such as ([8, 3], 'float32').")
        object.__setattr__(self, "operators", tuple(operators))
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "noise", noise)
        object.__setattr__(self, "inputs", tuple((tuple(shape), dtype) for shape, dtype in inputs or ()) or None)

    def __iter__(self) -> Iterator[Operator]:
        return iter(self.operators)

    def __len__(self) -> int:
        return len(self.operators)

    def recorded(self, seed: int, inputs: tuple[Any, ...] | None) -> Plan:
        """This plan as it was run: with the seed, and the shapes of the inputs where all of them are tensors."""
        shapes = self.inputs
        if inputs is not None and all(isinstance(value, Tensor) for value in inputs):
            shapes = tuple((tuple(value.shape), str(value.dtype).removeprefix("torch.")) for value in inputs)
        return Plan(self.operators, seed, shapes)

    def example_inputs(self, model: nn.Module) -> tuple[Tensor, ...] | None:
        """Zeros of the recorded shapes and dtypes, where the model is; None if none were recorded."""
        device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
        made = (torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for shape, dtype in self.inputs or ())
        return None if self.inputs is None else tuple(made)

    # --- TOML -----------------------------------------------------------------------------------------------------------------

    def to_toml(self) -> str:
        """`seed` and `noise`, an [[inputs]] table an input and a [[morph]] table an operator; what is None is left out.

        Raises MorphError for an activation that is not given by name.
        """
        lines = [] if self.seed is None else [f"seed = {self.seed}", f"noise = {self.noise}", ""]
        for shape, dtype in self.inputs or ():
            lines += ["[[inputs]]", f"shape = {list(shape)}", f'dtype = "{dtype}"', ""]
        for operator in self.operators:
            lines += [
                "[[morph]]",
                f'operator = "{_NAMES[type(operator)]}"',
                *_lines("morph", _data(operator), operator.layer),
                "",
            ]
        return "\n".join(lines)

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
        arrays = [tables.get(name, []) for name in ("morph", "inputs")]
        if set(tables) - {"morph", "inputs", "seed", "noise"} or not all(
            isinstance(array, list) and all(isinstance(entry, dict) for entry in array) for array in arrays
        ):
            raise MorphError(
                f"a plan holds [[morph]] tables only, with seed, noise and [[inputs]] tables; got {sorted(tables)}."
            )
        morphs, inputs = arrays
        for entry in inputs:
            if set(entry) != {"shape", "dtype"} or not isinstance(entry["shape"], list):
                raise MorphError(f"an [[inputs]] table of a plan has a shape and a dtype; got {entry}.")
        shapes = [(tuple(entry["shape"]), entry["dtype"]) for entry in inputs] if "inputs" in tables else None
        return cls([_operator(entry) for entry in morphs], tables.get("seed"), shapes, tables.get("noise", VERSION))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a TOML file."""
        return cls.from_toml(Path(path).read_text(encoding="utf-8"))


def _operator(entry: dict[str, Any]) -> Operator:
    name, rest = entry.get("operator"), {key: value for key, value in entry.items() if key != "operator"}
    if name not in _OPERATORS:
        raise MorphError(f"operator = {name!r} in the plan must be one of {sorted(_OPERATORS)}.")
    made: Operator = _made(_OPERATORS[name], name, rest)
    return made


def _made(kind: Any, name: str, entry: Mapping[str, Any]) -> Any:
    """A frozen dataclass from a table."""
    known = [field.name for field in fields(kind)]
    needed = "layer" if "layer" in known else ""
    if set(entry) - set(known) or (needed and needed not in entry):
        raise MorphError(
            f"{name} in the plan takes {', '.join(known) or 'nothing'}{needed and f' and needs {needed}'}; "
            f"got {', '.join(entry) or 'nothing'}."
        )
    try:
        return kind(**{key: _value(value) for key, value in entry.items()})
    except TypeError as error:
        raise MorphError(f"{name} in the plan: {error}.") from None


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_value, value))
    if not isinstance(value, dict):
        return value
    if "kind" not in value:
        return _made(LayerSpec, "a layer", {"channels": None, **value})
    rest = {key: item for key, item in value.items() if key != "kind"}
    if value["kind"] not in _KINDS:
        raise MorphError(f"kind = {value['kind']!r} in the plan must be one of {sorted(_KINDS)}.")
    return _made(_KINDS[value["kind"]], value["kind"], rest)


def _data(value: Any) -> Any:
    """Frozen dataclasses as tables, without what is None."""
    if is_dataclass(value):
        table = {field.name: _data(getattr(value, field.name)) for field in fields(value)}
        kind = next((name for name, known in _KINDS.items() if known is type(value)), None)
        return {**({"kind": kind} if kind else {}), **{key: item for key, item in table.items() if item is not None}}
    return [_data(item) for item in value] if isinstance(value, tuple | list) else value


def _lines(path: str, table: Mapping[str, Any], layer: str) -> Iterator[str]:
    """The lines of a table, its tables last; JSON's strings, integers and arrays are TOML's."""
    nested = {}
    for key, value in table.items():
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            nested[key] = value
            continue
        try:
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}"
        except TypeError:
            raise MorphError(
                f"{key}={value!r} of layer {layer!r} cannot be written to a file: give the activation by its name."
            ) from None
    for key, value in nested.items():
        for entry in value if isinstance(value, list) else [value]:
            yield f"[[{path}.{key}]]" if isinstance(value, list) else f"[{path}.{key}]"
            yield from _lines(f"{path}.{key}", entry, layer)
