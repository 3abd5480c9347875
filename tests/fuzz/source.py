"""A network in the making: the lines of a module's constructor and of its forward, each run as soon as it is written.

So a piece of the grammar sees the shapes that it builds on, and what PyTorch refuses is taken back. What is drawn depends on
the seed and on the number of the piece alone: leaving one piece out leaves the others, and their names, as they are.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import utils
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

BATCH, SIZE = 2, 7  # while a network is written

# How inputs are given: one by one, by keywords alone, or in one bag; with what unpacks an input x from it.
FORMS = {
    **{"positional": "", "keywords": "", "dict": "inputs.get({!r})", "nested": "inputs['data'][0].get({!r})"},
    "named": "inputs._asdict()[{!r}]",
}


@dataclass
class Record:
    logits: Any
    hidden: Any


class Plain:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Any) -> None:
        self.logits = logits


Named = namedtuple("Named", "logits hidden")
Batch = namedtuple("Batch", "x y", defaults=[None])


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook that changes what its module says."""
    return 2 * output


NAMES = {
    **{"torch": torch, "nn": nn, "F": F, "math": math, "UserDict": UserDict},
    **{"weight_norm": weight_norm, "spectral_norm": spectral_norm, "utils": utils},
    **{"Record": Record, "Plain": Plain, "Slots": Slots, "Named": Named, "doubled": doubled},
}


@dataclass(frozen=True)
class Input:
    """An argument: its shape, in which "batch" and "size" stand for any number; integers below `high` if that is given."""

    shape: tuple[int | str, ...]
    high: int = 0
    optional: bool = False

    def make(self, generator: torch.Generator, batch: int, size: int, dtype: torch.dtype) -> Tensor:
        shape = [{"batch": batch, "size": size}.get(n, n) for n in self.shape]
        if self.high:
            return torch.randint(self.high, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def race(seed: str, weights: dict[str, float]) -> str:
    """One of the names, as likely as its weight; if another name is taken away the choice stays the same."""
    return min(weights, key=lambda name: -math.log(1 - random.Random(f"{seed}.{name}").random()) / weights[name])


@dataclass
class Source:
    """The lines so far.

    Attributes:
        kind: of `h`: "map" (batch, channels, *sizes), "tokens" (batch, positions, channels) or "vector" (batch, channels).
        form: how the network takes its inputs, one of `FORMS`.
        mode: "eval", "train", or "mixed": one of its modules is not in train mode.
        dtype: of its parameters.
        grain: the coarsest arithmetic that the network uses, whatever its parameters are.
        slot: number of the piece that is being written.
    """

    seed: int
    kind: str = ""
    form: str = "positional"
    mode: str = "eval"
    dtype: torch.dtype = torch.float64
    grain: torch.dtype = torch.float64
    slot: int = 0
    inputs: dict[str, Input] = field(default_factory=dict)
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=lambda: {"self": nn.Module()})
    random: random.Random = field(default_factory=random.Random)
    made: int = 0

    # --- what pieces draw -----------------------------------------------------------------------------------------------------

    def int(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def divisor(self, number: int) -> int:
        return self.pick(*(n for n in range(1, number + 1) if number % n == 0))

    # --- what they see --------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values["h"].shape)

    @property
    def axis(self) -> int:
        return 2 if self.kind == "tokens" else 1

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def dims(self) -> int:
        return len(self.shape) - 2 if self.kind == "map" else 0

    # --- what they write ------------------------------------------------------------------------------------------------------

    def input(self, name: str, *shape: int | str, high: int = 0, optional: bool = False) -> None:
        self.inputs[name] = Input(shape, high, optional)
        self.values[name] = self.inputs[name].make(torch.Generator().manual_seed(0), BATCH, SIZE, torch.float64)

    def write(self, line: str) -> None:
        """A line of the constructor."""
        exec(line, NAMES, self.values)
        model = self.values["self"]
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.float32:
                tensor.data = tensor.data.double()
        self.init.append(line)

    def make(self, name: str, code: str) -> str:
        """A member of the network; returns the expression for it."""
        name = f"{name}{self.slot}{'abcdefgh'[self.made] if self.made else ''}"
        self.made += 1
        self.write(f"self.{name} = {code}")
        return f"self.{name}"

    def parameter(self, name: str, *shape: int) -> str:
        return self.make(name, f"nn.Parameter(torch.ones{shape if len(shape) != 1 else f'({shape[0]})'})")

    def layer_code(self, channels: int, size: Any = None, bias: bool | None = None, inputs: int | None = None) -> str:
        """What makes a layer for `h` that keeps its map's size."""
        size = size or self.pick(1, 3, 3)
        rest = "" if (self.chance(0.7) if bias is None else bias) else ", bias=False"
        inputs = inputs or self.channels
        if not self.dims:
            return f"nn.Linear({inputs}, {channels}{rest})"
        padding = f", padding={size // 2}" if size > 1 else ""
        return f"nn.Conv{self.dims}d({inputs}, {channels}, {size}{padding}{rest})"

    def layer(self, *sizes: int, **options: Any) -> str:
        """Such a layer as a member."""
        return self.make("layer", self.layer_code(*sizes, **options))

    def let(self, line: str) -> None:
        """A line of the forward."""
        exec(line, NAMES, self.values)
        self.body.append(line)

    def step(self, code: str, kind: str = "") -> None:
        """A new `h`."""
        self.let(f"h = {code}")
        self.kind = kind or self.kind
        wanted = {"map": (3, 4, 5), "tokens": (3,), "vector": (2,)}[self.kind]
        if self.values["h"].ndim not in wanted or not 0 < self.values["h"].numel() <= 6000 or self.channels > 24:
            raise ValueError("too large, or not what it should be")

    def attempt(self, slot: int, name: str, piece: Callable[[Source], None]) -> bool:
        """Write a piece; where PyTorch refuses it, nothing is written."""
        self.slot, self.made, self.random = slot, 0, random.Random(f"{self.seed}.{slot}.{name}")
        kept = (list(self.init), list(self.body), dict(self.values), dict(self.inputs), self.kind, self.form, self.grain)
        members = [dict(table) for table in self._members()]
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                piece(self)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError):
            self.init, self.body, self.values, self.inputs, self.kind, self.form, self.grain = kept
            for table, old in zip(self._members(), members, strict=True):
                table.clear()
                table.update(old)
            return False
        self.pieces.append(name)
        return True

    def _members(self) -> Iterable[dict[str, Any]]:
        model = self.values["self"]
        return model._modules, model._parameters, model._buffers

    def text(self) -> str:
        """The module's source."""
        names = [f"{name}=None" if i.optional else name for name, i in self.inputs.items()]
        arguments = {"positional": names, "keywords": ["*", *names]}.get(self.form, ["inputs"])
        unpacked = [f"{name} = {FORMS[self.form].format(name)}" for name in self.inputs if FORMS[self.form]]
        return "\n".join(
            [
                "class Net(nn.Module):",
                "    def __init__(self):",
                *(f"        {line}" for line in ["super().__init__()", *self.init]),
                f"    def forward(self, {', '.join(arguments)}):",
                *(f"        {line}" for line in [*unpacked, *self.body]),
            ]
        )
