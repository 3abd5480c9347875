"""The solver that chooses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastmorph.equation.bounds import (
    freedom,
    half_step_is_exact,
    numerical_rank,
    smallest_by_counting,
    smallest_exact,
    tolerance,
)
from fastmorph.equation.frame import Frame, tap_count
from fastmorph.equation.solvers.base import Equation, Solution, Solver
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

    def chosen_for(self, weight: Tensor, hidden: int, frame: Frame, *, allow_inexact: bool) -> tuple[Solver, str]:
        """The solver for these sizes and, where the sizes alone do not decide, this weight.

        Raises MorphError if the counting bound rules an exact answer out and one is needed.
        """
        co, ci = weight.shape[1:3]
        role = Direct.role(frame, co, ci, hidden)
        if role is not None:
            name, bound = ("K1", "C_out") if role else ("K2", "C_in")
            fits = f"{name} >= K and " if frame.kernel else ""
            limit = "the weight's rank" if Direct.needs_rank(frame, co, ci, hidden) else bound
            return Direct(), f"closed form: {fits}C_hid >= {limit}"
        for for_second, name in ((True, "F2"), (False, "F1")):
            if half_step_is_exact(frame, co, ci, hidden, for_second=for_second):
                return General(max_iter=1), f"one half-step for {name} is exact (Claim 1)"
        if _low_rank(weight, hidden, frame):
            return Direct(), "closed form by the weight's low rank"
        least = smallest_by_counting(frame, co, ci)
        if hidden >= min(co, ci) and freedom(frame, co, ci, hidden) >= 0:
            assert least is not None  # for hidden is one such number
            if hidden < _COMFORT * least and _shrunken_half_step(frame, co, ci, hidden):
                return Practical(), "one half-step is exact for a smaller second kernel (Claim 1), which zeros pad"
            return General(max_iter=_SWEEPS), f"below Claim 1, at or above the counting bound of {least}"
        if allow_inexact:
            return General(), f"no exact answer: below the counting bound of {least}; the nearest is sought"
        equations = co * ci * tap_count(frame.size)
        raise MorphError(
            f"hidden_channels={hidden} is too few: {freedom(frame, co, ci, hidden) + equations} unknowns (less the gauge) "
            f"face {equations} equations, so that a general weight has no exact answer. The smallest number that can be "
            f"exact for kernel sizes {frame.first} and {frame.second} is {smallest_exact(frame, co, ci)}. If this weight is "
            f"special, solver=fm.General() tries all the same; allow_inexact=True gives the nearest answer."
        )

    def solve(self, equation: Equation) -> Solution:
        """Not called: the chosen solver is."""
        raise NotImplementedError

    reference = cost = memory = solve  # type: ignore[assignment]


def _shrunken_half_step(frame: Frame, co: int, ci: int, hidden: int) -> bool:
    """Whether Claim 1 holds, on either side, for one of the frames that Algorithm 2 tries."""
    return any(
        half_step_is_exact(inner, co, ci, hidden, for_second=side) for inner in frame.shrinking() for side in (True, False)
    )


def _low_rank(weight: Tensor, hidden: int, frame: Frame) -> bool:
    """Whether every item, as a matrix in one of the two roles of the closed form, has rank C_hid at most."""
    relative = 0.5 * tolerance(weight.dtype)
    matrices = [weight.flatten(2)] * frame.fits(within_first=True)
    matrices += [weight.transpose(1, 2).flatten(2)] * frame.fits(within_first=False)
    return len(weight) > 0 and any(bool((numerical_rank(m, relative) <= hidden).all()) for m in matrices)
