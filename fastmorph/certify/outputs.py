"""What a certificate does with inputs and outputs: copies, in float64 where that is wanted; and eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def copied(leaf: Any, exact: bool) -> Any:
    """A copy of an input or output, in float64 where `exact`."""
    if not isinstance(leaf, Tensor):
        return deepcopy(leaf)
    return widened(leaf.detach().clone()) if exact else leaf.detach().clone()


def widened(tensor: Tensor) -> Tensor:
    """In float64, complex or real; integers as they are."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def is_float(tensor: Tensor) -> bool:
    """Whether it holds real or complex floating-point numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's own mode is put back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
