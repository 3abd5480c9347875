"""Algorithm 1 by variable projection and truncated Gauss-Newton steps.

Alternating least squares crawls where the two kernels share hidden directions, as they do for fewer hidden channels than
Claim 1 asks for. Here F2 is eliminated (Golub and Pereyra 1973, Kaufman 1975): each F1 has its least-squares F2, and F1 alone
is sought, by Gauss-Newton steps whose linear systems are solved roughly at first and well at last (`steihaug`).

Where this departs from the textbook:
1. G is whitened first where an exact answer can be expected; whether it is exact is still tested on G itself (`whiten`).
2. The start is not noise but one power step from it on the windows of G, with a tenth of the noise to keep full rank.
3. F2 takes back any invertible mix of F1's hidden channels, the gauge. Of that only the scale is fixed: hidden channels of F1
   are kept at norm 1. Along all other directions of the gauge H is zero, and CG never enters them.
4. An item whose step fails has its next direction computed in full precision, within half of the radius, before it is
   given up as stalled.
5. Every flag, radius and precision is an item's own: an item takes the path in a batch that it takes alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmorph.equation.backends.torch_backend import dense_system, frobenius
from fastmorph.equation.bounds import freedom
from fastmorph.equation.half_step import HalfStep, per_item
from fastmorph.equation.solvers.base import Equation, Solution
from fastmorph.equation.solvers.steihaug import MOST_STEPS, Direction, Linearised, across, direction, ridged_factor
from fastmorph.equation.solvers.sweeps import History, project, unit
from fastmorph.equation.solvers.whiten import mix_in, mix_out, whiten

_RADIUS = 0.5  # of the first step, as a share of |G|
_NOISE = 0.1  # share of the noise in the start
_SHORTER, _TRIES = 0.4, 8  # a step that does not reduce the residual is cut to this, so many times


class _State(NamedTuple):
    """The items that are still being solved, one row each."""

    items: Tensor  # which of the batch they are
    weight: Tensor  # G', (B, Co, Ci, *K), of norm 1
    left: Tensor  # Lo
    right: Tensor  # Li
    first: Tensor  # F1'
    second: Tensor  # F2', least squares for F1'
    error: Tensor  # R, (B, Co, Ci, *N)
    factor: Tensor  # of the Gram matrix of F1', (B, |K2|*Ch, |K2|*Ch)
    residual: Tensor  # |R|
    before: Tensor  # |R| one step ago
    radius: Tensor  # of the trust region
    used: Tensor  # half-steps
    careful: Tensor  # whether CG runs in full precision
    stalled: Tensor

    def at(self, rows: Tensor) -> _State:
        return _State(*(x[rows] for x in self))

    @property
    def kernels(self) -> tuple[Tensor, ...]:
        """F1' and what is computed from it."""
        return self.first, self.second, self.error, self.residual, self.factor

    def with_kernels(self, first: Tensor, second: Tensor, error: Tensor, residual: Tensor, factor: Tensor) -> _State:
        return self._replace(first=first, second=second, error=error, residual=residual, factor=factor)


