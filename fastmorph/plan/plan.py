"""Plans: morphs as data, in TOML and out; nothing in a file is ever evaluated."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.equation.randomness import VERSION
from fastmorph.errors import MorphError
from fastmorph.plan.memory import check_memory
from fastmorph.plan.operators import check_operator
from fastmorph.plan.tables import operator_lines, read_operator
from fastmorph.plan.transaction import Operator

Inputs = tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Plan:
    """Morphs in the order in which they are applied.

    Attributes:
        operators: `Deepen`, `Widen`, `GrowKernel`, `InsertSubnet`, or of a class known to `register_operator`; given as a
            sequence, or a single one.
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
        operators: Sequence[Operator] | Operator,
        seed: int | None = None,
        inputs: Sequence[tuple[Sequence[int], str]] | None = None,
        noise: int = VERSION,
    ) -> None:
        operators = tuple(operators) if isinstance(operators, Iterable) and not isinstance(operators, str) else (operators,)
        for operator in operators:
            check_operator(operator)
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
        object.__setattr__(self, "operators", operators)
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "noise", noise)
        object.__setattr__(self, "inputs", tuple((tuple(shape), dtype) for shape, dtype in inputs or ()) or None)

    def __iter__(self) -> Iterator[Operator]:
        return iter(self.operators)

    def __len__(self) -> int:
        return len(self.operators)

    def recorded(self, operators: Sequence[Operator], seed: int, inputs: tuple[Any, ...] | None) -> Plan:
        """This plan as it was run: its operators with all sizes, the seed, and shapes of inputs where all are tensors."""
        shapes = self.inputs
        if inputs is not None and all(isinstance(value, Tensor) for value in inputs):
            shapes = tuple((tuple(value.shape), str(value.dtype).removeprefix("torch.")) for value in inputs)
        return Plan(operators, seed, shapes)

    def example_inputs(self, model: nn.Module) -> tuple[Tensor, ...] | None:
        """Zeros of the recorded shapes and dtypes, where the model is; None if none were recorded."""
        device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
        if self.inputs is None:
            return None
        for shape, dtype in self.inputs:
            check_memory(f"the plan's input of shape {shape}", math.prod(shape) * getattr(torch, dtype).itemsize, device)
        return tuple(torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for shape, dtype in self.inputs)

    # --- TOML -----------------------------------------------------------------------------------------------------------------

    def to_toml(self) -> str:
        """`seed` and `noise`, an [[inputs]] table an input and a [[morph]] table an operator; what is None is left out.

        Raises MorphError for what no file can hold: an activation that is not given by name, an infinity.
        """
        lines = [] if self.seed is None else [f"seed = {self.seed}", f"noise = {self.noise}", ""]
        for shape, dtype in self.inputs or ():
            lines += ["[[inputs]]", f"shape = {list(shape)}", f'dtype = "{dtype}"', ""]
        for operator in self.operators:
            lines += [*operator_lines(operator), ""]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the plan as TOML."""
        Path(path).write_text(self.to_toml(), encoding="utf-8")

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Read what `to_toml` writes. Raises MorphError for an unknown operator or argument, with the known ones."""
        try:
            tables = tomllib.loads(text)
        except ValueError as error:  # of the syntax, or a number of thousands of digits
            raise MorphError(f"the plan is not valid TOML: {error}.") from None
        except RecursionError:
            raise MorphError("the plan is not valid TOML: its brackets are nested too deep.") from None
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
        return cls([read_operator(entry) for entry in morphs], tables.get("seed"), shapes, tables.get("noise", VERSION))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a TOML file. Raises MorphError as `from_toml` does, and OSError."""
        try:
            return cls.from_toml(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise MorphError(f"{path} is not a plan: it is not UTF-8 text.") from None
