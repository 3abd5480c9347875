"""What a solve returns, and the error that carries an answer that is not exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastmorph.equation.solvers.base import Solver
from fastmorph.errors import MorphError


@dataclass(frozen=True)
class Decomposition:
    """Two kernels whose full convolution is the weight, and how well and by what they were found.

    Tensors or numpy arrays, as the weight was; the kernels have its dtype, the figures are float64.

    Attributes:
        first: F1, (*B, Ch, Ci, *K1), the layer next to the input.
        second: F2, (*B, Co, Ch, *K2), the layer next to the output.
        residual: (*B,) ||G - F2 * F1|| / ||G||, Frobenius, of the kernels as returned (rounded to their dtype), summed in
            float64; the absolute norm where G is zero. That of a closed form with more than 32 channels is estimated from
            8 random sums of the channels on each such side, because measuring it would cost more than the solution.
        iterations: (*B,) half-steps that each item took, see `General` for those of its accelerations; 0 for a closed form.
        converged: (*B,) whether the residual is within what counts as exact for the dtype (`fastmorph.tolerance`).
        solver: the solver that ran, with its settings; for `Auto`, the one it chose.
        reason: why that solver, in a sentence.
        cost: floating-point operations (multiply and add counted as 2) of all items, from their sizes and `iterations`.
        trace: (steps, *B) relative residual after each half-step, or each outer step of an acceleration, before rounding to
            the dtype; NaN once an item is done.
    """

    first: Any
    second: Any
    residual: Any
    iterations: Any
    converged: Any
    solver: Solver
    reason: str = ""
    cost: float = 0.0
    trace: Any = field(default=None, repr=False)


class InexactMorphError(MorphError):
    """A solver ran and its answer is not exact; `decomposition` carries that answer."""

    def __init__(self, message: str, decomposition: Decomposition) -> None:
        super().__init__(message)
        self.decomposition = decomposition
