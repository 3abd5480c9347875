"""A closed form: where the whole weight fits into one of the two kernels, no equation need be solved.

With e = C_hid - r extra channels, m = e // 2 of them in pairs,

    F1 = P [G; S; S],   F2 = [I | R | -R] P^T,

where S and R are noise, I is a delta kernel that puts G where the frame has it, and P is orthogonal over the hidden channels.
F2 * F1 = I * G + R * S - R * S = G whatever S, R and P are. P mixes the three groups, so that no entry stays zero and no
channel stays a copy of another. It is block-diagonal, so that mixing costs little more than the memory that it touches, but for
directions that bring noise to blocks that have none (`fastmorph_kernels.direct.mixing`). All backends have the same P, S and R,
so that for one seed their answers agree to rounding.

r = C_out and [I; G] in general; where C_hid is smaller than that, G = U V by a singular value decomposition, with r its rank.
The other role, the weight in F2, is the same on the transposed equation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastmorph.equation import reference
from fastmorph.equation.bounds import may_have_rank, numerical_rank, refuse_below_rank, tail_norms, tolerance
from fastmorph.equation.frame import Frame, Side, tap_count
from fastmorph.equation.solvers.base import Choice, Equation, Solution, Solver
from fastmorph.errors import MorphError

_BLOCK = 32  # channels that P mixes together, at most


@dataclass(frozen=True)
class Direct(Solver):
    """Closed form, exact to rounding where K1 >= K and C_hid >= C_out, or K2 >= K and C_hid >= C_in; else by low rank.

    Time grows with the number of weights. The condition is perfect: no system is solved. Memory, besides the weight and both
    kernels in its dtype: a few ranges of channels, 1 MB each on a CPU, 128 MB elsewhere; for the short dtypes, where F2 is
    corrected, and for low rank, the working copies of a half-step and of a singular value decomposition.

    Attributes:
        density: root mean square, in (0, 1], that noise gives to every tap of the kernel that does not hold the weight,
            relative to what the delta gives to its centre tap. Larger spreads that kernel more evenly; rounding grows with it.
    """

    density: float = 0.5
    closed_form: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise MorphError(f"Direct(density={self.density}): density must lie in (0, 1].")

    @staticmethod
    def role(frame: Frame, co: int, ci: int, hidden: int) -> Side | None:
        """Which kernel any weight of these sizes can go into; None: exact in neither, except for weights of low rank."""
        taps = tap_count(frame.kernel)
        if frame.fits(within_first=True) and hidden >= min(co, ci * taps):
            return "first"
        if frame.fits(within_first=False) and hidden >= min(ci, co * taps):
            return "second"
        return None

    def choose(self, weight: Tensor, hidden: int, frame: Frame, *, allow_inexact: bool) -> Choice:
        """The role by the sizes or, where they do not decide, by the weight's rank, whose factors the choice then carries."""
        choice = self.choose_if_exact(weight, hidden, frame)
        if choice is not None:
            return choice
        sides = self._sides(frame)
        if not sides:
            raise MorphError(
                f"Direct puts the whole weight into one kernel, and a weight of size {frame.kernel} fits into neither "
                f"{frame.first} nor {frame.second}; enlarge one of the kernel sizes or use General."
            )
        if not allow_inexact:
            refuse_below_rank(weight, hidden, frame)
        factored = {side: _factorise(weight, side, hidden) for side in sides}
        role = min(sides, key=lambda side: float(factored[side][1].sum()))
        return Choice(self, f"asked for; the nearest weight of rank {hidden}", role, factored[role][0])

    def choose_if_exact(self, weight: Tensor, hidden: int, frame: Frame) -> Choice | None:
        """The choice where the closed form is exact, by the sizes or by low rank; each item's rank must then be low enough."""
        co, ci = weight.shape[1:3]
        role = self.role(frame, co, ci, hidden)
        if role is not None:
            name, bound, channels = ("K1", "C_out", co) if role == "first" else ("K2", "C_in", ci)
            fits = f"closed form: {name} >= K and " if frame.kernel else "closed form: "
            if hidden >= channels:
                return Choice(self, f"{fits}C_hid >= {bound}", role)
            return Choice(self, f"{fits}C_hid >= the weight's rank", role, _factorise(weight, role, hidden)[0])
        exact = 0.5 * tolerance(weight.dtype)
        for side in self._sides(frame) if len(weight) else ():
            if may_have_rank(_matrix(weight, side), hidden, exact):
                factors, missed = _factorise(weight, side, hidden)
                if bool((missed <= exact).all()):
                    return Choice(self, "closed form by the weight's low rank", side, factors)
        return None

    def chooses_by_sizes(self, co: int, ci: int, hidden: int, frame: Frame) -> bool:
        """Where there are as many hidden channels as the weight has on the side that the closed form keeps."""
        role = self.role(frame, co, ci, hidden)
        return role is not None and hidden >= (co if role == "first" else ci)

    @staticmethod
    def _sides(frame: Frame) -> list[Side]:
        sides: tuple[Side, ...] = ("first", "second")
        return [side for side in sides if frame.fits(within_first=side == "first")]

    def solve(self, equation: Equation) -> Solution:
        """Build a batch of answers."""
        weight = equation.weight.to(equation.work) if equation.corrected else equation.weight
        sizes = (equation.hidden, equation.frame, equation.noise.keys(2))
        into_first = equation.role == "first"
        kernels = equation.backend.direct(weight, *sizes, equation.factors, density=self.density, into_first=into_first)
        return Solution.without_steps(*kernels)

    def cost(self, co: int, ci: int, hidden: int, frame: Frame, half_steps: int) -> float:
        """Mixing of both kernels."""
        return 2.0 * min(hidden, _BLOCK) * hidden * (ci * tap_count(frame.first) + co * tap_count(frame.second))

    def reference(
        self, weight: reference.Array, hidden: int, frame: Frame, draw: reference.Draw, tol: float
    ) -> reference.Solved:
        """The same closed form with P as a dense matrix, by the numpy oracle, which finds the role for itself."""
        turned, (co, ci) = weight.swapaxes(0, 1), weight.shape[:2]
        matrices: dict[Side, reference.Array] = {
            "first": weight.reshape(len(weight), -1),
            "second": turned.reshape(len(turned), -1),
        }
        limit = 0.5 * tol * np.linalg.norm(weight)
        sides = sorted(self._sides(frame), key=lambda side: np.linalg.matrix_rank(matrices[side], limit))
        role = self.role(frame, co, ci, hidden) or sides[0]
        if role == "first":
            return reference.direct(weight, hidden, frame, draw, self.density)
        solved = reference.direct(turned, hidden, frame.transposed, draw, self.density)
        return reference.Solved(solved.second.swapaxes(0, 1), solved.first.swapaxes(0, 1), solved.trace)


