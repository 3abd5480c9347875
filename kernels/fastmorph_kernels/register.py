"""How an operator becomes one of PyTorch's, `torch.ops.fastmorph_kernels.<name>`: from three functions of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .support import interprets


class Functions(NamedTuple):
    """What makes a PyTorch operator, three functions of the same arguments; the last two have the outputs in front, to fill."""

    allocate: Callable[..., Any]
    launch: Callable[..., None]
    plain: Callable[..., None]


OPERATORS: dict[str, Functions] = {}
"""Every operator that is registered, by name."""


def register(
    name: str, *, allocate: Callable[..., Any], launch: Callable[..., None], plain: Callable[..., None]
) -> Callable[..., Any]:
    """Register an operator, which changes none of its arguments, and return what calls it.

    Args:
        name: that of the operator.
        allocate: returns the outputs, unwritten. What a trace sees, so that sizes must follow from shapes alone; its
            annotations are the operator's schema.
        launch: fills the outputs by Triton kernels, on a GPU and wherever the interpreter is right. It imports Triton.
        plain: fills them in plain PyTorch, on a CPU without the interpreter; with products in float64, which no setting of
            PyTorch's makes less exact.
    """
    OPERATORS[name] = Functions(allocate, launch, plain)

    def on_cuda(*arguments: Any) -> Any:
        outputs = allocate(*arguments)
        with torch.cuda.device(_leader(arguments).device):  # Triton launches on the current device, wherever its arguments are
            launch(outputs, *arguments)
        return outputs

    def on_cpu(*arguments: Any) -> Any:
        outputs = allocate(*arguments)
        fill = launch if interprets(_leader(arguments).dtype) else plain
        fill(outputs, *arguments)
        return outputs

    operator = torch.library.custom_op(
        add_op_namespace_prefix(name),
        on_cuda,
        mutates_args=(),
        device_types="cuda",
        schema=torch.library.infer_schema(allocate, mutates_args=()),
    )
    operator.register_kernel("cpu", on_cpu)
    operator.register_fake(allocate)
    return operator


def _leader(arguments: Sequence[Any]) -> Tensor:
    """The first tensor among the arguments, whose device and dtype are those of the call."""
    first = arguments[0]
    return first if isinstance(first, Tensor) else first[0]
