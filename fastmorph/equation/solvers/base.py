"""What every solver is given and gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmorph.equation import reference
from fastmorph.equation.backends import Backend
from fastmorph.equation.backends.torch_backend import frobenius
from fastmorph.equation.bounds import half_step_is_exact, refuse_below_rank, tolerance
from fastmorph.equation.frame import Frame, Side, tap_count
from fastmorph.equation.randomness import Noise
from fastmorph.equation.speed import factors_in
from fastmorph.errors import MorphError

# A Gram matrix of more rows than this is not built merely to take one of two roundings back.
_LARGEST_CORRECTION = 8192

Numbers = np.ndarray[Any, Any]
"""One number an item, (B,), on the host."""


def sent(numbers: Numbers, like: Tensor) -> Tensor:
    """An array of the host, on the device of `like`, without waiting for it."""
    return torch.from_numpy(numbers).to(like.device, non_blocking=True)


def is_corrected(dtype: torch.dtype, frame: Frame, co: int, ci: int, hidden: int) -> bool:
    """Whether F2 is solved again after F1 was rounded to `dtype`, as `Equation.corrected` says."""
    few = ci * tap_count(frame.size) <= _LARGEST_CORRECTION
    return torch.finfo(dtype).bits < 32 and half_step_is_exact(frame, co, ci, hidden) and few


@dataclass(frozen=True)
class Equation:
    """A batch of equations of one shape.

    Attributes:
        weight: G, (B, Co, Ci, *K), in the dtype that the solver works in; for a closed form, in its own.
        hidden: C_hid.
        frame: the kernel sizes.
        dtype: what the answer is rounded to.
        noise: draws noise of variance 1: `noise(*shape)` -> (B, *shape), in the working dtype.
        backend: the linear maps.
        role: of a closed form, which kernel holds the weight.
        factors: U and V of a closed form by low rank, see `Choice`.
        full: whether float32 is not to be tried, where that is quicker: it was, and was not enough.
    """

    weight: Tensor
    hidden: int
    frame: Frame
    dtype: torch.dtype
    noise: Noise
    backend: Backend
    role: Side | None = None
    factors: tuple[Tensor, Tensor] | None = None
    full: bool = False

    @property
    def coarse(self) -> Backend | None:
        """The maps to factor in float32 with, on a device whose float64 is slow and for a dtype that allows it; else None."""
        short = torch.finfo(self.dtype).bits <= 32 and self.work == torch.float64 and self.backend.precision is None
        if self.full or not short or factors_in(self.weight.device) == torch.float64:
            return None
        return self.backend.in_float32()

    @property
    def tolerance(self) -> float:
        """Relative residual at which a solver may stop: less than what counts as exact where the answer is still rounded."""
        return tolerance(self.dtype) * (1.0 if self.dtype == self.work else 0.1)

    @property
    def work(self) -> torch.dtype:
        """The dtype to work in."""
        return self.backend.working_dtype(self.weight.device)

    @property
    def corrected(self) -> bool:
        """Whether F2 is solved again after F1 was rounded: for short dtypes, where Claim 1 lets F2 make up for the rounding."""
        _, co, ci = self.sizes
        return is_corrected(self.dtype, self.frame, co, ci, self.hidden)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, Co and Ci."""
        b, co, ci = self.weight.shape[:3]
        return b, co, ci

    def subset(self, items: Tensor, frame: Frame) -> Equation:
        """The same equation for some batch items, in another frame."""
        return replace(self, weight=self.weight[items], frame=frame, noise=self.noise.of(items))

    @property
    def transposed(self) -> Equation:
        """The equation of G^T: F2^T is its first kernel and F1^T its second."""
        return replace(self, weight=self.weight.transpose(1, 2), frame=self.frame.transposed)

    def start(self) -> Tensor:
        """Noise for F1, (B, Ch, Ci, *K1), of the spread that keeps a signal's variance."""
        ci, k1 = self.weight.shape[2], self.frame.first
        return self.noise(self.hidden, ci, *k1, over=(ci * tap_count(k1)) ** 0.5).to(self.weight.dtype)

    @cached_property
    def norm(self) -> Tensor:
        """||G|| of each item, (B,), 1 where it is zero: what residuals are divided by."""
        return torch.threshold(frobenius(self.weight, self.work), 0.0, 1.0)


