"""Algorithm 1 with Anderson acceleration of its sweeps (Walker and Ni 2011).

A sweep is a map F1 -> F1' of which an exact answer is a fixed point. The next F1 is the combination of the images of the last
20 for which the combination of their moves F1' - F1 is least, which a small least-squares problem gives.

Where this departs from the textbook:
1. Hidden channels of F1 are scaled to norm 1, the gauge along which the iterates would drift.
2. When the residual grows by half or more, the item goes back to its last image, a plain step, and forgets its memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmorph.equation.half_step import HalfStep, per_item
from fastmorph.equation.solvers.base import Equation, Solution
from fastmorph.equation.solvers.sweeps import History, project, unit

MEMORY = 20
_GROWTH = 1.5


class _Sweep(NamedTuple):
    """The items that are still being solved, one row each."""

    items: Tensor  # which of the batch they are
    first: Tensor  # F1, (B, Ch, Ci, *K1)
    image: Tensor  # F1' of the last sweep
    move: Tensor  # F1' - F1 of the last sweep, (B, n), n = Ch * Ci * |K1|
    images: Tensor  # differences of successive images, (B, 20, n); zero where there is none
    moves: Tensor  # differences of successive moves, likewise
    residual: Tensor  # of the last sweep, infinite where the memory was cleared
    used: Tensor  # half-steps

    def at(self, rows: Tensor) -> _Sweep:
        return _Sweep(*(x[rows] for x in self))


def anderson(equation: Equation, noise: Tensor, *, max_iter: int, tol: float) -> Solution:
    """Solve a batch from noise for F1, (B, Ch, Ci, *K1), in at most `2 * max_iter` half-steps for each item."""
    frame, weight, scale, history = equation.frame, equation.weight, equation.norm, History(equation.weight)
    b, co, _ = equation.sizes
    memory = noise.new_zeros(b, MEMORY, noise[0].numel() if b else 0)
    items, never = torch.arange(b, device=weight.device), torch.full_like(scale, torch.inf)
    first = unit(noise)
    state = _Sweep(items, first, first, torch.zeros_like(first).flatten(1), memory, memory, never, torch.zeros_like(items))
    best_first, best_second = first.clone(), weight.new_zeros(b, co, equation.hidden, *frame.second)
    best, used = never.clone(), torch.zeros_like(items)
    while len(state.items):
        second, _, norm = project(HalfStep(state.first, frame.second, equation.backend), weight[state.items], frame.before)
        residual = norm / scale[state.items]
        history.add(state.items, residual)
        state = state._replace(used=state.used + 1)
        used[state.items] = state.used
        better = residual < best[state.items]
        rows = state.items[better]
        best_first[rows], best_second[rows], best[rows] = state.first[better], second[better], residual[better]

        on = ~((residual <= tol) | (state.used + 2 > 2 * max_iter))
        state, second, residual = state.at(on), second[on], residual[on]
        worse = residual > _GROWTH * state.residual
        state = _forget(state, worse)
        rows = (~worse).nonzero().flatten()
        if len(rows):
            swept = _swept(equation, state.at(rows), second[rows], residual[rows])
            state = _Sweep(*(whole.index_copy(0, rows, part) for whole, part in zip(state, swept, strict=True)))
    return Solution(best_first, best_second, history.stacked(), used)


def _forget(state: _Sweep, worse: Tensor) -> _Sweep:
    """Send items back to their last image, with an empty memory and no residual to compare with."""
    return state._replace(
        first=per_item(worse, state.image, state.first),
        images=state.images.masked_fill(worse[:, None, None], 0.0),
        moves=state.moves.masked_fill(worse[:, None, None], 0.0),
        residual=state.residual.masked_fill(worse, torch.inf),
    )


def _swept(equation: Equation, state: _Sweep, second: Tensor, residual: Tensor) -> _Sweep:
    """After the half-step for F1, with the next F1 from it and from the memory."""
    target, frame = equation.weight[state.items].transpose(1, 2), equation.frame.transposed
    step = HalfStep(second.transpose(1, 2), frame.second, equation.backend)
    image = unit(step.solve(target, frame.before).transpose(1, 2))
    move = (image - state.first).flatten(1)
    known = torch.isfinite(state.residual)[:, None]  # whether there is a sweep to take the difference from
    images = _pushed(state.images, (image - state.image).flatten(1) * known)
    moves = _pushed(state.moves, (move - state.move) * known)
    first = unit(equation.backend.anderson_step(image, move, images, moves))
    return state._replace(
        first=first, image=image, move=move, images=images, moves=moves, residual=residual, used=state.used + 1
    )


def _pushed(memory: Tensor, newest: Tensor) -> Tensor:
    return torch.cat([newest[:, None], memory[:, :-1]], dim=1)
