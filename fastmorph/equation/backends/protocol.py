"""What a backend must give: the equation's linear maps, in batches.

Shapes: B batch; G (B, Co, Ci, *K); F1 (B, Ch, Ci, *K1); F2 (B, Co, Ch, *K2); N = K1 + K2 - 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from fastmorph.equation.banded import BandedCholesky
from fastmorph.equation.frame import Frame, Size

if TYPE_CHECKING:
    from fastmorph_kernels.noise import Keys

T = TypeVar("T")


class Backend(Protocol):
    """Where the linear maps run. Backends are compared and hashed by value; `TorchBackend` documents each map."""

    @property
    def name(self) -> str:
        """What `backend=` calls it."""

    @property
    def precision(self) -> str | None:
        """Of products, one of `PRECISIONS`, or None to choose."""

    def implementation(self, solver: T, reference: T) -> T:
        """Which of a solver's two implementations runs here: by these maps, or by the numpy reference."""

    def working_dtype(self, device: torch.device) -> torch.dtype:
        """What the solvers work in."""

    def in_float32(self) -> Backend:
        """The same maps, for float32 tensors in the precision of float32, as fast as that goes."""

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """F2 * F1, -> (B, Co, Ci, *N)."""

    def error(self, target: Tensor, before: Size, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """T - F2 * F1, (B, Co, Ci, *N), where T stands behind `before` zeros, and its norm (B,)."""

    def correlate(self, target: Tensor, before: Size, first: Tensor, k2: Size) -> Tensor:
        """The adjoint of `compose` in F2, -> (B, Co, Ch, *K2)."""

    def row_gram(self, first: Tensor, k2: Size) -> Tensor:
        """A A^T, (B, |K2|*Ch, |K2|*Ch), lower triangle at least, rows ordered tap by tap."""

    def column_gram(self, first: Tensor, k2: Size) -> Tensor:
        """A^T A, (B, |N|*Ci, |N|*Ci), both triangles, columns ordered tap by tap."""

    def factor(self, gram: Tensor, blocks: int, width: int) -> BandedCholesky:
        """Cholesky factor of a Gram matrix of so many block rows, zero further than `width` blocks from the diagonal."""

    def anderson_step(self, image: Tensor, move: Tensor, images: Tensor, moves: Tensor) -> Tensor:
        """The image less the combination of `images` whose combination of `moves` is nearest to `move`."""

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
        """Both factors of the closed form, in the weight's dtype."""
