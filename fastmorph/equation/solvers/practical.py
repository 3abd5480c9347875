"""Algorithm 2 of the paper: shrink the second kernel until one sweep is exact, then pad it back with zeros."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fastmorph.equation import reference
from fastmorph.equation.backends.torch_backend import pad
from fastmorph.equation.frame import Frame
from fastmorph.equation.solvers.base import Equation, Solution, Solver, sent
from fastmorph.equation.solvers.general import General
from fastmorph.equation.solvers.sweeps import alternate_until


@dataclass(frozen=True)
class Practical(Solver):
    """Practical network morphism (Wei et al. 2016, Algorithm 2).

    Always ends with loss 0 where K1 >= K and C_hid >= C_out, at the price of zeros in F2's outer taps. Memory: that of a sweep
    of `General` at full size.

    Attributes:
        max_iter: sweeps of Algorithm 1 at each size of F2; the paper's algorithm takes one.
        tol: relative residual that counts as loss 0; None: what is exact for the dtype.
    """

    max_iter: int = 1
    tol: float | None = None

    def __post_init__(self) -> None:
        General(self.max_iter, self.tol, acceleration=None)  # the same limits hold

    def solve(self, equation: Equation) -> Solution:
        """Solve a batch; items that are exact at one size leave the batch for the next."""
        frame, weight = equation.frame, equation.weight
        batch, co, _ci = equation.sizes
        noise = equation.start()
        first, second = torch.empty_like(noise), weight.new_empty(batch, co, equation.hidden, *frame.second)
        tol = equation.tolerance if self.tol is None else self.tol
        open_items, traces = np.arange(batch), [np.empty((0, batch))]
        for inner in frame.shrinking():
            items = sent(open_items, weight)
            part = replace(equation, weight=weight.index_select(0, items), frame=inner)  # it draws no noise
            one, two, trace = alternate_until(part, noise.index_select(0, items), tol=tol, most=2 * self.max_iter)
            before = tuple(widths[0] for widths in frame.second_padding(inner))
            first.index_copy_(0, items, one)
            second.index_copy_(0, items, pad(two, before, frame.second))
            traces.append(np.full((len(trace), batch), np.nan))
            traces[-1][:, open_items] = trace
            open_items = open_items[~(trace <= tol).any(0)]
            if len(open_items) == 0:
                break
        return Solution.told(first, second, np.concatenate(traces))

    def draws(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """Three: almost all noise leads to a well-conditioned answer, and another draw is cheap."""
        return 3

    def cost(self, co: int, ci: int, hidden: int, frame: Frame, half_steps: int) -> float:
        """As if every half-step were at full size."""
        return General().cost(co, ci, hidden, frame, half_steps)

    def memory(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """That of a sweep at full size."""
        return General().memory(co, ci, hidden, frame)

    def reference(
        self, weight: reference.Array, hidden: int, frame: Frame, draw: reference.Draw, tol: float
    ) -> reference.Solved:
        """Algorithm 2 by the numpy oracle."""
        start = reference.start(draw, hidden, weight.shape[1], frame.first)
        limit = tol if self.tol is None else self.tol
        return reference.practical(weight, start, frame, tol=limit, max_iter=self.max_iter)
