"""What `as_call` takes `example_inputs` for."""

from __future__ import annotations

from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastmorph.inputs import Inputs, as_call

X, Y = torch.ones(2, 3), torch.zeros(2)


class Keywords(nn.Module):
    def forward(self, *, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x


class OneDict(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x"]


class Two(nn.Module):
    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return one + two


class Named(NamedTuple):
    x: Tensor
    y: Tensor | None = None


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


@pytest.mark.parametrize(
    ("given", "model", "expected"),
    [
        (X, nn.Identity(), Inputs((X,), {})),
        ((X, Y), Anything(), Inputs((X, Y), {})),
        ((), Anything(), Inputs((), {})),
        ([X, Y], Anything(), Inputs(([X, Y],), {})),
        (((X,), {"y": Y}), Anything(), Inputs((X,), {"y": Y})),
        ((X, {"y": Y}), Anything(), Inputs((X, {"y": Y}), {})),
        (((), {"x": X}), Keywords(), Inputs((), {"x": X})),
        ({"x": X, "y": Y}, Keywords(), Inputs((), {"x": X, "y": Y})),
        (UserDict({"x": X}), Keywords(), Inputs((), {"x": X})),
        ({"x": X}, OneDict(), Inputs(({"x": X},), {})),
        ({1: X}, Anything(), Inputs(({1: X},), {})),
        (Inputs((X,), {"y": Y}), Anything(), Inputs((X,), {"y": Y})),
        (Named(X, Y), Keywords(), Inputs((), {"x": X, "y": Y})),
        (Named(X), Keywords(), Inputs((), {"x": X})),
        (Named(X, Y), OneDict(), Inputs((Named(X, Y),), {})),
        ((Named(X, Y),), Keywords(), Inputs((Named(X, Y),), {})),
        (Named(X, Y), Two(), Inputs((X, Y), {})),
    ],
)
def test_a_call_is_read_from_what_is_given(given: Any, model: nn.Module, expected: Inputs) -> None:
    call = as_call(given, model)
    assert type(call) is Inputs
    assert _identities(call) == _identities(expected)


def _identities(value: Any) -> Any:
    """Tensors by identity, the rest as it is."""
    if isinstance(value, Tensor):
        return id(value)
    if isinstance(value, dict):
        return {key: _identities(item) for key, item in value.items()}
    return [type(value), *map(_identities, value)] if isinstance(value, (list, tuple)) else value
