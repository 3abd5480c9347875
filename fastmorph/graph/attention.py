"""Attention in a traced run: modules and kernels that run in operators that have rules."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def use_plain_modules(model: nn.Module) -> None:
    """Let modules run in operators that have rules: attention takes no fast path in train mode, without dropout, and a mixture
    branches on no values where all experts compute all positions."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            module.training, module.dropout = True, 0.0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        config: Any = vars(module).get("config")
        if getattr(config, "_experts_implementation", None) is not None:
            config = copy.copy(config)  # transformers: one product of matrices, which branches on no values
            config._experts_implementation = "batched_mm"
            vars(module)["config"] = config
        vars(module).update(getattr(module, "followed_with", {}))


class _PlainKernels:
    """Lets PyTorch choose plain attention as long as some thread is inside: its choice is one for the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._choice: Any = nullcontext()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._choice = sdpa_kernel(SDPBackend.MATH)
                self._choice.__enter__()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._choice.__exit__(None, None, None)


_plain_kernels = _PlainKernels()


def plain_kernels(device: torch.device) -> Any:
    """A context for runs on a device whose fused attention would pad heads first; elsewhere it is one operator, with a rule."""
    return nullcontext() if device.type == "cpu" else _plain_kernels()