def gauss_newton(equation: Equation, noise: Tensor, *, max_iter: int, tol: float) -> Solution:
    """Solve a batch from noise for F1, (B, Ch, Ci, *K1), in at most `2 * max_iter` half-steps for each item."""
    weight, scale, history = equation.weight, equation.norm, History(equation.weight)
    state = _start(equation, noise)
    first, second = torch.empty_like(noise), weight.new_empty(len(weight), *state.second.shape[1:])
    residual, used = torch.empty_like(scale), torch.empty_like(state.used)
    limit = 2 * max_iter - 1  # the last half-step is kept for an item that is not exact by then
    while True:
        remaining = frobenius(mix_in(mix_out(state.left, state.error), state.right)) / scale[state.items]
        history.add(state.items, remaining)
        done = (remaining <= tol) | state.stalled | (state.used + 3 > limit)
        ends, careful = torch.stack([done, state.careful]).tolist()
        if any(ends):
            rows = _rows(ends, done.device)
            ended = state.at(rows)
            first[ended.items] = mix_in(ended.first, ended.right)
            second[ended.items] = mix_out(ended.left, ended.second)
            residual[ended.items], used[ended.items] = remaining[rows], ended.used
            rows = _rows([not end for end in ends], done.device)
            state, remaining = state.at(rows), remaining[rows]
            careful = [flag for flag, end in zip(careful, ends, strict=True) if not end]
        if not careful:
            break
        state = _advance(equation, state, careful, 0.3 * tol / remaining, limit)

    rest = (~(residual <= tol)).nonzero().flatten()
    if len(rest):  # the nearest F2 for G', so far: now for G
        step = HalfStep(first[rest], equation.frame.second, equation.backend)
        found, _, norm = project(step, weight[rest], equation.frame.before, always_refine=True)
        last = norm / scale[rest]
        second[rest] = per_item(last < residual[rest], found, second[rest])
        history.add(rest, last.minimum(residual[rest]))
        used[rest] += 1
    return Solution(first, second, history.stacked(), used)


def _start(equation: Equation, noise: Tensor) -> _State:
    frame, backend, (b, co, ci) = equation.frame, equation.backend, equation.sizes
    solvable = equation.hidden >= min(co, ci) and freedom(frame, co, ci, equation.hidden) >= 0
    roundoff = torch.finfo(equation.dtype).eps
    weight, left, right = whiten(equation.weight, roundoff) if solvable else whiten(equation.weight, roundoff, passes=0)
    second = backend.correlate(weight, frame.before, noise, frame.second)
    mirrored = backend.correlate(weight.transpose(1, 2), frame.before, second.transpose(1, 2), frame.first)
    first = unit(unit(mirrored.transpose(1, 2)) + _NOISE * unit(noise))
    second, error, residual, factor = _projected(equation, weight, first)
    items = torch.arange(b, device=weight.device)
    no = torch.zeros_like(items, dtype=torch.bool)
    return _State(
        items=items,
        weight=weight,
        left=left,
        right=right,
        first=first,
        second=second,
        error=error,
        factor=factor,
        residual=residual,
        before=3**0.5 * residual,  # so that the first forcing term is 0.3
        radius=torch.full_like(residual, _RADIUS),
        used=torch.ones_like(items),
        careful=no,
        stalled=no.clone(),
    )


