"""What holds for every operator: none waits for the device or allocates by values, and plain products are in full."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import fastmorph_kernels
import pytest
import torch
from fastmorph_kernels.register import OPERATORS
from kernel_arguments import ARGUMENTS
from torch.utils._python_dispatch import TorchDispatchMode

import fastmorph

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Launches that were asked for; none takes place."""
    asked: list[Any] = []
    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "__getitem__", lambda self, grid: lambda *_, **__: asked.append((self, grid)))
    return asked


class NoCopies(TorchDispatchMode):
    """Refuse copies between devices, for which the host waits unless it is told not to; so many `tables` may go there."""

    def __init__(self, tables: int = 0) -> None:
        super().__init__()
        self.tables = tables

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        source = {"copy_": 1, "_to_copy": 0}.get(name)
        if source is not None and args[source].device != out.device:
            if self.tables and (kwargs or {}).get("non_blocking"):
                self.tables -= 1
                return out
            raise AssertionError(f"{func} copies from {args[source].device} to {out.device}")
        return out


def without_values(value: Any, times: int) -> Any:
    """The same on a device without values, where whatever reads one is refused; so many times the channels."""
    if isinstance(value, list):
        return [without_values(one, times) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    sizes = [n * times if dim in (1, 2) else n for dim, n in enumerate(value.shape)]
    return torch.empty(sizes, dtype=value.dtype, device="meta")


# With many channels inputs are packed, and factors spread over the device; the closed form takes its sizes from more than its
# tensors, and `fill` has one kernel for all.
CHANNELS = [(name, times) for name in ARGUMENTS for times in (1, 128) if times == 1 or not name.startswith(("direct", "fill"))]


# As a CUDA graph has it. Tables that the first call for a shape makes are then there already.
@pytest.mark.parametrize(("name", "times"), CHANNELS)
def test_no_operator_waits_or_allocates_by_values(name, times, launches):
    operator = OPERATORS[name.partition(",")[0]]
    arguments = [without_values(value, times) for value in ARGUMENTS[name]()]
    operator.launch(operator.allocate(*arguments), *arguments)
    before = len(launches)
    with NoCopies(tables=int(name == "direct_many")):
        operator.launch(operator.allocate(*arguments), *arguments)
    assert len(launches) == 2 * before > 0


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, torch.nonzero, torch.Tensor.tolist, lambda x: x[x > 0], bool], ids=range(5)
)
def test_reading_a_value_is_refused(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(1, device="meta"))


class NoFloat32Products(TorchDispatchMode):
    """Refuse matrix products of less than float64, which follow PyTorch's settings; counts the others."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot"):
            assert args[0].dtype == torch.float64, func
            self.products += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name != "fill"])  # which has no products
def test_plain_products_are_in_float64(name):
    operator, arguments = OPERATORS[name.partition(",")[0]], ARGUMENTS[name]()
    with NoFloat32Products() as mode:
        operator.plain(operator.allocate(*arguments), *arguments)
    assert mode.products


def test_the_library_calls_every_operator():
    library = Path(fastmorph.__file__).parent
    called = {
        node.attr
        for path in library.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call) and "kernel" in ast.unparse(node.value.func)
    }
    assert set(OPERATORS) <= called


def test_every_kernel_is_launched():
    sources = "\n".join(path.read_text() for path in Path(fastmorph_kernels.__file__).parent.rglob("*.py"))
    kernels = re.findall(r"^def (\w+_kernel)\(\n?\s*\w+_ptr", sources, re.MULTILINE)
    assert len(kernels) > 10
    assert [name for name in kernels if not re.search(rf"\b{name}\[", sources)] == []
