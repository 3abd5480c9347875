"""Running a model so that nothing of it is touched, and its outputs as a flat mapping."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Path = tuple[object, ...]


@contextmanager
def isolated(exact: bool) -> Iterator[None]:
    """No gradients, and all global state put back after.

    That includes the generators, so every run starts from one state of them and parent and child draw the same numbers.
    """
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    # cuDNN runs float32 convolutions and RNNs in TF32 (1e-3) unless told not to, and no float32 tolerance would hold.
    # Matrix products do that only where the user asked for it, and then their rounding is the user's.
    cudnn = [getattr(torch.backends.cudnn, name) for name in ("conv", "rnn")]
    precisions, default_dtype = [op.fp32_precision for op in cudnn], torch.get_default_dtype()
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (the generator that models use)
    with torch.random.fork_rng(cuda, device_type="cuda"), torch.no_grad():
        try:
            if exact:
                torch.set_default_dtype(torch.float64)  # for what forward itself makes: an RNN's first state, say
            for op in cudnn:
                op.fp32_precision = "ieee"
            yield
        finally:
            for op, precision in zip(cudnn, precisions, strict=True):
                op.fp32_precision = precision
            torch.set_default_dtype(default_dtype)
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


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


def flatten(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) for each leaf, and (path, its type) for each container, which tells a list from a tuple."""
    items: Iterable[tuple[object, Any]]
    if isinstance(value, Tensor):
        yield path, value.detach()
        return
    if isinstance(value, (bool, int, float, complex)):
        yield path, torch.as_tensor(np.asarray(value))  # by way of numpy, which keeps a Python float's 64 bits
        return
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    else:  # a container registered with PyTorch, or else a leaf, which is its own only item
        leaves = pytree.tree_leaves(value, is_leaf=lambda node: node is not value)
        if len(leaves) == 1 and leaves[0] is value:
            yield path, value
            return
        items = enumerate(leaves)
    yield path, type(value)
    for key, item in items:
        yield from flatten(item, (*path, key))


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
