"""Algorithm 1 of the paper, alternating least squares, and what to run in its place where it stalls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastmorph.equation import reference
from fastmorph.equation.arrays import host_waits
from fastmorph.equation.bounds import exact_side
from fastmorph.equation.frame import Frame, tap_count
from fastmorph.equation.half_step import HalfStep
from fastmorph.equation.solvers.anderson import MEMORY, anderson
from fastmorph.equation.solvers.base import Equation, Solution, Solver
from fastmorph.equation.solvers.gauss_newton import gauss_newton
from fastmorph.equation.solvers.sweeps import alternate_until
from fastmorph.errors import MorphError

_CACHE = 32 * 2**20  # bytes of `memory`: a CPU takes half of that


_REFINEMENTS_COARSE = 2  # of factors in float32: each takes off the two digits that a condition of 1e5 leaves


@dataclass(frozen=True)
class General(Solver):
    """General network morphism (Wei et al. 2016, Algorithm 1), accelerated unless told not to.

    Where Claim 1 holds for either kernel, one half-step is exact and acceleration has nothing to do. Below it, the paper's
    alternation stalls, and the accelerations find what it cannot: variable projection with truncated Gauss-Newton steps
    down to the counting bound, Anderson's a good part of the way there.

    Work is counted in half-steps, the least-squares solutions for one kernel with the other fixed. A sweep is two. A
    projection of Gauss-Newton's is one, and each of its CG steps counts as two: it has a sweep's products, but no
    factorisation. `iterations` of the answer are half-steps; its `trace` is the residual after each half-step (Anderson: each
    sweep; Gauss-Newton: each outer step), NaN for items that had ended.

    Memory: the smaller Gram matrix and its factor, 2 min(C_hid |K2|, C_in |N|)^2 numbers of 8 bytes for an exact half-step,
    on a GPU up to twice that, and some copies of the kernels; a few times that for the accelerations. `decompose_many` bounds
    it by its `memory_budget`.

    Attributes:
        max_iter: sweeps at most, so that no item has more than twice as many `iterations`, whatever the acceleration.
        tol: relative residual that counts as loss 0; None: what is exact for the dtype.
        acceleration: "gauss-newton", "anderson", or None for the paper's own algorithm.
    """

    max_iter: int = 400
    tol: float | None = None
    acceleration: Literal["gauss-newton", "anderson"] | None = "gauss-newton"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.max_iter < 1:
            raise MorphError(f"{name}(max_iter={self.max_iter}): at least one sweep is needed.")
        if self.tol is not None and not self.tol > 0.0:
            raise MorphError(f"{name}(tol={self.tol}): tol must be positive, or None for what is exact for the dtype.")
        if self.acceleration not in ("gauss-newton", "anderson", None):
            raise MorphError(f"{name}(acceleration={self.acceleration!r}): it must be 'gauss-newton', 'anderson' or None.")

    def solve(self, equation: Equation) -> Solution:
        """Solve a batch, from the side that one half-step makes exact (Claim 1), if there is one."""
        frame, (batch, co, ci) = equation.frame, equation.sizes
        if batch == 0:
            second = equation.weight.new_empty(0, co, equation.hidden, *frame.second)
            return Solution.without_steps(equation.start(), second)
        side = exact_side(frame, co, ci, equation.hidden)
        if side == "second":
            return self._in_parts(equation)
        if side == "first":
            return self._in_parts(equation.transposed).transposed
        if self.acceleration is None:
            return self.run(equation, equation.start())
        accelerated = gauss_newton if self.acceleration == "gauss-newton" else anderson
        return accelerated(equation, equation.start(), max_iter=self.max_iter, tol=self._tol(equation.tolerance))

    def chooses_by_sizes(self, co: int, ci: int, hidden: int, frame: Frame) -> bool:
        """Where one half-step is exact and enough."""
        return self.tol is None and hidden >= min(co, ci) and exact_side(frame, co, ci, hidden) is not None

    def draws(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """Three under Claim 1, which holds for almost all noise: an item with nearly singular noise is soon solved again."""
        return 3 if exact_side(frame, co, ci, hidden) else 1

    def _in_parts(self, equation: Equation) -> Solution:
        """`run`; on a CPU, on parts of the batch whose systems stay in cache. The noise is drawn for all at once."""
        first, (batch, co, ci) = equation.start(), equation.sizes
        part = max(1, _CACHE // (8 * self.memory(co, ci, equation.hidden, equation.frame)))
        if equation.weight.device.type != "cpu" or part >= batch:
            return self.run(equation, first)
        found = [self.run(equation.subset(rows, equation.frame), first[rows]) for rows in torch.arange(batch).split(part)]
        steps = max(len(f.trace) for f in found)
        trace = [torch.nn.functional.pad(f.trace, (0, 0, 0, steps - len(f.trace)), value=torch.nan) for f in found]
        one, two, iterations = (
            torch.cat(parts) for parts in zip(*((f.first, f.second, f.iterations) for f in found), strict=True)
        )
        return Solution(one, two, torch.cat(trace, 1), iterations)

    def run(self, equation: Equation, first: Tensor) -> Solution:
        """Alternate from a given F1, (B, Ch, Ci, *K1); an item that is exact leaves the batch."""
        _, co, ci = equation.sizes
        if host_waits(first.device) and self.chooses_by_sizes(co, ci, equation.hidden, equation.frame):
            return _once(equation, first)
        found = alternate_until(equation, first, tol=self._tol(equation.tolerance), most=2 * self.max_iter)
        return Solution.told(*found)

    def _tol(self, exact: float) -> float:
        return exact if self.tol is None else self.tol

    def cost(self, co: int, ci: int, hidden: int, frame: Frame, half_steps: int) -> float:
        """Gram matrix, Cholesky factor, solution and composition of each half-step; a bound for CG, which does not factor."""
        second, first = _half_step_cost(co, ci, hidden, frame), _half_step_cost(ci, co, hidden, frame.transposed)
        side = exact_side(frame, co, ci, hidden)
        return half_steps * {"second": second, "first": first, None: (first + second) / 2}[side]

    def memory(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """The Gram matrices and their factors, on a GPU the systems too, both kernels and the composition, a few times."""
        n, m1, m2 = tap_count(frame.size), tap_count(frame.first), tap_count(frame.second)
        second, first = min(hidden * m2, ci * n), min(hidden * m1, co * n)
        kernels = 4 * (hidden * (ci * m1 + co * m2) + co * ci * n)
        if exact_side(frame, co, ci, hidden) or self.acceleration is None:
            return 4 * max(second, first) ** 2 + kernels
        if self.acceleration == "anderson":
            return 4 * max(second, first) ** 2 + kernels + 5 * MEMORY * hidden * ci * m1
        return 4 * second**2 + 2 * first**2 + 4 * kernels  # a factor is kept while another is tried

    def reference(
        self, weight: reference.Array, hidden: int, frame: Frame, draw: reference.Draw, tol: float
    ) -> reference.Solved:
        """Algorithm 1 by the numpy oracle, accelerated by dense versions of the same methods."""
        limit = self._tol(tol)
        co, ci = weight.shape[:2]
        side = exact_side(frame, co, ci, hidden)
        if side == "first":
            start = reference.start(draw, hidden, co, frame.second)
            found = reference.general(weight.swapaxes(0, 1), start, frame.transposed, max_iter=self.max_iter, tol=limit)
            return reference.Solved(found.second.swapaxes(0, 1), found.first.swapaxes(0, 1), found.trace)
        algorithm = {
            None: reference.general,
            "anderson": reference.general_anderson,
            "gauss-newton": reference.general_gauss_newton,
        }[None if side else self.acceleration]
        return algorithm(weight, reference.start(draw, hidden, ci, frame.first), frame, max_iter=self.max_iter, tol=limit)


def _once(equation: Equation, first: Tensor) -> Solution:
    """One half-step, unseen: exact for almost all noise. The others are found with the residual, and drawn again."""
    coarse = equation.coarse
    step = HalfStep(first, equation.frame.second, equation.backend, wait=False, coarse=coarse)
    target, before = step.system.framed(equation.weight, equation.frame.before)
    second = step.solve(target, before)
    for _ in range(1 if coarse is None else _REFINEMENTS_COARSE):
        second = step.corrected(second, step.system.missed(target, before, second))
    residual = step.error(target, before, second)[1] / equation.norm
    return Solution(first, second, residual[None], torch.ones_like(residual, dtype=torch.int64))


def _half_step_cost(co: int, ci: int, hidden: int, frame: Frame) -> float:
    n, m1, m2 = tap_count(frame.size), tap_count(frame.first), tap_count(frame.second)
    system = min(hidden * m2, ci * n)
    gram = 2.0 * hidden**2 * ci * m1 * m2
    return gram + system**3 / 3 + 2.0 * co * system**2 + 4.0 * co * hidden * ci * m1 * m2
