"""Products in full, whatever the user has allowed the rest of the process: autocast, TF32 on a GPU, bfloat16 on a CPU.

PyTorch keeps the setting of float32 products in one place for all threads, so that it is held while at least one solve runs, and put back after
the last. Products of other threads are then taken in full too: never less exact than they asked for. Whoever changes the
setting meanwhile has the last word: it is left as they set it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

_FULL = "highest"


class _Setting(NamedTuple):
    """PyTorch's older setting, for all kinds of device, and the newer ones; None where the newer contradict the older."""

    products: str | None
    cuda: str
    cpu: str


_cuda, _cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_lock = threading.Lock()
_holders = 0
_before: _Setting | None = None  # what is to be put back; None: nothing had to be changed


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Suspend autocast, which would round products to a short dtype, and take float32 ones in full; also a decorator."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(full_precision())
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Take float32 matrix products in full within; to be nested, in any number of threads; a decorator too."""
    global _holders
    with _lock:
        if _holders == 0:
            _hold()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                _restore()


def _hold() -> None:
    global _before
    setting = _setting()
    _before = None if _is_full(setting) else setting
    if setting.products not in (None, _FULL):
        torch.set_float32_matmul_precision(_FULL)  # the newer ones too
    elif _before is not None:
        _cuda.fp32_precision = _cpu.fp32_precision = "ieee"


def _restore() -> None:
    if _before is None or not _is_full(_setting()):
        return
    if _before.products is not None:
        torch.set_float32_matmul_precision(_before.products)
    _cuda.fp32_precision, _cpu.fp32_precision = _before.cuda, _before.cpu


def _setting() -> _Setting:
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:  # how PyTorch says that they contradict each other
        products = None
    return _Setting(products, str(_cuda.fp32_precision), str(_cpu.fp32_precision))


def _is_full(setting: _Setting) -> bool:
    """Whether products are taken in full: "none" is a device's default, which for matrix products is that."""
    return setting.products == _FULL and {setting.cuda, setting.cpu} <= {"ieee", "none"}