def _matrix(weight: Tensor, side: Side) -> Tensor:
    """The weight as the matrix whose rank counts where `side` holds it: (B, Co, Ci*|K|) or (B, Ci, Co*|K|), float64."""
    rows = weight if side == "first" else weight.transpose(1, 2)
    return rows.flatten(2).to(torch.float32 if weight.device.type == "mps" else torch.float64)


def _factorise(weight: Tensor, side: Side, hidden: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """U and V of `Choice`, of rank C_hid at most, and the relative Frobenius norm (B,) that rank C_hid leaves."""
    u, s, vh = torch.linalg.svd(_matrix(weight, side), full_matrices=False)
    fine = 0.5 * tolerance(weight.dtype) * (1.0 if weight.dtype == torch.float64 else 0.1)
    rank = max(1, min(hidden, int(numerical_rank(s, fine).max()) if len(s) else 0))
    shape = weight.shape[2:] if side == "first" else (weight.shape[1], *weight.shape[3:])
    norms = tail_norms(s)  # (B, n + 1)
    missed = norms[:, min(hidden, s.shape[1])] / norms[:, 0].clamp_min(torch.finfo(norms.dtype).tiny)
    return (u[:, :, :rank], (s[:, :rank, None] * vh[:, :rank]).view(-1, rank, *shape)), missed
