"""Algorithm 1 of the paper: alternating least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fastmorph import reference
from fastmorph.bounds import half_step_is_exact
from fastmorph.errors import MorphError
from fastmorph.frame import Frame, volume
from fastmorph.half_step import HalfStep, batch_norm
from fastmorph.solvers.base import Equation, Solution, Solver


@dataclass(frozen=True)
class General(Solver):
    """General network morphism (Wei et al. 2016, Algorithm 1).

    Attributes:
        max_iter: sweeps (a half-step for F2, then one for F1) at most.
        tol: relative residual that counts as loss 0; None: what is exact for the dtype.
        acceleration: "anderson", or None for the paper's own algorithm.
    """

    max_iter: int = 400
    tol: float | None = None
    acceleration: Literal["anderson"] | None = "anderson"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.max_iter < 1:
            raise MorphError(f"{name}(max_iter={self.max_iter}): at least one sweep is needed.")
        if self.tol is not None and not self.tol > 0.0:
            raise MorphError(f"{name}(tol={self.tol}): tol must be positive, or None for what is exact for the dtype.")
        if self.acceleration not in ("anderson", None):
            raise MorphError(f"{name}(acceleration={self.acceleration!r}): 'anderson' or None.")

    def solve(self, equation: Equation) -> Solution:
        """Solve a batch, from the side that one half-step makes exact (Claim 1), if there is one."""
        frame, (_, co, ci) = equation.frame, equation.sizes
        if half_step_is_exact(frame, co, ci, equation.hidden, for_second=False) and not half_step_is_exact(
            frame, co, ci, equation.hidden
        ):
            return self.run(equation.transposed, equation.transposed.start()).transposed
        return self.run(equation, equation.start())

    def run(self, equation: Equation, first: torch.Tensor) -> Solution:
        """Alternate from a given F1, (B, Ch, Ci, *K1); an item that is exact leaves the batch."""
        tol = equation.tolerance if self.tol is None else self.tol
        frame, weight, backend, scale = equation.frame, equation.weight, equation.backend, equation.norm()
        batch, co, _ = equation.sizes
        first = first.clone()
        second = weight.new_zeros(batch, co, equation.hidden, *frame.second)
        trace: list[torch.Tensor] = []
        active = torch.arange(batch, device=weight.device)
        mirrored = weight.transpose(1, 2)

        def record(step: HalfStep, target: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
            residual = batch_norm(step.error(target, step_frame.before, found)) / scale[active]
            row = weight.new_full((batch,), torch.nan)
            row[active] = residual
            trace.append(row)
            return residual

        for _ in range(self.max_iter):
            step_frame = frame
            step = HalfStep(first[active], frame.second, backend)
            found = step.refined(weight[active], frame.before)
            second[active] = found
            # An item that is exact here keeps its noise F1, which the step for F1 would turn to zeros where G is zero.
            active = active[~(record(step, weight[active], found) <= tol)]
            if len(active) == 0:
                break
            step_frame = frame.transposed
            step = HalfStep(second[active].transpose(1, 2), frame.first, backend)
            found = step.refined(mirrored[active], step_frame.before)
            first[active] = found.transpose(1, 2)
            active = active[~(record(step, mirrored[active], found) <= tol)]
            if len(active) == 0:
                break
        history = torch.stack(trace) if trace else weight.new_empty(0, batch)
        return Solution(first, second, history, (~history.isnan()).sum(0))

    def cost(self, co: int, ci: int, hidden: int, frame: Frame) -> float:
        """Gram matrix, Cholesky factor, solution and composition of `max_iter` sweeps; of half a one where that is exact."""
        for_second, for_first = (half_step_is_exact(frame, co, ci, hidden, for_second=side) for side in (True, False))
        second, first = _half_step_cost(co, ci, hidden, frame), _half_step_cost(ci, co, hidden, frame.transposed)
        if for_second or for_first:
            return second if for_second else first
        return self.max_iter * (first + second)

    def memory(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """The Gram matrix and its factor, both kernels and the composition, a few times."""
        n, m1, m2 = volume(frame.size), volume(frame.first), volume(frame.second)
        system = max(min(hidden * m2, ci * n), min(hidden * m1, co * n))
        return 2 * system**2 + 4 * (hidden * (ci * m1 + co * m2) + co * ci * n)

    def reference(
        self, weight: reference.Array, hidden: int, frame: Frame, draw: reference.Draw, tol: float
    ) -> reference.Solved:
        """Algorithm 1 by the numpy oracle."""
        limit = tol if self.tol is None else self.tol
        co, ci = weight.shape[:2]
        if half_step_is_exact(frame, co, ci, hidden, for_second=False) and not half_step_is_exact(frame, co, ci, hidden):
            start = reference.start(draw, hidden, co, frame.second)
            found = reference.general(weight.swapaxes(0, 1), start, frame.transposed, max_iter=self.max_iter, tol=limit)
            return reference.Solved(found.second.swapaxes(0, 1), found.first.swapaxes(0, 1), found.trace)
        start = reference.start(draw, hidden, ci, frame.first)
        return reference.general(weight, start, frame, max_iter=self.max_iter, tol=limit)


def _half_step_cost(co: int, ci: int, hidden: int, frame: Frame) -> float:
    n, m1, m2 = volume(frame.size), volume(frame.first), volume(frame.second)
    system = min(hidden * m2, ci * n)
    gram = 2.0 * hidden**2 * ci * m1 * m2
    return gram + system**3 / 3 + 2.0 * co * system**2 + 4.0 * co * hidden * ci * m1 * m2
