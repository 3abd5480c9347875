"""The solver that chooses."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fastmorph.equation.bounds import exact_side, freedom, refuse_below_rank, smallest_by_counting, smallest_exact
from fastmorph.equation.frame import Frame, tap_count
from fastmorph.equation.solvers.base import Choice, Equation, Solution, Solver
from fastmorph.equation.solvers.direct import Direct
from fastmorph.equation.solvers.general import General
from fastmorph.equation.solvers.practical import Practical
from fastmorph.errors import MorphError

# Sweeps for problems that can be exact. Most need tens; at the counting bound itself 3890 were seen (C = 32, float64).
_SWEEPS = 5000
# Zeros around the weight (K1 + K2 - 1 > K) make the equation harder than its count says: 4x4 -> (3, 3) at C = 8, with a bound
# of 13, takes 100 sweeps at 18 hidden channels and more than 800 at 16. Below this multiple of the bound a smaller second
# kernel is preferred, if one half-step is exact for it.
_COMFORT = 1.35


@dataclass(frozen=True)
class Auto(Solver):
    """Direct where it is exact, else one half-step where Claim 1 holds, else accelerated General or, near its bound, Practical.

    Where no exact answer can exist, the refusal says so before any work, with the smallest C_hid that would do.
    """

    def choose(self, weight: Tensor, hidden: int, frame: Frame, *, allow_inexact: bool) -> Choice:
        """The solver for these sizes and, where the sizes alone do not decide, this weight.

        Raises MorphError if the rank or the counting bound rules an exact answer out and one is needed.
        """
        co, ci = weight.shape[1:3]
        sizes = (frame, co, ci, hidden)
        side = exact_side(*sizes)
        if side is not None and Direct.role(*sizes) is None:
            name = "F2" if side == "second" else "F1"
            return Choice(General(max_iter=1), f"one half-step for {name} is exact (Claim 1)")
        direct = Direct().choose_if_exact(weight, hidden, frame)
        if direct is not None:
            return direct
        least = smallest_by_counting(frame, co, ci)
        if hidden >= min(co, ci) and freedom(*sizes) >= 0:
            assert least is not None  # for hidden is one such number
            if hidden < _COMFORT * least and any(exact_side(inner, co, ci, hidden) for inner in frame.shrinking()):
                return Choice(Practical(), "one half-step is exact for a smaller second kernel (Claim 1), which zeros pad")
            return Choice(General(max_iter=_SWEEPS), f"below Claim 1, at or above the counting bound of {least}")
        if allow_inexact:
            return Choice(General(), f"no exact answer: below the counting bound of {least}; the nearest is sought")
        refuse_below_rank(weight, hidden, frame)
        equations = co * ci * tap_count(frame.size)
        raise MorphError(
            f"hidden_channels={hidden} is too few: {freedom(*sizes) + equations} unknowns (less the gauge) "
            f"face {equations} equations, so that a general weight has no exact answer. The smallest number that can be "
            f"exact for kernel sizes {frame.first} and {frame.second} is {smallest_exact(frame, co, ci)}. If this weight is "
            f"special, solver=fm.General() tries all the same; allow_inexact=True gives the nearest answer."
        )

    def chooses_by_sizes(self, co: int, ci: int, hidden: int, frame: Frame) -> bool:
        """Where a closed form or one half-step is exact for any weight."""
        one_half_step = Direct.role(frame, co, ci, hidden) is None and exact_side(frame, co, ci, hidden) is not None
        return one_half_step or Direct().chooses_by_sizes(co, ci, hidden, frame)

    def solve(self, equation: Equation) -> Solution:
        """Solve a batch by the solver that is chosen for it."""
        choice = self.choose(equation.weight, equation.hidden, equation.frame, allow_inexact=True)
        return choice.solver.solve(replace(equation, role=choice.role, factors=choice.factors))
