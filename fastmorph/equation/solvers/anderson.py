"""Algorithm 1 with Anderson acceleration of its sweeps (Walker and Ni 2011).

A sweep is a map F1 -> F1' of which an exact answer is a fixed point. The next F1 is the combination of the images of the last
20 for which the combination of their moves F1' - F1 is least, which a small least-squares problem gives.

Where this departs from the textbook:
1. Hidden channels of F1 are scaled to norm 1, the gauge along which the iterates would drift.
2. When the residual grows by half or more, the item goes back to its last image, a plain step, and forgets its memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmorph.equation.arrays import host_waits
from fastmorph.equation.half_step import HalfStep, per_item
from fastmorph.equation.solvers.base import Equation, Numbers, Solution, sent
from fastmorph.equation.solvers.sweeps import project, unit

MEMORY = 20
_GROWTH = 1.5
_NEAR = 0.01  # relative residual from which one sweep may lead to where rounding counts


class _Sweep(NamedTuple):
    """The items that are still being solved, one row each, on the device."""

    weight: Tensor  # G
    scale: Tensor  # |G|
    first: Tensor  # F1, (B, Ch, Ci, *K1)
    image: Tensor  # F1' of the last sweep
    move: Tensor  # F1' - F1 of the last sweep, (B, n), n = Ch * Ci * |K1|
    images: Tensor  # differences of successive images, (B, 20, n); zero where there is none
    moves: Tensor  # differences of successive moves, likewise

    def at(self, rows: Numbers) -> _Sweep:
        """Some of the items."""
        if len(rows) == len(self.first):
            return self
        places = sent(rows, self.first)
        return _Sweep(*(x.index_select(0, places) for x in self))


def anderson(equation: Equation, noise: Tensor, *, max_iter: int, tol: float) -> Solution:
    """Solve a batch from noise for F1, (B, Ch, Ci, *K1), in at most `2 * max_iter` half-steps for each item."""
    weight, (b, co, _) = equation.weight, equation.sizes
    memory = noise.new_zeros(b, MEMORY, noise[0].numel() if b else 0)
    first = unit(noise)
    state = _Sweep(weight, equation.norm, first, first, torch.zeros_like(first).flatten(1), memory, memory)
    best_first, best_second = first.clone(), weight.new_zeros(b, co, equation.hidden, *equation.frame.second)
    items, last, used = np.arange(b), np.full(b, np.inf), np.zeros(b, np.int64)  # `last` is infinite where memory was cleared
    best, total, trace, near = np.full(b, np.inf), np.zeros(b, np.int64), [np.empty((0, b))], False
    while len(items):
        second, residual = _projected(equation, state, near=near)
        near = bool((residual <= _NEAR).any())
        trace.append(np.full((1, b), np.nan))
        trace[-1][0, items] = residual
        used += 1
        total[items] = used
        better = np.flatnonzero(residual < best[items])
        if len(better):
            places, of = sent(items[better], weight), sent(better, weight)
            best_first.index_copy_(0, places, state.first.index_select(0, of))
            best_second.index_copy_(0, places, second.index_select(0, of))
            best[items[better]] = residual[better]

        rows = np.flatnonzero(~((residual <= tol) | (used + 2 > 2 * max_iter)))
        if len(rows) < len(items):
            state, second = state.at(rows), second.index_select(0, sent(rows, weight))
        items, residual, last, used = items[rows], residual[rows], last[rows], used[rows]
        worse = residual > _GROWTH * last
        if worse.any():
            state = _forget(state, sent(worse, weight))
        rows = np.flatnonzero(~worse)
        if len(rows):
            part = second if len(rows) == len(items) else second.index_select(0, sent(rows, weight))
            swept = _swept(equation, state.at(rows), part, sent(np.isfinite(last[rows]), weight))
            if len(rows) < len(items):
                into = sent(rows, weight)
                swept = _Sweep(*(whole.index_copy(0, into, new) for whole, new in zip(state, swept, strict=True)))
            state = swept
        last, used = np.where(worse, np.inf, residual), used + ~worse
    return Solution.told(best_first, best_second, np.concatenate(trace))._replace(iterations=sent(total, weight))


def _projected(equation: Equation, state: _Sweep, *, near: bool) -> tuple[Tensor, Numbers]:
    """The least-squares F2 and its relative residuals, at which the host looks."""
    for wait in _waits(state.first):
        step = HalfStep(state.first, equation.frame.second, equation.backend, wait=wait)
        second, _, norm = project(step, state.weight, equation.frame.before, always_refine=near and not wait)
        residual, singular = np.array(torch.stack([norm / state.scale, step.singular]).tolist())
        if wait or not singular.any():
            break
    return second, residual


def _waits(kernel: Tensor) -> tuple[bool, ...]:
    """Whether a half-step waits to see what is singular: where it is at hand; else only once more, where something was."""
    return (False, True) if host_waits(kernel.device) else (True,)


def _forget(state: _Sweep, worse: Tensor) -> _Sweep:
    """Send items back to their last image, with an empty memory and no residual to compare with."""
    return state._replace(
        first=per_item(worse, state.image, state.first),
        images=state.images.masked_fill(worse[:, None, None], 0.0),
        moves=state.moves.masked_fill(worse[:, None, None], 0.0),
    )


def _swept(equation: Equation, state: _Sweep, second: Tensor, known: Tensor) -> _Sweep:
    """After the half-step for F1, with the next F1 from it and from the memory; `known`: where there is a last sweep."""
    target, frame = state.weight.transpose(1, 2), equation.frame.transposed
    for wait in _waits(second):
        step = HalfStep(second.transpose(1, 2), frame.second, equation.backend, wait=wait)
        if wait or not any(step.singular.tolist()):
            break
    image = unit(step.solve(target, frame.before).transpose(1, 2))
    move = (image - state.first).flatten(1)
    images = _pushed(state.images, (image - state.image).flatten(1) * known[:, None])
    moves = _pushed(state.moves, (move - state.move) * known[:, None])
    first = unit(equation.backend.anderson_step(image, move, images, moves))
    return state._replace(first=first, image=image, move=move, images=images, moves=moves)


def _pushed(memory: Tensor, newest: Tensor) -> Tensor:
    return torch.cat([newest[:, None], memory[:, :-1]], dim=1)
