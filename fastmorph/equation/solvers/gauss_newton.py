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
5. Every flag, radius and precision is an item's own: an item takes the path in a batch that it takes alone. They are numbers
   of the host, which looks once after each step that was tried.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmorph.equation.backends.torch_backend import dense_system, frobenius
from fastmorph.equation.bounds import freedom
from fastmorph.equation.frame import Size
from fastmorph.equation.half_step import HalfStep, per_item
from fastmorph.equation.solvers.base import Equation, Numbers, Solution, sent
from fastmorph.equation.solvers.steihaug import MOST_STEPS, Linearised, across, direction, ridged_factor
from fastmorph.equation.solvers.sweeps import project, unit
from fastmorph.equation.solvers.whiten import Whitened, mix_in, mix_out, whiten
from fastmorph.equation.system import System

_RADIUS = 0.5  # of the first step, as a share of |G|
_NOISE = 0.1  # share of the noise in the start
_SHORTER, _TRIES = 0.4, 8  # a step that does not reduce the residual is cut to this, so many times
_NEAR = 0.01  # relative residual from which one step may lead to where rounding counts


class _State(NamedTuple):
    """The items that are still being solved, one row each, on the device."""

    weight: Tensor  # G', (B, Co, Ci, *K), of norm 1
    left: Tensor  # Lo / |G|
    right: Tensor  # Li
    first: Tensor  # F1'
    second: Tensor  # F2', least squares for F1'
    error: Tensor  # R, (B, Co, Ci, *N)
    factor: Tensor  # of the Gram matrix of F1', (B, |K2|*Ch, |K2|*Ch)

    def at(self, rows: Numbers) -> _State:
        """Some of the items."""
        if len(rows) == len(self.weight):
            return self
        places = sent(rows, self.weight)
        return _State(*(x.index_select(0, places) for x in self))

    def replaced(self, rows: Numbers, other: _State, taken: Numbers) -> _State:
        """With rows of its own for those of another state that were taken."""
        if len(rows) == len(self.weight):
            return other
        into, of = sent(rows, self.weight), None if len(taken) == len(other.weight) else sent(taken, self.weight)
        pairs = zip(self[3:], other[3:], strict=True)
        return _State(*self[:3], *(a.index_copy(0, into, b if of is None else b.index_select(0, of)) for a, b in pairs))


class _Told(NamedTuple):
    """What the host knows of them."""

    items: Numbers  # which of the batch they are
    residual: Numbers  # |R|
    remaining: Numbers  # the relative residual of G itself
    before: Numbers  # |R| one step ago
    radius: Numbers  # of the trust region
    used: Numbers  # half-steps
    careful: Numbers  # whether CG runs in full precision
    stalled: Numbers

    def at(self, rows: Numbers) -> _Told:
        """Some of the items."""
        return _Told(*(x[rows] for x in self))


def gauss_newton(equation: Equation, noise: Tensor, *, max_iter: int, tol: float) -> Solution:
    """Solve a batch from noise for F1, (B, Ch, Ci, *K1), in at most `2 * max_iter` half-steps for each item."""
    weight = equation.weight
    whitened, state, told = _start(equation, noise)
    first, second = torch.empty_like(noise), torch.empty_like(state.second)
    residual, used, trace = np.empty(len(weight)), np.empty(len(weight), np.int64), []
    limit = 2 * max_iter - 1  # the last half-step is kept for an item that is not exact by then
    while True:
        trace.append(np.full(len(weight), np.nan))
        trace[-1][told.items] = told.remaining
        done = (told.remaining <= tol) | told.stalled | (told.used + 3 > limit)
        if done.any():
            rows = np.flatnonzero(done)
            ended, items = state.at(rows), sent(told.items[rows], weight)
            first.index_copy_(0, items, ended.first)
            second.index_copy_(0, items, ended.second)
            residual[told.items[rows]], used[told.items[rows]] = told.remaining[rows], told.used[rows]
            state, told = state.at(rows := np.flatnonzero(~done)), told.at(rows)
        if not len(told.items):
            break
        state, told = _advance(equation, state, told, tol, limit)

    first, second = mix_in(first, whitened.right), mix_out(whitened.left, second)
    rest = np.flatnonzero(~(residual <= tol))
    if len(rest):  # the nearest F2 for G', so far: now for G
        open_items = sent(rest, weight)
        step = HalfStep(first[open_items], equation.frame.second, equation.backend)
        found, _, norm = project(step, weight[open_items], equation.frame.before, always_refine=True)
        last = np.array((norm / equation.norm[open_items]).tolist())
        second[open_items] = per_item(sent(last < residual[rest], weight), found, second[open_items])
        trace.append(np.full(len(weight), np.nan))
        trace[-1][rest] = np.fmin(last, residual[rest])
        used[rest] += 1
    return Solution(first, second, sent(np.array(trace), weight).to(weight.dtype), sent(used, weight))