class Choice(NamedTuple):
    """What was decided about a problem before it is solved, with what was found out on the way.

    Attributes:
        solver: the solver that will run.
        reason: why, in a sentence.
        role: of a closed form, which kernel holds the weight; "first" is the one next to the input.
        factors: where that closed form is by low rank: U (B, Co, r) and V (B, r, Ci, *K) with G = U V; of G^T for "second".
    """

    solver: Solver
    reason: str
    role: Side | None = None
    factors: tuple[Tensor, Tensor] | None = None


class Solution(NamedTuple):
    """Kernels in the working dtype, not yet equalised; (half-steps, B) residuals; half-steps of each item (B,)."""

    first: Tensor
    second: Tensor
    trace: Tensor
    iterations: Tensor

    @classmethod
    def without_steps(cls, first: Tensor, second: Tensor) -> Solution:
        """Kernels, (B, Ch, Ci, *K1) and (B, Co, Ch, *K2), that took no half-steps."""
        batch, device = len(first), first.device
        return cls(first, second, first.new_empty(0, batch), torch.zeros(batch, dtype=torch.int64, device=device))

    @classmethod
    def told(cls, first: Tensor, second: Tensor, trace: Numbers) -> Solution:
        """Kernels with what the host knows: a trace, (half-steps, B), NaN for items that had ended."""
        return cls(first, second, sent(trace, first).to(first.dtype), sent((~np.isnan(trace)).sum(0), first))

    @property
    def transposed(self) -> Solution:
        """The solution of the transposed equation."""
        return self._replace(first=self.second.transpose(1, 2), second=self.first.transpose(1, 2))


class Solver(ABC):
    """A frozen, hashable set of settings that can solve equations: the base class of every solver, yours too.

    A solver must give `solve`. The answer is then equalised, rounded to the weight's dtype and measured; whether it is exact
    is decided from that measurement, so that a solver cannot be inexact in silence. All else may be left out.

    Example:
        class Halves(fm.Solver):
            def solve(self, equation):  # F1 = [G; G], F2 = [I/2 | I/2]: C_hid = 2 C_out, K1 = K, K2 = 1
                g, eye = equation.weight, torch.eye(equation.weight.shape[1]).to(equation.weight)
                second = torch.cat([eye, eye], 1)[None, :, :, None, None] / 2
                return Solution.without_steps(torch.cat([g, g], 1), second.repeat(len(g), 1, 1, 1, 1))

    Attributes:
        closed_form: for a solver that solves no system, so that its kernels may be rounded as they come, and to compose them
            costs more than to find them. The weight is then given in its own dtype, and a wide layer's residual is estimated.
    """

    closed_form: ClassVar[bool] = False

    @abstractmethod
    def solve(self, equation: Equation) -> Solution:
        """Solve a batch on `equation.backend`, each item as it would be solved alone."""

    def choose(self, weight: Tensor, hidden: int, frame: Frame, *, allow_inexact: bool) -> Choice:
        """What will run on `weight` (B, Co, Ci, *K); itself, unless the solver chooses another.

        Raises MorphError if the answer cannot be exact and has to be.
        """
        if not allow_inexact:
            refuse_below_rank(weight, hidden, frame)
        return Choice(self, "asked for")

    def chooses_by_sizes(self, co: int, ci: int, hidden: int, frame: Frame) -> bool:
        """Whether `choose` decides by these sizes alone, without a look at the weight; no, where in doubt."""
        return False

    def draws(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """How often an item that is not exact may be solved, each time from noise of its own; once by default."""
        return 1

    def cost(self, co: int, ci: int, hidden: int, frame: Frame, half_steps: int) -> float:
        """Floating-point operations of one item that took so many half-steps, multiply and add counted as 2; 0: not known."""
        return 0.0

    def memory(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """Peak number of working-precision numbers for one item; by default both kernels and two compositions."""
        return hidden * (ci * tap_count(frame.first) + co * tap_count(frame.second)) + 2 * co * ci * tap_count(frame.size)

    def reference(
        self, weight: reference.Array, hidden: int, frame: Frame, draw: reference.Draw, tol: float
    ) -> reference.Solved:
        """Solve one problem, (Co, Ci, *K), by plain numpy: what runs for backend="numpy"; by default there is none.

        Raises MorphError by default.
        """
        raise MorphError(f"{self} has no numpy reference; leave backend='numpy' out, or give the solver a method reference.")
