"""Where the suite runs and at which sizes: on a GPU in earnest, or on a CPU in rehearsal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """What every part of the suite is given.

    Attributes:
        rehearsal: on a CPU, kernels interpreted, everything tiny.
    """

    rehearsal: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearsal else "cuda")

    @property
    def k(self) -> tuple[int, ...]:
        """The size of every kernel; one dimension in rehearsal, because a Gram matrix has a program for each pair of taps."""
        return self.size((3, 3), (2,))

    @property
    def before(self) -> tuple[int, ...]:
        """Zeros in front of a weight of that size where two such kernels replace it."""
        return self.size((1, 1), (0,))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those of solvers."""
        return self.size((torch.float64, torch.float32), (torch.float32,))

    @property
    def sizes(self) -> dict[str, Any]:
        """How `decompose` is told of it."""
        return {"kernel_sizes": (self.k, self.k), "spatial_dims": len(self.k)}

    @property
    def backend(self) -> str | None:
        """What `backend=` must be for the kernels to run: on a GPU they are the default, and the suite holds it to that."""
        return "triton" if self.rehearsal else None

    def size(self, real: T, tiny: T) -> T:
        """The size for here."""
        return tiny if self.rehearsal else real

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Normal numbers: products of zeros draw less power and run faster."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=dtype, device=self.device)

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if not self.rehearsal:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give freed memory back to the device, so that one section's leavings are not another's shortage."""
        if not self.rehearsal:
            torch.cuda.empty_cache()
