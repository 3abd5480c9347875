"""Where the equation's linear maps run, and which place is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmorph.equation.backends.numpy_backend import NumpyBackend
from fastmorph.equation.backends.protocol import Backend
from fastmorph.equation.backends.torch_backend import PRECISIONS, TorchBackend
from fastmorph.equation.backends.triton_backend import TritonBackend, why_unavailable
from fastmorph.errors import MorphError

__all__ = ["Backend", "NumpyBackend", "TorchBackend", "TritonBackend", "find_backend", "why_unavailable"]


def find_backend(name: str | None, tensor: Tensor, precision: str | None = None) -> Backend:
    """The backend called `name`, or the one for `tensor` if None: "triton" on CUDA devices where it can run, else "torch".

    Args:
        name: None, "numpy", "torch" or "triton".
        tensor: what it is to work on.
        precision: None, "float64", "ieee", "tf32x3" or "tf32": how products are taken (see `decompose`).

    Raises:
        MorphError: an unknown name or precision, or one that cannot be had here, with the reason.
    """
    if name not in (None, "numpy", "torch", "triton"):
        raise MorphError(f"backend={name!r}: it must be None (choose), 'numpy', 'torch' or 'triton'.")
    if precision not in (None, *PRECISIONS):
        raise MorphError(f"precision={precision!r}: it must be None (choose) or one of {', '.join(map(repr, PRECISIONS))}.")
    if precision not in (None, "float64") and tensor.dtype == torch.float64:
        raise MorphError(f"precision={precision!r} cannot be exact for float64 weights; leave it out, or convert them.")
    if name == "triton" or (name is None and tensor.device.type == "cuda"):
        reason = why_unavailable(tensor)
        if reason is None:
            return TritonBackend(precision)
        if name == "triton":
            raise MorphError(f"backend='triton': {reason}; use backend='torch'.")
    if precision in ("tf32x3", "tf32") or (name == "numpy" and precision == "ieee"):
        raise MorphError(f"precision={precision!r} is for the kernels of backend='triton'; leave it out here.")
    return NumpyBackend() if name == "numpy" else TorchBackend(precision)
