"""Float32 products of a solve are taken in full whatever the process allows, and the process finds its setting as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmorph as fm
from fastmorph.equation.arithmetic import full_precision

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm"}


Setting = tuple[str | None, str, str]


def setting() -> Setting:
    """The older setting, None where the newer ones contradict it, and these, for a GPU and for a CPU."""
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:
        products = None
    return products, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


FULL = ("highest", "ieee", "ieee")


def older(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def newer() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.fixture(
    params=[older("high"), older("medium"), allow_tf32, newer], ids=["high", "medium", "allow_tf32", "fp32_precision"]
)
def allowed(request: pytest.FixtureRequest) -> Iterator[Setting]:
    """Products that may be less than float32, by each of PyTorch's ways to say so."""
    torch.set_float32_matmul_precision("highest")
    request.param()
    yield setting()
    torch.set_float32_matmul_precision("highest")


class Products(TorchDispatchMode):
    """What the setting was at each float32 matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Setting] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _PRODUCTS and args[0].dtype == torch.float32:
            self.seen.append(setting())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", [fm.Direct(), fm.General(max_iter=2)], ids=["direct", "general"])
def test_a_solve_takes_its_products_in_full(solver, allowed):
    weight = torch.randn(12, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    with Products() as products:
        fm.decompose(weight, 24, solver=solver, precision="ieee", backend="torch", allow_inexact=True)
    assert set(products.seen) == {FULL}
    assert setting() == allowed


def test_a_registered_solve_takes_its_products_in_full(allowed):
    from fastmorph.equation.alternate import fixed_half_steps

    weight, first = torch.randn(1, 4, 3, 3), torch.randn(1, 5, 3, 3)
    with Products() as products:
        fixed_half_steps(weight, first, (3,), 1, "torch", "ieee")
    assert set(products.seen) == {FULL}
    assert setting() == allowed


def test_an_error_puts_the_setting_back(allowed):
    with pytest.raises(ZeroDivisionError), full_precision():
        _ = 1 / 0
    assert setting() == allowed


def test_threads_that_overlap_hold_it_until_the_last_is_done(allowed):
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        entered.wait()
    assert setting() == FULL
    leave.set()
    thread.join()
    assert setting() == allowed


def test_a_change_made_meanwhile_is_kept(allowed):
    with full_precision():
        torch.set_float32_matmul_precision("medium")
        expected = setting()
    assert setting() == expected


def test_a_process_that_takes_products_in_full_is_left_alone():
    torch.set_float32_matmul_precision("highest")
    before = setting()
    with full_precision():
        assert setting() == before
    assert setting() == before