def _projected(equation: Equation, weight: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The least-squares F2 for F1, its error with its norm, and a factor of the rows' Gram matrix for directions."""
    step = HalfStep(first, equation.frame.second, equation.backend)
    second, error, norm = project(step, weight, equation.frame.before)
    factor = step.factor.dense if step.by_rows else None
    if factor is None:
        factor = ridged_factor(equation.backend.row_gram(first, step.k2))
    elif step.inverse is not None:  # some are singular
        factor[step.singular] = ridged_factor(equation.backend.row_gram(first[step.singular], step.k2))
    return second, error, norm, factor


def _advance(equation: Equation, state: _State, careful: list[bool], enough: Tensor, limit: int) -> _State:
    """One Gauss-Newton step of every item; `enough` is the forcing term, (B,), beyond which tol would be overshot."""
    found = _directions(equation, state, careful, enough, limit)
    reached = state._replace(used=state.used + 2 * found.steps)
    taken, failed = torch.ones_like(state.residual), torch.ones_like(state.stalled)
    tried = (found.gain > 0) & (reached.used < limit)
    wanted = per_item(tried, found.change, torch.zeros_like(found.change))  # a direction that is not tried may be no number
    rows: Tensor | None = None  # all of them, at first
    numbers = list(range(len(careful)))  # the same, on the host
    for _ in range(_TRIES):
        chosen = reached if rows is None else reached.at(rows)
        change, share = (x if rows is None else x[rows] for x in (wanted, taken))
        trial = unit(chosen.first + share.view(-1, *(1,) * (change.ndim - 1)) * change)
        trials = (trial, *_projected(equation, chosen.weight, trial))
        reached = reached._replace(used=reached.used + tried)
        better = trials[3] < chosen.residual
        better = tried & (better if rows is None else torch.zeros_like(tried).index_copy(0, rows, better))
        taken = torch.where(tried & ~better, _SHORTER * taken, taken)
        again = tried & ~better & (reached.used < limit)
        wins, goes_on = torch.stack([better, again]).tolist()
        if rows is None and all(wins):
            reached, failed = reached.with_kernels(*trials), ~better
            break
        at = _rows(wins, taken.device)
        part = at if rows is None else _rows([wins[row] for row in numbers], taken.device)
        new = (old.index_copy(0, at, value[part]) for old, value in zip(reached.kernels, trials, strict=True))
        reached, failed, tried = reached.with_kernels(*new), failed & ~better, again
        if not any(goes_on):
            break
        rows, numbers = _rows(goes_on, taken.device), [row for row, flag in enumerate(goes_on) if flag]
    residual = reached.residual

    # Along the step the model's gain is gain * (1 - (1 - t)^2), where |R - P A2 d| is least at t = 1.
    ratio = (1 - (residual / state.residual) ** 2) / (found.gain * (1 - (1 - taken) ** 2)).clamp_min(1e-30)
    radius = torch.where((ratio > 0.75) & found.on_sphere, 2 * state.radius, state.radius)
    radius = torch.where(ratio < 0.25, 0.5 * found.length, radius)
    radius = torch.where(taken < 1, taken * found.length, radius)
    return reached._replace(
        before=state.residual,
        radius=torch.where(failed, 0.5 * state.radius, radius),
        careful=state.careful | failed,
        stalled=failed & state.careful,
    )


def _directions(equation: Equation, state: _State, careful: list[bool], enough: Tensor, limit: int) -> Direction:
    """Directions for F1', in the precision that each item calls for."""
    if len(set(careful)) == 1:
        return _directions_alike(equation, state, careful[0], enough, limit)
    whole: Direction | None = None
    for kind in (False, True):
        rows = _rows([flag == kind for flag in careful], enough.device)
        found = _directions_alike(equation, state.at(rows), kind, enough[rows], limit)
        whole = whole or Direction(*(values.new_empty(len(careful), *values.shape[1:]) for values in found))
        whole = Direction(*(into.index_copy(0, rows, values) for into, values in zip(whole, found, strict=True)))
    assert whole is not None
    return whole


def _directions_alike(equation: Equation, state: _State, careful: bool, enough: Tensor, limit: int) -> Direction:
    work = state.weight.dtype
    most = ((limit - state.used - 1) // 2).clamp_max(MOST_STEPS)
    dtype = work if careful else torch.float32
    norm = state.residual.view(-1, *(1,) * (state.first.ndim - 1))
    # Forcing terms of Eisenstat and Walker, down to what the precision allows and tol can use.
    forcing = (0.9 * (state.residual / state.before) ** 2).clamp(0.01 if dtype == torch.float64 else 0.03, 0.3)
    forcing = forcing.maximum(enough)
    first, second, lower1 = (x.to(dtype) for x in (state.first, state.second, state.factor))
    lower2 = ridged_factor(equation.backend.row_gram(second.transpose(1, 2), equation.frame.first))
    across1 = across(lower1, dense_system(first, equation.frame.second))
    across2 = across(lower2, dense_system(second.transpose(1, 2), equation.frame.first))
    about = Linearised((state.error / norm).to(dtype), across1, across2, lower2)
    found = direction(about, equation.frame.first, forcing.to(dtype), (state.radius / state.residual).to(dtype), most)
    change, length, gain = (x.to(work) for x in (found.change, found.length, found.gain))
    return found._replace(change=change * norm, length=length * state.residual, gain=gain)


def _rows(flags: list[bool], device: torch.device) -> Tensor:
    """Which are set."""
    return torch.tensor([row for row, flag in enumerate(flags) if flag], dtype=torch.int64).to(device, non_blocking=True)
