"""What the iterations on the two kernels share: the alternation, a projection, the gauge and the record of residuals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice

import torch
from torch import Tensor

from fastmorph.equation.backends.torch_backend import frobenius
from fastmorph.equation.frame import Frame, Side, Size
from fastmorph.equation.half_step import HalfStep, per_item

# Of one side, as if it were the second kernel of its equation: the side, the other kernel (fixed), its own kernel so far, the
# target and the frame, -> its own kernel, or None to end.
Half = Callable[[Side, Tensor, Tensor, Tensor, Frame], Tensor | None]


def alternate_half_steps(weight: Tensor, frame: Frame, first: Tensor, count: int, solve: Half) -> tuple[Tensor, Tensor]:
    """Alternate from F1, (B, Ch, Ci, *K1): F2 for F1, F1 for F2, ..., `count` half-steps at most, -> F1 and F2."""
    turns: list[tuple[Side, Side, Tensor, Frame]] = [
        ("second", "first", weight, frame),
        ("first", "second", weight.transpose(1, 2), frame.transposed),
    ]
    second = weight.new_zeros(*weight.shape[:2], first.shape[1], *frame.second)
    kernels = {"second": second, "first": first.transpose(1, 2)}
    for side, other, target, within in islice(cycle(turns), count):
        kernel = solve(side, kernels[other].transpose(1, 2), kernels[side], target, within)
        if kernel is None:
            break
        kernels[side] = kernel
    return kernels["first"].transpose(1, 2), kernels["second"]


def project(step: HalfStep, target: Tensor, before: Size, *, always_refine: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The least-squares second kernel, (B, Co, Ch, *K2), what it leaves of the target, (B, Co, Ci, *N), and the norm of that.

    Refinement takes back what the Gram matrix's condition cost. Against a residual that is far above rounding this cannot
    be seen, so only items that are near an exact answer are refined, unless `always_refine`.
    """
    second = step.solve(target, before)
    error, norm = step.error(target, before, second)
    if not step.wait:
        return step.refined(second, error, norm, target, before)
    near = norm <= torch.finfo(error.dtype).eps ** 0.25 * frobenius(target)
    if always_refine or bool(near.any()):
        wanted = near | always_refine
        finer, finer_error, finer_norm = step.refined(second, error, norm, target, before)
        second, error = per_item(wanted, finer, second), per_item(wanted, finer_error, error)
        norm = torch.where(wanted, finer_norm, norm)
    return second, error, norm


def unit(first: Tensor) -> Tensor:
    """F1, (B, Ch, Ci, *K1), with hidden channels of norm 1: F2 takes any scale back, so that nothing is lost."""
    norm = first.flatten(2).norm(dim=2).clamp_min(1e-30)  # (B, Ch)
    return first / norm.view(*norm.shape, *(1,) * (first.ndim - 2))


class History:
    """Residuals after each step, (S, B); NaN for items that took no part in it."""

    def __init__(self, equations: Tensor) -> None:
        self.empty = equations.new_full((len(equations),), torch.nan)
        self.rows: list[Tensor] = []

    def add(self, items: Tensor, residual: Tensor) -> None:
        """Record one step of some items."""
        self.rows.append(self.empty.index_copy(0, items, residual))

    def stacked(self) -> Tensor:
        """The trace of a Solution."""
        return torch.stack(self.rows) if self.rows else self.empty.new_empty(0, len(self.empty))
