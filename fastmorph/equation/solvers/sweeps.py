"""What the iterations on the two kernels share: the alternation, a projection and the gauge."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from fastmorph.equation.arrays import host_waits
from fastmorph.equation.backends.torch_backend import frobenius
from fastmorph.equation.bounds import half_step_is_exact
from fastmorph.equation.frame import SIDES, Frame, Side, Size
from fastmorph.equation.half_step import HalfStep, per_item
from fastmorph.equation.solvers.base import Equation, Numbers, sent

# Of one side, as if it were the second kernel of its equation: the side, the other kernel (fixed), its own kernel so far, the
# target and the frame, -> its own kernel.
Half = Callable[[Side, Tensor, Tensor, Tensor, Frame], Tensor]

_UNSEEN = 4  # half-steps between two looks, where the host waits for these
_NEAR = 1e-3  # relative residual from which so many half-steps may lead to where rounding counts


def alternate_half_steps(
    weight: Tensor, frame: Frame, first: Tensor, second: Tensor, steps: range, solve: Half
) -> tuple[Tensor, Tensor]:
    """Half-steps of an alternation from F1 and F2, each for F2 if its number is even, else for F1, -> F1 and F2."""
    turns: list[tuple[Side, Side, Tensor, Frame]] = [
        ("second", "first", weight, frame),
        ("first", "second", weight.transpose(1, 2), frame.transposed),
    ]
    kernels = {"second": second, "first": first.transpose(1, 2)}
    for side, other, target, within in islice(cycle(turns), steps.start, steps.stop):
        kernels[side] = solve(side, kernels[other].transpose(1, 2), kernels[side], target, within)
    return kernels["first"].transpose(1, 2), kernels["second"]


def alternate_until(equation: Equation, first: Tensor, *, tol: float, most: int) -> tuple[Tensor, Tensor, Numbers]:
    """Alternate from F1, (B, Ch, Ci, *K1), each item until its residual is `tol`, `most` half-steps at most.

    Returns both kernels and the residuals after each half-step, (S, B), NaN for items that had ended.

    Where the host waits to look, it looks once every few half-steps: until then an item that is exact rests. Steps between
    two looks in which a system was singular are taken once more, one by one.
    """
    frame, (batch, co, ci) = equation.frame, equation.sizes
    weight, scale, items = equation.weight, equation.norm, np.arange(batch)
    exact = {side: half_step_is_exact(frame, co, ci, equation.hidden, side=side) for side in SIDES}
    every, near = _UNSEEN if host_waits(first.device) else 1, False
    second = weight.new_zeros(batch, co, equation.hidden, *frame.second)
    ended, trace, step = (torch.empty_like(first), torch.empty_like(second)), np.empty((0, batch)), 0

    def advance(steps: range, *, wait: bool) -> tuple[Tensor, Tensor, Numbers, Numbers]:
        """Both kernels, residuals of each step, NaN for an item that rests, and whether a system was singular; (B,)."""
        resting, singular, residuals = None, torch.zeros_like(scale, dtype=torch.bool), []

        def solve(side: Side, fixed: Tensor, last: Tensor, target: Tensor, within: Frame) -> Tensor:
            nonlocal resting, singular
            half = HalfStep(fixed, within.second, equation.backend, wait=wait)
            kernel, _, norm = project(half, target, within.before, always_refine=exact[side] or near)
            residual, unsolved = norm / scale, half.singular
            if resting is not None:
                kernel, unsolved = per_item(resting, last, kernel), unsolved & ~resting
                residual = residual.masked_fill(resting, torch.nan)
            singular = singular | unsolved
            residuals.append(residual)
            # An item that is exact for F2 keeps its noise F1, which the step for F1 would turn to zeros where G is zero.
            resting = residual <= tol if resting is None else resting | (residual <= tol)
            return kernel

        one, two = alternate_half_steps(weight, frame, first, second, steps, solve)
        *told, unsolved = np.array(torch.stack([*residuals, singular]).tolist())
        return one, two, np.array(told), unsolved

    while step < most and len(items):
        few = next((k for k in range(1, every) if exact[SIDES[(step + k - 1) % 2]]), every)  # a look where all should be exact
        steps = range(step, min(step + few, most))
        new = advance(steps, wait=every == 1)
        if every > 1 and new[3].any():
            new = advance(steps, wait=True)
        first, second, residuals, _ = new
        trace = np.concatenate([trace, np.full((len(steps), batch), np.nan)])
        trace[steps.start :, items] = residuals
        step, near = steps.stop, every > 1 and bool((residuals <= _NEAR).any())
        done = (residuals <= tol).any(0) | (step == most)
        if done.any():
            places, rows, rest = sent(items[done], weight), sent(np.flatnonzero(done), weight), np.flatnonzero(~done)
            for whole, part in zip(ended, (first, second), strict=True):
                whole.index_copy_(0, places, part.index_select(0, rows))
            rows, items = sent(rest, weight), items[rest]
            weight, scale, first, second = (x.index_select(0, rows) for x in (weight, scale, first, second))
    return *ended, trace


def project(step: HalfStep, target: Tensor, before: Size, *, always_refine: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The least-squares second kernel, (B, Co, Ch, *K2), what it leaves of the target, (B, Co, Ci, *N), and the norm of that.

    Refinement takes back what the Gram matrix's condition cost. Against a residual that is far above rounding this cannot
    be seen, so only items that are near an exact answer are refined, unless `always_refine`; where `step` does not wait to
    see which are, none is.
    """
    second = step.solve(target, before)
    error, norm = step.error(target, before, second)
    if not step.wait:
        return step.refined(second, error, norm, target, before) if always_refine else (second, error, norm)
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
