"""Attention that PyTorch runs as one operator, followed as the plain operators that it stands for."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

_FUSED = (
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    *("_scaled_dot_product_fused_attention_overrideable",),
)


@cache
def is_fused(func: Any) -> bool:
    """Whether the operator is one of these."""
    return func.namespace == "aten" and func._schema.name.removeprefix("aten::") in _FUSED


def plain(args: dict[str, Any]) -> Tensor:
    """softmax(q k^T * scale + mask) v by plain operators, from the fused operator's arguments by name; (*, L, Ev)."""
    query, key, value = args["query"], args["key"], args["value"]
    mask = args.get("attn_mask", args.get("attn_bias"))
    with _InParts():
        out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            *(query, key, value, mask, args["dropout_p"], args["is_causal"]),
            scale=args.get("scale"),
            enable_gqa=query.shape[-3] != key.shape[-3],
        )[0]
    return out


class _InParts(TorchDispatchMode):
    """Runs what PyTorch makes of other operators as these."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        return func(*args, **(kwargs or {}))


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
    """A context for runs on a device whose fused attention would pad heads first; elsewhere `plain` does, thread by thread."""
    return nullcontext() if device.type == "cpu" else _plain_kernels()
