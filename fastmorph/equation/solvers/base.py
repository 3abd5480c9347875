"""What every solver is given and gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastmorph.equation import reference
from fastmorph.equation.backends.torch_backend import TorchBackend, frobenius
from fastmorph.equation.bounds import half_step_is_exact, tolerance
from fastmorph.equation.frame import Frame, tap_count
from fastmorph.equation.randomness import Noise

# A Gram matrix of more rows than this is not built merely to take one of two roundings back.
_LARGEST_CORRECTION = 8192


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
    """

    weight: Tensor
    hidden: int
    frame: Frame
    dtype: torch.dtype
    noise: Noise
    backend: TorchBackend

    @property
    def tolerance(self) -> float:
        """Relative residual that counts as exact before rounding, which may then add its share."""
        return tolerance(self.dtype) * (1.0 if self.dtype == self.work else 0.1)

    @property
    def work(self) -> torch.dtype:
        """The dtype to work in."""
        return self.backend.working_dtype(self.weight.device)

    @property
    def corrected(self) -> bool:
        """Whether F2 is solved again against F1 as rounded: for the short dtypes, where Claim 1 lets it make up for that."""
        _, co, ci = self.sizes
        return (
            torch.finfo(self.dtype).bits < 32
            and half_step_is_exact(self.frame, co, ci, self.hidden)
            and ci * tap_count(self.frame.size) <= _LARGEST_CORRECTION
        )

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
        ci = self.weight.shape[2]
        fan_in = ci * tap_count(self.frame.first)
        return self.noise(self.hidden, ci, *self.frame.first).to(self.weight.dtype) / fan_in**0.5

    def norm(self) -> Tensor:
        """||G|| of each item, (B,), 1 where it is zero: what residuals are divided by."""
        norm = frobenius(self.weight, self.work)
        return torch.where(norm > 0, norm, torch.ones_like(norm))


class Solution(NamedTuple):
    """Kernels in the working dtype, not yet equalised; (half-steps, B) residuals; half-steps of each item (B,)."""

    first: Tensor
    second: Tensor
    trace: Tensor
    iterations: Tensor

    def final_residual(self) -> Tensor:
        """Each item's last residual, (B,)."""
        return self.trace.nan_to_num(nan=torch.inf).amin(0) if len(self.trace) else self.trace.new_zeros(self.trace.shape[1])

    @property
    def transposed(self) -> Solution:
        """The solution of the transposed equation."""
        return self._replace(first=self.second.transpose(1, 2), second=self.first.transpose(1, 2))


class Solver(ABC):
    """A frozen set of settings that can solve equations."""

    # A closed form: no system is solved, its kernels may be rounded as they come, and composing them costs more than it does.
    closed_form: ClassVar[bool] = False

    @abstractmethod
    def solve(self, equation: Equation) -> Solution:
        """Solve a batch on its backend."""

    @abstractmethod
    def reference(
        self, weight: reference.Array, hidden: int, frame: Frame, draw: reference.Draw, tol: float
    ) -> reference.Solved:
        """Solve one problem, (Co, Ci, *K), by the numpy oracle."""

    def chosen_for(self, weight: Tensor, hidden: int, frame: Frame, *, allow_inexact: bool) -> tuple[Solver, str]:
        """The solver that will run on `weight` (B, Co, Ci, *K), and why. Raises MorphError if it cannot be exact."""
        return self, "asked for"

    def draws(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """How often an item that is not exact may be solved, each time from noise of its own."""
        return 1

    @abstractmethod
    def cost(self, co: int, ci: int, hidden: int, frame: Frame, half_steps: int) -> float:
        """Floating-point operations of one item that took so many half-steps, multiply and add counted as 2."""

    @abstractmethod
    def memory(self, co: int, ci: int, hidden: int, frame: Frame) -> int:
        """Peak number of working-precision numbers for one item."""
