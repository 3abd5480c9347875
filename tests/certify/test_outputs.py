"""Outputs are walked as far as Python objects go, and what cannot be walked fails by name."""

from __future__ import annotations

import threading
from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pairs import Apply, X, returning
from torch import Tensor

from fastmorph.certify.verify import verify
from fastmorph.outputs import flatten


class Held:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.name = logits, "held"


class Slotted:
    __slots__ = ("empty", "logits")

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Both(Slotted):
    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits * 0)
        self.hidden = logits


@dataclass
class Plain:
    logits: Tensor
    rest: list[Tensor] = field(default_factory=list)

    def __call__(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Frozen:
    logits: Tensor


class Named(NamedTuple):
    logits: Tensor


class Cyclic:
    def __init__(self, logits: Tensor) -> None:
        self.inner = [self, {"of": self}, logits]


def in_a_cycle(y: Tensor) -> list[Any]:
    found: list[Any] = [y]
    found.append(found)
    return found


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "object": Held,
    "slots": Slotted,
    "slots and variables": Both,
    "dataclass": Plain,
    "frozen dataclass": Frozen,
    "named tuple": Named,
    "object in a tuple": lambda y: (y * 0, Held(y)),
    "user dict": lambda y: UserDict(logits=y),
    "deque": lambda y: deque([y]),
    "generator": lambda y: (part for part in y),
    "iterator in a dict": lambda y: {"parts": iter([y, y])},
    "map": lambda y: map(torch.neg, [y]),
    "set": lambda y: {y[0], y[:, 0], "word", 3},
    "numpy": lambda y: y.numpy(),
    "nested tensor": lambda y: torch.nested.nested_tensor([y, y[:1]]),
    "sparse": lambda y: y.to_sparse(),
    "object with a cycle": Cyclic,
    "list in itself": in_a_cycle,
    "distribution": lambda y: torch.distributions.Normal(y, 1.0),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_walked_and_a_difference_inside_fails(name: str) -> None:
    def model(error: float) -> Apply:
        return Apply(lambda x: CONTAINERS[name](x + error))

    certificate = verify(model(0.0), model(0.0), X)
    assert certificate, certificate
    assert any(row.max_rel == 0 and not row.unchecked for row in certificate.rows)
    assert not any(row.problem or row.unchecked for row in certificate.rows)
    certificate = verify(model(0.0), model(0.5), X)
    assert not certificate
    assert all(row.max_rel == 0.5 for row in certificate.rows if not row.holds)


class Kind(Enum):
    ONE = 1
    TWO = 2


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (object, "object"),
        (lambda: lambda: 0, "function"),
        (threading.Lock, "lock"),
        (lambda: repeat(X), "repeat"),  # it has no end
        (lambda: Held(object()), "object"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_walked_fails_and_is_named(make: Callable[[], Any], what: str) -> None:
    certificate = verify(Apply(lambda x: (x, make())), Apply(lambda x: (x, make())), X)
    assert not certificate
    (row,) = {row.output: row for row in certificate.rows if not row.holds}.values()
    assert row.output.split(".")[0] == "1"
    assert f"verify cannot look into a {what}; let the model return tensors" in certificate.verdict
    assert "differs" not in certificate.where


def test_what_is_the_same_in_both_needs_no_looking_into() -> None:
    same = threading.Lock()
    assert verify(returning(X, same, Held, len), returning(X, same, Held, len), X)


@pytest.mark.parametrize(
    ("old", "new"), [(Kind.ONE, Kind.TWO), (2**70, 2**70 + 1), ("a", "b"), (torch.strided, torch.sparse_coo)]
)
def test_plain_values_are_told_apart(old: Any, new: Any) -> None:
    assert verify(returning(X, old), returning(X, old), X)
    certificate = verify(returning(X, old), returning(X, new), X)
    assert not certificate
    assert "in the parent" in certificate.verdict


def test_objects_of_other_kinds_or_variables_differ() -> None:
    more = Held(X)
    more.extra = X  # type: ignore[attr-defined]
    for new, where in ((Slotted(X), "output"), (more, "extra"), (Held(X[:1]), "logits")):
        certificate = verify(returning(Held(X)), returning(new), X)
        assert where in [row.output for row in certificate.rows if not row.holds]


def test_an_iterator_is_consumed_where_the_model_runs() -> None:
    """A generator's body is the model's: without gradients, and in float64 where the run is."""
    seen = []

    def parts(y: Tensor) -> Any:
        for row in y:
            seen.append((row.dtype, torch.ones(1).dtype, torch.is_grad_enabled()))
            yield row

    assert verify(Apply(parts), Apply(parts), X)
    assert set(seen) == {(torch.float32, torch.float32, False), (torch.float64, torch.float64, False)}


def test_paths_tell_where_a_leaf_stands() -> None:
    paths = [path for path, leaf in flatten({"a": (Held(X), np.float32(2))}) if isinstance(leaf, Tensor)]
    assert paths == [("a", 0, "logits"), ("a", 1)]
