"""The Triton kernels of `fastmorph_kernels` as a backend; Triton is imported at first use."""

from __future__ import annotations

import importlib
import importlib.util
import os

from torch import Tensor

from fastmorph.backends.torch_backend import TorchBackend


class TritonBackend(TorchBackend):
    """Composes by kernel; the other maps are PyTorch's."""

    name = "triton"

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """Full convolution F2 * F1, (B, Ch, Ci, *K1), (B, Co, Ch, *K2) -> (B, Co, Ci, *N)."""
        kernels = importlib.import_module("fastmorph_kernels")
        out: Tensor = kernels.compose(first, second)
        return out


def why_unavailable(tensor: Tensor) -> str | None:
    """Why the kernels cannot run on `tensor`, in half a sentence; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if tensor.device.type != "cuda" and not (interpreted and tensor.device.type == "cpu"):
        return f"its kernels run on CUDA tensors, and this one is on {tensor.device} (TRITON_INTERPRET=1 takes CPU tensors)"
    return None