def _start(equation: Equation, noise: Tensor) -> tuple[Whitened, _State, _Told]:
    """The whitened weight, and where a power step on its windows leads."""
    frame, (_, co, ci) = equation.frame, equation.sizes
    solvable = equation.hidden >= min(co, ci) and freedom(frame, co, ci, equation.hidden) >= 0
    roundoff = torch.finfo(equation.dtype).eps
    whitened = whiten(equation.weight, roundoff) if solvable else whiten(equation.weight, roundoff, passes=0)
    weight = whitened.weight
    second = _adjoint(System(noise, frame.second, equation.backend), weight, frame.before).transpose(1, 2)
    mirrored = _adjoint(System(second, frame.first, equation.backend), weight.transpose(1, 2), frame.before)
    first = unit(unit(mirrored.transpose(1, 2)) + _NOISE * unit(noise))
    left = whitened.left / equation.norm[:, None, None]
    state, residual, remaining = _projected(equation, (weight, left, whitened.right), first, near=True)
    no = np.zeros(len(weight), bool)
    told = _Told(
        items=np.arange(len(weight)),
        residual=residual,
        remaining=remaining,
        before=3**0.5 * residual,  # so that the first forcing term is 0.3
        radius=np.full(len(weight), _RADIUS),
        used=np.ones(len(weight), np.int64),
        careful=no,
        stalled=no,
    )
    return whitened, state, told


def _adjoint(system: System, target: Tensor, before: Size) -> Tensor:
    return system.kernel(system.right_side(target, before))


def _projected(
    equation: Equation, given: tuple[Tensor, Tensor, Tensor], first: Tensor, *, near: bool
) -> tuple[_State, Numbers, Numbers]:
    """The state of F1', for what is `given`: G', Lo / |G| and Li; |R|, and the residual of G itself. The host looks at these.

    Refined if it is `near` an answer: far from one, what the Gram matrix's condition cost cannot be seen against the residual.
    """
    (weight, left, right), (k2, before) = given, (equation.frame.second, equation.frame.before)
    for wait in (False, True):
        step = HalfStep(first, k2, equation.backend, wait=wait)
        second = step.solve(weight, before)
        error, norm = step.error(weight, before, second)
        if near:
            second, error, norm = step.refined(second, error, norm, weight, before)
        remaining = frobenius(mix_in(mix_out(left, error), right))
        residual, left_over, failed = np.array(torch.stack([norm, remaining, step.singular]).tolist())
        if not failed.any():
            break
    # Once more, where the pseudo-inverse was needed.
    factor = step.factor.dense if step.by_rows else None
    if factor is None:
        factor = ridged_factor(step.system.row_gram())
    elif step.inverse is not None:
        factor = factor.clone()
        factor[step.singular] = ridged_factor(equation.backend.row_gram(first[step.singular], k2))
    return _State(weight, left, right, first, second, error, factor), residual, left_over


