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
from fastmorph.inputs import Inputs
from fastmorph.plan.memory import check_memory
from fastmorph.plan.operators import check_operator
from fastmorph.plan.tables import operator_lines, read_operator
from fastmorph.plan.transaction import Operator

Recorded = tuple[tuple[int, ...], str] | tuple[tuple[int, ...], str, str]  # shape, dtype, and a keyword's name


@dataclass(frozen=True)
class Plan:
    """Morphs in the order in which they are applied.

    Attributes:
        operators: `Deepen`, `Widen`, `GrowKernel`, `InsertSubnet`, or of a class known to `register_operator`; given as a
            sequence, or a single one.
        seed: of all noise; None: drawn when the plan is run.
        inputs: (shape, dtype) of each positional argument of the model and (shape, dtype, name) of each keyword, for operators
            that follow channels through it; None: not known. The dtype is PyTorch's name, "float32".
        noise: version of the noise that a seed stands for; this fastmorph's own.

    Raises MorphError for anything else.
    """

    operators: tuple[Operator, ...]
    seed: int | None = None
    inputs: tuple[Recorded, ...] | None = None
    noise: int = VERSION

    def __init__(
        self,
        operators: Sequence[Operator] | Operator,
        seed: int | None = None,
        inputs: Sequence[Sequence[Any]] | None = None,
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
        recorded = tuple(_check_input(entry) for entry in inputs or ())
        if len({entry[2:] for entry in recorded if entry[2:]}) < sum(bool(entry[2:]) for entry in recorded):
            raise MorphError("two of the plan's inputs have one name; each keyword is recorded once.")
        object.__setattr__(self, "operators", operators)
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "noise", noise)
        object.__setattr__(self, "inputs", recorded or None)

    def __iter__(self) -> Iterator[Operator]:
        return iter(self.operators)

    def __len__(self) -> int:
        return len(self.operators)

    def __add__(self, other: Plan) -> Plan:
        """Both in a row, as one transaction: the architecture that both would give, with the inputs of the first that has some.

        The sum has a seed only where both have the same: what is drawn for two growths is not what is drawn for one.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        seed = self.seed if self.seed == other.seed else None
        return Plan(self.operators + other.operators, seed, self.inputs if self.inputs is not None else other.inputs)

    def recorded(self, operators: Sequence[Operator], seed: int | None, call: Inputs | None) -> Plan:
        """This plan as it was run: its operators with all sizes, the seed, and the shapes of a call where all are tensors."""
        inputs: Sequence[Sequence[Any]] | None = self.inputs
        tensors = call is not None and all(isinstance(value, Tensor) for value in (*call.args, *call.kwargs.values()))
        if call is not None and tensors and all(map(str.isidentifier, call.kwargs)):
            named = [*((value,) for value in call.args), *((value, name) for name, value in call.kwargs.items())]
            inputs = [(tuple(value.shape), str(value.dtype).removeprefix("torch."), *name) for value, *name in named]
        return Plan(operators, seed, inputs)

    def example_inputs(self, model: nn.Module) -> Inputs | None:
        """A call on zeros of the recorded shapes and dtypes, where the model is; None if none were recorded."""
        if self.inputs is None:
            return None
        device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
        call = Inputs((), {})
        for shape, dtype, *name in self.inputs:
            kind = getattr(torch, dtype)
            check_memory(f"the plan's input of shape {shape}", math.prod(shape) * kind.itemsize, device)
            value = torch.zeros(shape, dtype=kind, device=device)
            call = Inputs(call.args, {**call.kwargs, name[0]: value}) if name else Inputs((*call.args, value), call.kwargs)
        return call

    # --- TOML -----------------------------------------------------------------------------------------------------------------

    def to_toml(self) -> str:
        """`seed` and `noise`, an [[inputs]] table an input and a [[morph]] table an operator; what is None is left out.

        Raises MorphError for what no file can hold: an activation that is not given by name, an infinity.
        """
        lines = [] if self.seed is None else [f"seed = {self.seed}", f"noise = {self.noise}", ""]
        for shape, dtype, *name in self.inputs or ():
            lines += ["[[inputs]]", f"shape = {list(shape)}", f'dtype = "{dtype}"', *(f'name = "{text}"' for text in name), ""]
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
            if not {"shape", "dtype"} <= set(entry) <= {"shape", "dtype", "name"} or not isinstance(entry["shape"], list):
                raise MorphError(
                    f"an [[inputs]] table of a plan has a shape and a dtype, and a name for a keyword; got {entry}."
                )
        keys = ("shape", "dtype", "name")
        shapes = [tuple(entry[key] for key in keys if key in entry) for entry in inputs] if "inputs" in tables else None
        return cls([read_operator(entry) for entry in morphs], tables.get("seed"), shapes, tables.get("noise", VERSION))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a TOML file. Raises MorphError as `from_toml` does, and OSError."""
        try:
            return cls.from_toml(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise MorphError(f"{path} is not a plan: it is not UTF-8 text.") from None


def _check_input(entry: Sequence[Any]) -> Recorded:
    """A recorded input, frozen. Raises MorphError for what is none."""
    match entry:
        case (list() | tuple() as shape, str() as dtype, *name) if all(type(size) is int and size >= 0 for size in shape):
            named = not name or (len(name) == 1 and isinstance(name[0], str) and name[0].isidentifier())
            if named and isinstance(getattr(torch, dtype, None), torch.dtype):
                return (tuple(shape), dtype, *name)
    raise MorphError(
        f"{entry!r} in the plan's inputs is no shape and dtype, such as ([8, 3], 'float32'), with a keyword's name."
    )
