"""What a solve returns, and the error that carries an answer that is not exact."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fastmorph.equation.arrays import to_tensor
from fastmorph.equation.solvers.base import Solver
from fastmorph.errors import MorphError

Array = TypeVar("Array")  # the kind of the weight: torch.Tensor, numpy.ndarray, or any DLPack exporter


@dataclass(frozen=True)
class Decomposition(Generic[Array]):
    """Two kernels whose full convolution is the weight, and how well and by what they were found.

    Tensors or numpy arrays, as the weight was; the kernels have its dtype, the figures are float64. No gradient flows through.

    Attributes:
        first: F1, (*B, Ch, Ci, *K1), the layer next to the input.
        second: F2, (*B, Co, Ch, *K2), the layer next to the output.
        residual: (*B,) ||G - F2 * F1|| / ||G||, Frobenius, of the kernels as returned (rounded to their dtype), summed in
            float64; the absolute norm where G is zero. Measured, unless `estimated`.
        iterations: (*B,) half-steps that each item took, see `General` for those of its accelerations; 0 for a closed form.
        converged: (*B,) whether the residual is within what counts as exact for the dtype (`fastmorph.tolerance`).
        solver: the solver that ran, with its settings; for `Auto`, the one it chose.
        reason: why that solver, in a sentence.
        cost: floating-point operations (multiply and add counted as 2) of all items, from their sizes and `iterations`.
        trace: (steps, *B) relative residual after each half-step, or each outer step of an acceleration, before rounding to
            the dtype; NaN once an item is done.
        worst: the largest residual as a number on the host, 0 where there is none: for reports, which then need not wait for a
            device; NaN where it has not been read.
        estimated: whether the residual is an estimate: for a closed form with more than 32 input or output channels, it is
            taken from 8 random sums of the channels on each such side, because to measure it would cost more than the solution.
    """

    first: Array
    second: Array
    residual: Array
    iterations: Array
    converged: Array
    solver: Solver
    reason: str = ""
    cost: float = 0.0
    trace: Any = field(default=None, repr=False)
    estimated: bool = False
    worst: float = field(default=math.nan, repr=False)

    @property
    def density(self) -> tuple[float, float]:
        """Share of the entries of `first` and of `second` that are not zero, counted when asked for; 1 where there are none."""
        return _density(self.first), _density(self.second)


def _density(kernel: Any) -> float:
    tensor, _ = to_tensor(kernel, "kernel")
    return int(tensor.count_nonzero()) / tensor.numel() if tensor.numel() else 1.0


class InexactMorphError(MorphError):
    """A solver ran and its answer is not exact; `decomposition` carries that answer."""

    def __init__(self, message: str, decomposition: Decomposition[Any]) -> None:
        super().__init__(message)
        self.decomposition = decomposition

    def within(self, place: str) -> InexactMorphError:
        """The same error and answer, its message headed by the place where it was met."""
        return InexactMorphError(f"{place}: {self}", self.decomposition)