def _advance(equation: Equation, state: _State, told: _Told, tol: float, limit: int) -> tuple[_State, _Told]:
    """One Gauss-Newton step of every item."""
    change, length, gain, on_sphere, steps = _directions(equation, state, told, tol, limit)
    used, taken = told.used + 2 * steps, np.ones(len(gain))
    residual, remaining, failed = told.residual.copy(), told.remaining.copy(), np.ones(len(gain), bool)
    tried, near = (gain > 0) & (used < limit), bool((told.residual <= _NEAR).any())
    for _ in range(_TRIES):
        rows = np.flatnonzero(tried)
        if not len(rows):
            break
        chosen = state.at(rows)
        part = change if len(rows) == len(change) else change.index_select(0, sent(rows, change))
        if (taken[rows] < 1).any():
            part = part * sent(taken[rows], change).to(part.dtype).view(-1, *(1,) * (part.ndim - 1))
        trial, new, left_over = _projected(equation, chosen[:3], unit(chosen.first + part), near=near)
        used[rows] += 1
        better = new < told.residual[rows]
        wins = rows[better]
        if len(wins):
            state = state.replaced(wins, trial, np.flatnonzero(better))
            residual[wins], remaining[wins], failed[wins] = new[better], left_over[better], False
        taken[rows[~better]] *= _SHORTER
        tried[wins] = False
        tried &= used < limit

    # Along the step the model's gain is gain * (1 - (1 - t)^2), where |R - P A2 d| is least at t = 1.
    with np.errstate(invalid="ignore"):  # a direction that was not tried may be no number
        expected = np.maximum(gain * (1 - (1 - taken) ** 2), 1e-30)
        ratio = (1 - (residual / told.residual) ** 2) / expected
    radius = np.where((ratio > 0.75) & on_sphere, 2 * told.radius, told.radius)
    radius = np.where(ratio < 0.25, 0.5 * length, radius)
    radius = np.where(taken < 1, taken * length, radius)
    return state, told._replace(
        residual=residual,
        remaining=remaining,
        before=told.residual,
        radius=np.where(failed, 0.5 * told.radius, radius),
        used=used,
        careful=told.careful | failed,
        stalled=failed & told.careful,
    )


class _Step(NamedTuple):
    """A change of F1', (B, Ch, Ci, *K1), in the working dtype, and what the host knows of it; see `Direction`."""

    change: Tensor
    length: Numbers
    gain: Numbers
    on_sphere: Numbers
    steps: Numbers


def _directions(equation: Equation, state: _State, told: _Told, tol: float, limit: int) -> _Step:
    """Directions for F1', in the precision that each item calls for."""
    if told.careful.all() or not told.careful.any():
        return _directions_alike(equation, state, told, tol, limit)
    kinds = [np.flatnonzero(~told.careful), np.flatnonzero(told.careful)]
    found = [_directions_alike(equation, state.at(rows), told.at(rows), tol, limit) for rows in kinds]
    back = np.argsort(np.concatenate(kinds))
    change = torch.cat([part.change for part in found]).index_select(0, sent(back, state.first))
    return _Step(change, *(np.concatenate(parts)[back] for parts in zip(*(part[1:] for part in found), strict=True)))


def _directions_alike(equation: Equation, state: _State, told: _Told, tol: float, limit: int) -> _Step:
    work = state.weight.dtype
    dtype = work if told.careful[0] else torch.float32
    # Forcing terms of Eisenstat and Walker, down to what the precision allows and tol can use.
    forcing = np.clip(0.9 * (told.residual / told.before) ** 2, 0.01 if dtype == torch.float64 else 0.03, 0.3)
    forcing = np.maximum(forcing, 0.3 * tol / told.remaining)  # beyond which tol would be overshot
    most = np.minimum((limit - told.used - 1) // 2, MOST_STEPS)
    first, second, lower1 = (x.to(dtype) for x in (state.first, state.second.transpose(1, 2), state.factor))
    across1 = across(lower1, dense_system(first, equation.frame.second))
    system2 = System(second, equation.frame.first, equation.backend)
    lower2 = ridged_factor(system2.row_gram())
    across2 = across(lower2, system2.dense)
    about = Linearised(state.error.to(dtype), told.residual, across1, across2, lower2)
    found = direction(about, equation.frame.first, forcing, told.radius / told.residual, most)
    return _Step(found.change.to(work), found.length * told.residual, found.gain, found.on_sphere, found.steps)
