"""Parents and children, exact and not, for the tests of `verify`."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastmorph.certify.certificate import Certificate
from fastmorph.certify.compare import Comparison

X = torch.ones(2, 3)


class Apply(nn.Module):
    """A model that is one function of its input, with or without parameters."""

    def __init__(self, function: Any, *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.Sequential(*modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.inner(args[0]), *args[1:], **kwargs) if args else self.function(**kwargs)


class Cell:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def double(self) -> Tensor:
        self.value = self.value * 2
        return self.value


def returning(*values: Any) -> Apply:
    """A model without parameters that ignores its input and returns what it was given."""
    return Apply(lambda x: values[0] if len(values) == 1 else values)


def family(error: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """A parent, a child whose first layer is factored exactly and then off by `error`, and inputs."""
    torch.manual_seed(0)
    parent = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    child = deepcopy(parent)
    first, second = nn.Linear(6, 16, bias=False).double(), nn.Linear(16, 12).double()
    with torch.no_grad():
        first.weight.copy_(torch.linalg.pinv(second.weight) @ parent[0].weight)
        second.bias.copy_(parent[0].bias)
        first.weight[0, 0] += error
    child[0] = nn.Sequential(first, second)
    return parent.to(dtype), child.to(dtype), torch.randn(5, 6, dtype=torch.float64).to(dtype)


def only(certificate: Certificate) -> Comparison:
    (row,) = certificate.rows
    return row
