"""Where the equation's linear maps run, and which place is chosen."""

from __future__ import annotations

from torch import Tensor

from fastmorph.backends.numpy_backend import NumpyBackend
from fastmorph.backends.torch_backend import TorchBackend
from fastmorph.backends.triton_backend import TritonBackend, why_unavailable
from fastmorph.errors import MorphError

__all__ = ["NumpyBackend", "TorchBackend", "TritonBackend", "find_backend", "why_unavailable"]


def find_backend(name: str | None, tensor: Tensor) -> TorchBackend:
    """The backend called `name`, or the one for `tensor` if None: "torch", on every device.

    Raises MorphError for an unknown name, and for "triton" where it cannot run, with the reason.
    """
    if name is None or name == "torch":
        return TorchBackend()
    if name == "numpy":
        return NumpyBackend()
    if name == "triton":
        reason = why_unavailable(tensor)
        if reason is not None:
            raise MorphError(f"backend='triton': {reason}; use backend='torch'.")
        return TritonBackend()
    raise MorphError(f"backend={name!r}: it must be None (choose), 'numpy', 'torch' or 'triton'.")
