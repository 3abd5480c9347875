"""The Triton kernels of `fastmorph_kernels` as a backend; Triton is imported at first use."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fastmorph.equation.backends.protocol import ClosedForm, ClosedForms
from fastmorph.equation.backends.torch_backend import TorchBackend
from fastmorph.equation.frame import Frame, Size

if TYPE_CHECKING:
    from fastmorph_kernels.noise import Keys

_CAPABILITY = (8, 0)  # the oldest that they are compiled for ahead of time
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TritonBackend(TorchBackend):
    """The linear maps with their residuals and Gram matrices, Anderson's memory and the closed form by kernels.

    Half-steps are solved in float64 unless `precision` says otherwise; the closed form takes float32 products as three of tf32.
    """

    name: ClassVar[str] = "triton"
    takes_unlike: ClassVar[bool] = True

    @property
    def products(self) -> str:
        """The kernels' word for how float32 products are taken, where the solvers work in float32."""
        return "ieee" if self.precision in (None, "float64") else str(self.precision)

    def in_float32(self) -> TritonBackend:
        """The same maps, with products as three of tf32."""
        return TritonBackend("tf32x3")

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """Full convolution F2 * F1, (B, Ch, Ci, *K1), (B, Co, Ch, *K2) -> (B, Co, Ci, *N)."""
        out: Tensor = kernels().compose(first, second, precision=self.products)
        return out

    def error(self, target: Tensor, before: Size, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """T - F2 * F1 and its norm in one pass; the padded target is never stored."""
        error, squared = kernels().residual(first, second, target, before, precision=self.products)
        return error, squared.sqrt().to(error.dtype)

    def correlate(self, target: Tensor, before: Size, first: Tensor, k2: Size) -> Tensor:
        """Adjoint of `compose` in F2, -> (B, Co, Ch, *K2)."""
        out: Tensor = kernels().correlate(target, before, first, k2, precision=self.products)
        return out

    def row_gram(self, first: Tensor, k2: Size) -> Tensor:
        """A A^T, (B, |K2|*Ch, |K2|*Ch), lower triangle at least."""
        out: Tensor = kernels().row_gram(first, k2, precision=self.products)
        return out

    def column_gram(self, first: Tensor, k2: Size) -> Tensor:
        """A^T A, (B, |N|*Ci, |N|*Ci), both triangles."""
        out: Tensor = kernels().column_gram(first, k2, precision=self.products)
        return out

    def anderson_step(self, image: Tensor, move: Tensor, images: Tensor, moves: Tensor) -> Tensor:
        """As the base class has it, by normal equations in float64: one pass over the memory for them, one for the update."""
        products = kernels().anderson_gram(moves, move, accumulate=torch.float64)  # (B, m, m + 1)
        inverse = torch.linalg.pinv(products[:, :, :-1], hermitian=True, rtol=torch.finfo(torch.float64).eps * moves.shape[1])
        share = (inverse @ products[:, :, -1:])[:, :, 0].to(images.dtype)
        out: Tensor = kernels().anderson_update(image.flatten(1), images, share).view(image.shape)
        return out

    def direct(
        self,
        weight: Tensor,
        hidden: int,
        frame: Frame,
        keys: Keys,
        factors: tuple[Tensor, Tensor] | None,
        *,
        density: float,
        into_first: bool,
    ) -> tuple[Tensor, Tensor]:
        """The closed form in one pass, with noise made on the way; by low rank as the base class has it."""
        if factors is not None:
            return super().direct(weight, hidden, frame, keys, factors, density=density, into_first=into_first)
        sizes = (frame.first, frame.second, frame.before)
        precision = self._closed_form_products
        seeds = torch.from_numpy(keys.view("int64")).to(weight.device, non_blocking=True)
        first, second = kernels().direct(
            weight, hidden, *sizes, seeds, density=density, precision=precision, into_first=into_first
        )
        return first, second

    def direct_many(self, equations: Sequence[ClosedForm], *, density: float, limit: float) -> ClosedForms:
        """The same for many weights, in about as many launches as for one."""
        given = [
            (weight, hidden, frame.first, frame.second, frame.before, keys.view("int64").tolist(), into_first)
            for weight, hidden, frame, keys, into_first in equations
        ]
        many = kernels().direct_many
        return ClosedForms(*many(given, density=density, precision=self._closed_form_products, limit=limit))

    @property
    def _closed_form_products(self) -> str:
        return "tf32x3" if self.precision is None else self.products


def kernels() -> ModuleType:
    """The kernel package."""
    return importlib.import_module("fastmorph_kernels")


def why_unavailable(tensor: Tensor) -> str | None:
    """Why the kernels cannot run on `tensor`, in half a sentence; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if tensor.device.type != "cuda" and not (interpreted and tensor.device.type == "cpu"):
        return f"its kernels run on CUDA tensors, and this one is on {tensor.device} (TRITON_INTERPRET=1 takes CPU tensors)"
    if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) < _CAPABILITY:
        return f"its kernels need compute capability {'.'.join(map(str, _CAPABILITY))} or later"
    if tensor.dtype not in _DTYPES:
        return f"its kernels take {', '.join(map(str, _DTYPES))}, and this tensor is {tensor.dtype}"
    return None
