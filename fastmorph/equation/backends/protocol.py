"""What a backend must give: the equation's linear maps, in batches.

Shapes: B batch; G (B, Co, Ci, *K); F1 (B, Ch, Ci, *K1); F2 (B, Co, Ch, *K2); N = K1 + K2 - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fastmorph.equation.banded import BandedCholesky
from fastmorph.equation.frame import Frame, Size

if TYPE_CHECKING:
    from fastmorph_kernels.noise import Keys

T = TypeVar("T")


class ClosedForm(NamedTuple):
    """An equation that has a closed form."""

    weight: Tensor  # (B, Co, Ci, *K)
    hidden: int
    frame: Frame
    keys: Keys  # of each item's noise
    into_first: bool


class ClosedForms(NamedTuple):
    """Kernels of equations, and of all items in order what became of them."""

    kernels: list[tuple[Tensor, Tensor]]
    told: Tensor  # (3, items) float64: relative residual, estimated; zero; the weight's largest magnitude, NaN where it has one
    exact: Tensor  # (items,) bool: whether the residual is within a limit


class Backend(Protocol):
    """Where the linear maps run. Backends are compared and hashed by value; `TorchBackend` documents each map."""

    @property
    def name(self) -> str:
        """What `backend=` calls it."""

    @property
    def precision(self) -> str | None:
        """Of products, one of `PRECISIONS`, or None to choose."""

    @property
    def takes_unlike(self) -> bool:
        """Whether closed forms of unlike sizes share launches, by `direct_many`."""

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

    def direct_many(self, equations: Sequence[ClosedForm], *, density: float, limit: float) -> ClosedForms:
        """The same for weights of unlike sizes, of one dtype and device, and what is left of each; where it `takes_unlike`."""
